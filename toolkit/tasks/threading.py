"""Threads of keys and values: haystacks of random identifiers, so that no answer can be guessed and each can be checked.

Needle Threading (Roberts et al., arXiv 2411.05000). A haystack is a JSON object of random keys and values. Kinds of question:

- ``single``: the value of one key; ``multi``: the values of several; ``conditional``: the values of all keys with a marker;
- ``thread``: from a key to its value, which is again a key, and so on for 1 to 25 steps; ``multithread``: several at once;
- ``branched``: keys of the thread occur more than once, and the longest branch is right.

Deviations: identifiers are short by default (four characters, one of them a digit), as small models have small contexts; ``"uuid"``
gives the paper's. The JSON is on one line, and the wording is ours. Needed pairs are located in the tokens of the prompt
(``haystack.py``).

Units: sizes are pairs, or tokens of the whole chat prompt; a depth is the share of the pairs before the needle, 0 to 1.
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
    """Return a pair as text."""
    return f'"{key}": "{value}"'


def message(drawn: Pairs, *, bare: bool = False) -> tuple[str, list[tuple[int, int]]]:
    """Return the user's message, and the characters ``[start, stop)`` of each pair in it.

    Args:
        bare: Leave out the needed pairs.
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
    """Return the problem of a haystack, graded by exact match of the identifiers (``toolkit.tasks.grading.grade``).

    Args:
        length: Prompt length in tokens, recorded in the meta.
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
    """Locate the needed pairs (in reading order) and the answer's values in the tokens of the model's chat prompt.

    Raises:
        NoOffsetsError, MissingTextError: see ``toolkit.tasks.haystack.token_spans``.
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
    """Return a located haystack of at most ``length`` tokens, with as many pairs as fit.

    Raises:
        ContextTooLongError: ``length`` is beyond the model's context.
        ContextTooShortError: the needed pairs and the question alone are longer than ``length``.
        ValueError: unknown split; otherwise as ``locate``.
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
    """Return ``n`` haystacks for every length and question; ``haystack.grid_cells(haystacks, "steps", ...)`` gives the cell of each.

    Args:
        asks: Questions. Over depths: ``[Ask("single", depth=d) for d in needle.DEPTHS]``; over steps: ``[Ask("thread", steps=s) for s in
            (1, 2, 4, 8)]``.

    Raises:
        ThreadError: no length, no question or no haystack; otherwise as ``place``.
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
"""One question of every kind, small enough for small models."""


def load(split: str = "test", n: int = 200, seed: int = 0, *, asks: Sequence[Ask] = MIX, n_pairs: int = 32) -> list[Problem]:
    """Return ``n`` problems of ``n_pairs`` pairs each, with the questions ``asks`` in turn. Needs no model.

    Errors as ``kv_haystack``.
    """
    if not asks:
        raise ThreadError("No questions: give asks=[Ask(...), ...].")
    return [problem(kv_haystack(asks[i % len(asks)], n_pairs, split=split, seed=seed, sample=i)) for i in range(n)]


# --- effective context length --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ContextLength:
    """The size at which accuracy falls below a threshold.

    Attributes:
        size: That size; 0 if accuracy is never above the threshold, the largest size if it always is.
        reached: ``"crossed"``, ``"never"`` or ``"always"``.
    """

    size: float
    reached: Literal["crossed", "never", "always"]


def effective_context_length(accuracy: Mapping[int, float], threshold: float = 0.75) -> ContextLength:
    """Return the first size at which accuracy falls below ``threshold``, interpolated linearly: the paper's contour.

    Args:
        accuracy: Size -> share of right answers. The paper's unit of size is characters: ``meta["characters"]``.

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
