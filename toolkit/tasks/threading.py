"""Questions about a JSON object of random keys and values: look up values, or follow *threads*, in which each value is the next key.

After Needle Threading (Roberts et al., arXiv 2411.05000). The JSON object is called a *haystack*. The pairs that an answer depends on are
the *needed* pairs. As keys and values are random, answers cannot be guessed. The kinds of question are:

- ``single``: the value of one key;
- ``multi``: the values of several keys;
- ``conditional``: the values of all keys that contain the marker ``*``;
- ``thread``: the last value of a thread of 1 to 25 steps, which begins at a given key;
- ``multithread``: the last values of several threads;
- ``branched``: as ``thread``, but some keys occur several times, so that the thread splits into branches. The question asks for the last
  value of the longest branch.

Deviations: keys and values have four characters by default (at least one of them a digit), since small models have small contexts.
``ids="uuid"`` gives UUIDs as in the paper. The JSON is on one line, and the wording is ours.

``locate`` returns the token spans of the needed pairs as a ``Haystack`` (``haystack.py``).

Units: sizes are in pairs, or in tokens of the whole chat prompt. A depth is the share of all pairs that come before the pair asked about,
0 to 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from toolkit import stats
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
    "context_length_interval",
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
    """Return the text of the question about ``drawn``, random pairs of key and value from ``pairs.kv_haystack``."""
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
    """Return a key and its value as JSON text, ``"key": "value"``."""
    return f'"{key}": "{value}"'


def message(drawn: Pairs, *, bare: bool = False) -> tuple[str, list[tuple[int, int]]]:
    """Return the user's message: a JSON object of keys and values, and a question about it. Also return each pair's place in the message.

    The places are character ranges ``(start, stop)``, one per pair in the message.

    Args:
        drawn: The pairs of key and value, and the kind of question, from ``pairs.kv_haystack``.
        bare: If True, leave out the pairs that the answer depends on.
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
    """Return a problem whose prompt is a JSON object of random keys and values, and a question about it.

    An answer is right if it gives the right values in the right order. For the kind ``conditional``, any order is right. ``grading.grade``
    describes both comparisons (``"identifiers"`` and ``"identifier set"``).

    Args:
        drawn: The pairs of key and value, and the kind of question, from ``pairs.kv_haystack``.
        length: Prompt length in tokens that was requested, to record in ``meta``; ``None`` if no length was requested.
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
    """Locate the *needed* pairs of key and value, those that the answer depends on. Return a Haystack: the problem with their token spans.

    The Haystack also has the token spans of the answer and of the question. The needed pairs are in the order in which a solver uses them.
    A *thread* is a chain of pairs in which each value is the next key. Each thread is followed to its end before the next one begins.

    Args:
        drawn: The pairs of key and value, and the kind of question, from ``pairs.kv_haystack``.
        length: Prompt length in tokens that was requested, to record in ``meta``; ``None`` if no length was requested.

    Raises:
        NoOffsetsError: the tokenizer gives no character offsets, or the prompt's text does not tokenize to the prompt's token ids.
        MissingTextError: the chat template changes the message, or the tokens of a pair do not decode to its text.
    """
    text, places = message(drawn)
    # The last pair of each thread holds an answer. Its value is followed by a quote, hence the -1 below.
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
    """Draw a JSON object with as many random pairs of key and value as fit into ``length`` tokens, and a question about it.

    Return a Haystack: the problem, with the token spans of the pairs that the answer depends on, of the answer and of the question.

    Args:
        ask: Kind of question, with its settings such as the number of steps.
        length: Largest number of tokens of the chat prompt.
        split: ``"train"``, ``"dev"`` or ``"test"``. A hash of the keys and values that the answer depends on decides the split.
        seed: Seed of the draw.
        sample: Index of the draw, from 0. With the other arguments equal, each index gives a different JSON object.

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
    for _ in range(8):  # at most 8 corrections; the loop below makes sure that it fits
        more = math.floor((length - size(n)) / each)
        n = max(least, n + more)
        if more == 0:
            break
    while size(n) > length:
        n -= 1
    return locate(lm, kv_haystack(ask, n, split=split, seed=seed, sample=sample), length=length)


