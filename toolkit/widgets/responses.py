"""Responses in boxes, shown while they are decoded: the parts that the steering widget and the map of heads share."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from toolkit import stats
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition, Intervention
from toolkit.spans import Reader
from toolkit.types import Problem, Rollout

_BOX = "display:inline-block;vertical-align:top;width:17rem;margin:.3rem;padding:.5rem;border:1px solid #ccc;border-radius:6px"


def response_html(lm: LM, label: str, response: Rollout) -> str:
    """Return a response in a box as HTML: a label and the number of think tokens above, thinking in blue, the answer in bold.

    Args:
        lm: Model whose tokenizer made the tokens.
        label: Text above the response, such as the strength of steering.
        response: The response.
    """
    r = response
    # Without a think span, an empty one at the start of the response.
    start, stop = (r.think.start, r.think.stop) if r.think else (r.prompt_len, r.prompt_len)
    parts = (html.escape(lm.text(r.token_ids[a:b])) for a, b in pairwise((r.prompt_len, start, stop, len(r.token_ids))))
    before, thought, rest = parts
    text = f"<span style='color:#888'>{before}</span><span style='color:#0072B2'>{thought}</span><b>{rest}</b>"
    head = f"<small>{html.escape(label)}: {r.think_tokens} think tokens{'' if r.closed else ', never closed'}</small>"
    return f"<div style='{_BOX}'>{head}<pre style='white-space:pre-wrap;margin:.4rem 0 0'>{text}</pre></div>"


def partial_html(label: str, text: str) -> str:
    """Return a box with the beginning of a response that is still being decoded, as HTML.

    Args:
        label: Text above the response.
        text: The response so far.
    """
    head = f"<small>{html.escape(label)}: decoding…</small>"
    return f"<div style='{_BOX};border-style:dashed'>{head}<pre style='white-space:pre-wrap;margin:.4rem 0 0'>{html.escape(text)}</pre></div>"


class Stream:
    """Decoding rule that shows a response while it is decoded, and ends a response that repeats itself.

    It changes no token until the response loops (see ``stats.looping``). Then the next token is replaced by an end-of-sequence token. Use
    one object per response: pass it in ``Condition.rules`` and sample one response.

    Attributes:
        cut: True if the rule ended the response.
    """

    def __init__(self, show: Callable[[str], None], *, every: int = 8) -> None:
        """Remember what to call.

        Args:
            show: Function that is called with the text so far.
            every: Number of tokens between two calls.
        """
        self._show, self._every, self._tokens, self.cut = show, every, list[int](), False

    def __call__(self, lm: LM, reader: Reader, drawn: int) -> Sequence[int] | None:
        """Return an end-of-sequence token if the response loops, else ``None``. See ``baselines.Budget`` for the arguments."""
        if stats.looping(self._tokens):
            self.cut = True
            return (min(lm.eos_ids),)
        self._tokens.append(drawn)
        if len(self._tokens) % self._every == 0:
            self._show(lm.text(self._tokens))
        return None


def asked(prompt: str) -> Problem:
    """Return a problem that asks a prompt, given as the text of the user message. It has no right answer."""
    return Problem("prompt", ({"role": "user", "content": prompt},), "")


def questions(problems: Sequence[Problem]) -> list[tuple[str, Problem]]:
    """Return problems as the options of a dropdown: the beginning of the question, and the problem."""
    return [(f"{i}. {str(p.messages[-1]['content'])[:60]}", p) for i, p in enumerate(problems, 1)]


def streamed(
    lm: LM, acts: Sequence[Intervention], problem: Problem, sampling: Sampling, show: Callable[[str], None]
) -> tuple[Rollout, bool]:
    """Sample one response, and show it while it is decoded. Return the response, and True if it was cut because it loops.

    Args:
        lm: The model.
        acts: Interventions, such as from ``edits.steering`` or ``masks.masking``; empty for the unchanged model.
        problem: The problem to answer.
        sampling: Sampling settings; one sample.
        show: Function that is called with the text so far every few tokens.
    """
    rule = Stream(show)
    (response,) = rollouts(Condition(lm, tuple(acts), rules=(rule,)), [problem], sampling, progress=False)
    return response, rule.cut


@dataclass(frozen=True)
class Arm:
    """One of the responses that a widget samples.

    Attributes:
        name: Text before the strength or number of think tokens, such as "head 2.4 off".
        acts: Interventions on the model; empty for the unchanged model.
    """

    name: str
    acts: tuple[Intervention, ...] = ()


def show_arms(
    lm: LM, arms: Sequence[Arm], problem: Problem, sampling: Sampling, busy: Any, output: Any, *, first: str = ""
) -> list[Rollout]:
    """Sample one response per arm, show each in a box while it is decoded, and return them.

    Args:
        lm: The model.
        arms: What is compared; all arms are sampled with the same random numbers.
        problem: The problem to answer.
        sampling: Sampling settings; one sample.
        busy: Widget with a text in ``value``, which says that the model is busy, and then "ready".
        output: Widget with HTML in ``value``, which shows the boxes.
        first: HTML of boxes that stand before those of the arms.
    """
    done, responses = first, []
    try:
        for number, arm in enumerate(arms, 1):
            busy.value = f"<b>busy</b>: response {number} of {len(arms)}"

            def show(text: str, before: str = done, label: str = arm.name) -> None:
                output.value = before + partial_html(label, text)

            show("")
            response, cut = streamed(lm, arm.acts, problem, sampling, show)
            done += response_html(lm, f"{arm.name}{', cut: it repeats itself' * cut}", response)
            output.value = done
            responses.append(response)
    finally:
        busy.value = "ready"
    return responses
