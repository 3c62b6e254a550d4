"""Questions about a JSON object of random keys and values: values of given keys, and threads of values that are keys in turn.

Needle Threading (Roberts et al., arXiv 2411.05000). The JSON object is called a *haystack*, and the pairs that an answer depends on are the
*needed* pairs. As keys and values are random, answers cannot be guessed. The kinds of question are:

- ``single``: the value of one key; ``multi``: the values of several keys; ``conditional``: the values of all keys with a marker;
- ``thread``: from a key to its value, which is again a key, and so on for 1 to 25 steps; ``multithread``: several threads at once;
- ``branched``: a thread some of whose keys occur more than once; the end of the longest branch is the answer.

Deviations: keys and values have four characters by default (at least one of them a digit), as small models have small contexts;
``ids="uuid"`` gives UUIDs as in the paper. The JSON is on one line, and the wording is ours. ``locate`` gives the needed pairs as token
spans of the prompt (``haystack.py``).

Units: sizes are in pairs, or in tokens of the whole chat prompt; a depth is the share of all pairs that come before the pair asked about,
0 to 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from toolkit.lm import LM
from toolkit.tasks import haystack, splits
from toolkit.tasks.generators.pairs import (
    MARKER,
    Ask,
    Direction,
    Kind,
    Pairs,
    ThreadError,
    core_of,
    kv_haystack,
    new_identifiers,
    solve,
    split_of,
)
from toolkit.tasks.haystack import ContextTooShortError, Haystack
from toolkit.types import Problem

__all__ = [
    "Ask",
    "Direction",
    "Kind",
    "Pairs",
    "ThreadError",
    "effective_context_length",
    "grid",
    "kv_haystack",
    "load",
    "locate",
    "message",
    "place",
    "problem",
    "question",
    "solve",
]

# --- problems ------------------------------------------------------------------------------------------------


def question(drawn: Pairs) -> str:
    """Return the question about a haystack as text."""
    keys, marker = ", ".join(f'"{key}"' for key in drawn.starts), MARKER
    follow = "If its value is itself a key, go on to the value of that key, and so on. "
    match drawn.ask.kind:
        case "single":
            return f"What is the value of the key {keys}? Answer with the value only."
        case "multi":
            return f"What are the values of the keys {keys}? Answer with the values only, in this order."
        case "conditional":
            return f"What are the values of all keys that contain {marker}? Answer with the values only."
        case "thread":
            return f"Start at the key {keys}. {follow}What is the last value? Answer with it only."
        case "multithread":
            follow = follow.replace("its", "the", 1)
            return f"Start at each of the keys {keys}. {follow}What are the last values? Answer with them only, in this order."
    return f"Start at the key {keys}. {follow}A key may occur several times: what is the last value of the longest thread? Answer with it only."


def pair(key: str, value: str) -> str:
    """Return a pair as JSON text, ``"key": "value"``."""
    return f'"{key}": "{value}"'


def message(drawn: Pairs, *, bare: bool = False) -> tuple[str, list[tuple[int, int]]]:
    """Return the user's message, and the character range ``(start, stop)`` of each pair in it.

    Args:
        drawn: Haystack of keys and values, from ``kv_haystack``.
        bare: Whether to leave out the pairs that the answer depends on.
    """
    text, places = "{", []
    for i, (key, value) in enumerate(drawn.pairs):
        if not (bare and i in drawn.needed):
            text += ", " * (len(text) > 1)
            piece = pair(key, value)
            places.append((len(text), len(text) + len(piece)))
            text += piece
    return f"{text}}}\n{question(drawn)}", places


def problem(drawn: Pairs, *, length: int | None = None) -> Problem:
    """Return a haystack as a problem. An answer is right if its identifiers are exactly the right values (``grading.grade``).

    Args:
        drawn: Haystack of keys and values, from ``kv_haystack``.
        length: Requested prompt length in tokens, which is only recorded in ``meta``; ``None`` if no length was requested.
    """
    text, _ = message(drawn)
    needed = [drawn.pairs[i] for i in drawn.needed]
    unordered = drawn.ask.kind == "conditional"
    meta: dict[str, Any] = {
        "task": "threading",
        "split": split_of(identifier for link in needed for identifier in link),
        "difficulty": len(needed),
        "grader": "identifier set" if unordered else "identifiers",
        "asked": tuple(key for key, _ in needed) if unordered else drawn.starts,
        "pairs": len(drawn.pairs),
        "length": length,
        **asdict(drawn.ask),
    }
    name = f"threading-{splits.digest(f'{text}{drawn.ask}{length}')}"
    return Problem(name, ({"role": "user", "content": text},), ", ".join(drawn.answer), meta)


def locate(lm: LM, drawn: Pairs, *, length: int | None = None) -> Haystack:
    """Return a haystack as a problem with token spans: of the needed pairs, in the order in which they must be read, and of the answer.

    Args:
        drawn: Haystack of keys and values, from ``kv_haystack``.
        length: Requested prompt length in tokens, which is only recorded in ``meta``; ``None`` if no length was requested.

    Raises:
        NoOffsetsError: the tokenizer gives no character offsets, or the prompt's text does not tokenize to the prompt's token ids.
        MissingTextError: the chat template changes the message, or the tokens of a pair do not decode to its text.
    """
    text, places = message(drawn)
    ends = [drawn.needed[i] for i in range(drawn.ask.steps - 1, len(drawn.needed), drawn.ask.steps)]
    answers = [(places[i][1] - 1 - len(drawn.pairs[i][1]), places[i][1] - 1) for i in ends]
    new = new_identifiers(random.Random(text), drawn.ask.ids, {identifier for link in drawn.pairs for identifier in link})
    pieces = haystack.Pieces(
        [places[i] for i in drawn.needed],
        answers,
        (len(text) - len(question(drawn)), len(text)),
        message(drawn, bare=True)[0],
        [f"{pair(new(), new())}, " for _ in drawn.needed],
    )
    return haystack.locate(lm, problem(drawn, length=length), pieces)


def place(lm: LM, ask: Ask, length: int, *, split: str = "test", seed: int = 0, sample: int = 0) -> Haystack:
    """Draw a haystack with as many pairs as fit into ``length`` tokens. Return it with its token spans (``locate``).

    Args:
        ask: Kind of question, with its settings such as the number of steps.
        length: Largest number of tokens of the chat prompt.
        sample: Index, from 0, of the haystack among those with equal ``ask``, split and seed.

    Raises:
        ContextTooLongError: ``length`` is beyond the model's maximum context.
        ContextTooShortError: the needed pairs and the question alone are longer than ``length``.
        HaystackError: the pairs cannot be located in the prompt (a subclass, as in ``locate``).
        ValueError: unknown split.
    """
    haystack.check_length(lm, length)

    def size(n: int) -> int:
        text, _ = message(kv_haystack(ask, n, split=split, seed=seed, sample=sample))
        return len(lm.prompt_ids([{"role": "user", "content": text}]))

    least = len(core_of(ask, split, seed, sample))
    taken = size(least)
    if taken > length:
        raise ContextTooShortError(
            f"The {least} pairs of {ask} and the question take {taken} tokens of {lm.name}'s prompt, more than length={length}: "
            f"ask for at least {taken}."
        )
    # Estimate the number of pairs from the tokens per pair, then correct it until it fits.
    each = (size(least + 32) - taken) / 32
    n = least
    for _ in range(8):
        more = math.floor((length - size(n)) / each)
        n = max(least, n + more)
        if more == 0:
            break
    while size(n) > length:
        n -= 1
    return locate(lm, kv_haystack(ask, n, split=split, seed=seed, sample=sample), length=length)


def grid(lm: LM, lengths: Sequence[int], asks: Sequence[Ask], *, split: str = "test", n: int = 1, seed: int = 0) -> list[Haystack]:
    """Return ``n`` haystacks per combination of length and kind of question. ``haystack.grid_cells(haystacks, "steps")`` tabulates them.

    Args:
        lengths: Prompt lengths in tokens.
        asks: Kinds of question. To vary the depth: ``[Ask("single", depth=d) for d in needle.DEPTHS]``. To vary the number of steps:
            ``[Ask("thread", steps=s) for s in (1, 2, 4, 8)]``.
        n: Number of haystacks per combination.

    Raises:
        ThreadError: no length, no question, or ``n`` below 1.
        HaystackError: a haystack cannot be built; ``place`` lists the subclasses.
        ValueError: unknown split.
    """
    if not (lengths and asks and n >= 1):
        raise ThreadError(f"{len(lengths)} lengths, {len(asks)} questions, n={n}: a grid needs at least one of each.")
    return [place(lm, ask, length, split=split, seed=seed, sample=i) for i in range(n) for length in lengths for ask in asks]


MIX = (
    Ask("single"),
    Ask("multi", threads=3),
    Ask("conditional", threads=3),
    Ask("thread", steps=2),
    Ask("thread", steps=4),
    Ask("thread", steps=4, direction="backward"),
    Ask("multithread", steps=3, threads=2),
    Ask("branched", steps=3, branches=2),
)
"""Questions of every kind, with few enough steps for small models."""


def load(split: str = "test", n: int = 200, seed: int = 0, *, asks: Sequence[Ask] = MIX, n_pairs: int = 32) -> list[Problem]:
    """Return ``n`` problems with ``n_pairs`` pairs each. They cycle through the kinds of question in ``asks``. No model is needed.

    Raises:
        ThreadError: no question, or a question that needs more than ``n_pairs`` pairs.
        ValueError: unknown split.
    """
    if not asks:
        raise ThreadError("No questions: give asks=[Ask(...), ...].")
    return [problem(kv_haystack(asks[i % len(asks)], n_pairs, split=split, seed=seed, sample=i)) for i in range(n)]


# --- effective context length --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ContextLength:
    """The size of a haystack at which accuracy falls below a threshold.

    Attributes:
        size: The size, in the unit of the sizes that were measured.
        reached: ``"crossed"``: accuracy falls below the threshold at ``size``. ``"never"``: accuracy is below the threshold even at the
            smallest size measured, and ``size`` is 0. ``"always"``: accuracy is at or above the threshold at all sizes measured, and
            ``size`` is the largest of them.
    """

    size: float
    reached: Literal["crossed", "never", "always"]


def effective_context_length(accuracy: Mapping[int, float], threshold: float = 0.75) -> ContextLength:
    """Return the first size at which accuracy falls below ``threshold``, interpolated linearly between the sizes measured.

    Args:
        accuracy: Size -> share of right answers, 0 to 1. The paper measures size in characters (``meta["characters"]``); other units work.
        threshold: Smallest accuracy at which a size counts as usable, 0 to 1.

    >>> effective_context_length({100: 1.0, 200: 0.5})
    ContextLength(size=150.0, reached='crossed')
    """
    if not accuracy:
        raise ThreadError("No accuracies: give {size: share right}.")
    sizes = sorted(accuracy)
    if accuracy[sizes[0]] < threshold:
        return ContextLength(0.0, "never")
    for a, b in pairwise(sizes):
        if accuracy[b] < threshold:
            return ContextLength(a + (b - a) * (accuracy[a] - threshold) / (accuracy[a] - accuracy[b]), "crossed")
    return ContextLength(float(sizes[-1]), "always")