def grid(lm: LM, lengths: Sequence[int], asks: Sequence[Ask], *, split: str = "test", n: int = 1, seed: int = 0) -> list[Haystack]:
    """Return ``n`` questions about random JSON objects (Haystacks, see ``place``) per combination of prompt length and kind of question.

    ``haystack.grid_cells(haystacks, "steps")`` makes a table of their lengths, depths and numbers of steps.

    Args:
        lengths: Prompt lengths in tokens.
        asks: Kinds of question. To vary the depth: ``[Ask("single", depth=d) for d in needle.DEPTHS]``. To vary the number of steps:
            ``[Ask("thread", steps=s) for s in (1, 2, 4, 8)]``.
        split: ``"train"``, ``"dev"`` or ``"test"``. A hash of the keys and values that the answer depends on decides the split.
        n: Number of questions per combination, each about another JSON object.

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
"""Questions of every kind, with few steps, for small models."""


def load(split: str = "test", n: int = 200, seed: int = 0, *, asks: Sequence[Ask] = MIX, n_pairs: int = 32) -> list[Problem]:
    """Return ``n`` questions about random JSON objects with ``n_pairs`` pairs of key and value each. No model is needed.

    Args:
        asks: Kinds of question (``Ask``). The problems cycle through them.

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
    """The prompt size at which accuracy falls below a threshold, as ``effective_context_length`` returns it.

    Attributes:
        size: The size, in the unit of the sizes that were measured.
        reached: What ``size`` means. ``"crossed"``: accuracy falls below the threshold there. ``"never"``: accuracy is below the threshold
            even at the smallest size measured; ``size`` is 0. ``"always"``: accuracy is at or above the threshold at all sizes measured;
            ``size`` is the largest of them.
    """

    size: float
    reached: Literal["crossed", "never", "always"]


def effective_context_length(accuracy: Mapping[int, float], threshold: float = 0.75) -> ContextLength:
    """Return the smallest prompt size at which accuracy falls below ``threshold``, interpolated linearly between the sizes measured.

    If accuracy is below ``threshold`` even at the smallest size, or never falls below it, the field ``reached`` of the result says so (see
    ``ContextLength``).

    Args:
        accuracy: Prompt size -> share of right answers, 0 to 1. Needle Threading (arXiv 2411.05000) measures size in characters
            (``meta["characters"]`` of a Haystack's problem); any unit works.
        threshold: Smallest accuracy at which a model counts as using a context of this size, 0 to 1.

    Raises:
        ThreadError: ``accuracy`` is empty.

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


def context_length_interval(
    right: Mapping[int, Sequence[bool]], threshold: float = 0.75, *, seed: int = 0, times: int = stats.RESAMPLES
) -> stats.Estimate:
    """Return the effective context length with a 95 % bootstrap interval that resamples the problems of every size.

    It is 0 if accuracy is below ``threshold`` even at the smallest size, and the largest size if it never falls below it. An end of the
    interval at one of these values thus says only that the length lies beyond the sizes measured.

    Args:
        right: Prompt size -> one flag per problem, True for a right answer.
        threshold: Smallest accuracy at which a model counts as using a context of this size, 0 to 1.
        seed: Seed of the bootstrap.
        times: Number of resamples.

    Raises:
        ThreadError: there is no size, or a size without problems.
    """
    if not right or not all(len(flags) for flags in right.values()):
        raise ThreadError(f"{[len(flags) for flags in right.values()]} answers per size: give at least one for every size.")
    point = effective_context_length({size: float(np.mean(flags)) for size, flags in right.items()}, threshold)
    drawn = {
        size: stats.mean_of(np.array(flags, float)[:, None])(stats.resamples(len(flags), seed=seed + i, times=times))
        for i, (size, flags) in enumerate(right.items())
    }
    resampled = [effective_context_length({size: v[k] for size, v in drawn.items()}, threshold).size for k in range(times)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return stats.Estimate(point.size, float(low), float(high))
