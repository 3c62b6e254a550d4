"""Adaptive deep reasoning: triggering deep thinking when needed, arXiv:2505.20101. Supervised training of the two modes.

The model learns two *modes*: long thinking, and short thinking (here: none). A text appended to the question requests a mode; without it
the model chooses. Reinforcement learning then rewards the mode that suits the problem (``rewards.adaptive_deep_reasoning``), and a loss on
the first token teaches the choice (``grpo.losses.ModeSwitch``).

Training data (x: question; u_m: text that requests mode m; y_m: response in that mode)::

    (x u_long, y_long)   (x u_short, y_short)   (x, y_long)   (x, y_short)          four examples per problem
    loss:  -(1/N) sum of log p(token | prompt, earlier tokens)                      over the N response tokens

Deviations: only the abstract and parts of summaries by others could be read. They name the four kinds of examples and the texts
(``REQUESTS``). Ours are: equal numbers of the four kinds; a short response without any step; and that a short response begins with the closing
think tag, so that the first token alone decides the mode, which the loss on it needs.

Units and signs: none. Cost: fine-tuning on four examples per problem. ``data/modes`` measures the two modes and their training by reward.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from toolkit import finetune
from toolkit.finetune import Example
from toolkit.lm import LM
from toolkit.tags import DEFAULT_TAGS
from toolkit.types import Problem

Mode = Literal["long", "short"]
REQUESTS: Mapping[Mode, str] = MappingProxyType(
    {"long": "[Please answer with Long CoT]", "short": "[Please answer with Short CoT]"}
)
"""Mode -> text that requests it, appended to the question; from a summary of the paper."""


@dataclass(frozen=True)
class Pair:
    """A problem with the text of a response in each mode.

    Attributes:
        problem: The problem, without a request.
        long: Response with steps.
        short: Response without steps.
    """

    problem: Problem
    long: str
    short: str


def pair(problem: Problem, thinking: str, answer: str, *, tags: tuple[str, str] = DEFAULT_TAGS) -> Pair:
    """Return the two responses to a problem: with its thinking, and without.

    >>> made = pair(Problem("p", ({"role": "user", "content": "1+1=?"},), "2"), "1+1=2", "2")
    >>> made.long, made.short
    ('<think>1+1=2</think>2', '</think>2')

    Args:
        problem: The problem.
        thinking: Text of the thinking, without tags.
        answer: Text of the answer.
        tags: Opening and closing think tag.
    """
    opening, closing = tags
    return Pair(problem, f"{opening}{thinking}{closing}{answer}", f"{closing}{answer}")


def request(problem: Problem, text: str) -> Problem:
    """Return a problem whose last user message ends with a text that requests a mode. The id stays the same.

    Raises:
        ValueError: the last message is not the user's.
    """
    *earlier, last = problem.messages
    if last["role"] != "user":
        raise ValueError(
            f"Problem {problem.id!r} ends with a message of {last['role']!r}: a mode is requested in the user's message."
        )
    return replace(problem, messages=(*earlier, {**last, "content": last["content"] + text}))


def examples(lm: LM, pairs: Sequence[Pair], requests: Mapping[Mode, str] = REQUESTS) -> list[Example]:
    """Return four training examples per problem: long and short responses, each with and without the request of its mode.

    Args:
        lm: The model to train.
        pairs: Problems with their two responses.
        requests: Mode -> text that requests it.

    Raises:
        ValueError: both texts are equal, or the two responses of a problem begin with the same token.
    """
    if requests["long"] == requests["short"]:
        raise ValueError(f"Both modes are requested with {requests['long']!r}: give two different texts.")
    made = []
    for p in pairs:
        free = [finetune.example(lm, p.problem, text) for text in (p.long, p.short)]
        if free[0].response[0] == free[1].response[0]:
            raise ValueError(
                f"Both responses of problem {p.problem.id!r} begin with {lm.token_text(free[0].response[0])!r}: they must differ in their "
                "first token, which decides the mode."
            )
        asked = [(requests["long"], p.long), (requests["short"], p.short)]
        made += [*(finetune.example(lm, request(p.problem, ask), text) for ask, text in asked), *free]
    return made


def exchanged(pairs: Sequence[Pair], seed: int = 0) -> list[Pair]:
    """Return pairs with the two responses of a random half of the problems exchanged, as a control: a request then says nothing.

    With an odd number of pairs, the smaller half is exchanged.
    """
    chosen = set(random.Random(seed).sample(range(len(pairs)), len(pairs) // 2))
    return [Pair(p.problem, p.short, p.long) if i in chosen else p for i, p in enumerate(pairs)]


def mode_of(text: str, *, tags: tuple[str, str] = DEFAULT_TAGS) -> Mode:
    """Return the mode of a response: short if it begins with the closing think tag, or with both tags and nothing between; else long.

    >>> mode_of("</think>2"), mode_of("<think></think>2"), mode_of("<think>1+1=2</think>2")
    ('short', 'short', 'long')
    """
    opening, closing = tags
    return "short" if text.removeprefix(opening).lstrip().startswith(closing) else "long"
