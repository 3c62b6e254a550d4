"""The same facts asked one at a time and several at once: do short and long answers agree? SLAQ (arXiv 2510.11218).

A *pair* is a long question that joins m questions, and the m short ones. F_S and F_L are the shares of facts right when asked singly
and together, alignment the share of facts both right or both wrong. The paper finds that accuracy falls with the position in the long
answer, and that right answers come in streaks ("momentum").

Deviations: the paper asks what a model knows and has a language model judge; here facts may be told in the prompt (:func:`invented`:
codes of made-up owners, among codes that nobody asks for), so that every answer is checked by its words (``grading.facts_right``), and
the same check judges short and long.

Units: shares 0 to 1; a position is a fact's place in the long answer, from 0.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from toolkit.tasks import grading, splits
from toolkit.types import Problem

M = 5  # facts of a long question, the paper's

_THINGS = (
    "archive", "bakery", "bridge", "cellar", "chapel", "dairy", "depot", "ferry", "forge", "garden", "harbour", "hostel", "kiosk", "lodge",
    "market", "mill", "museum", "orchard", "palace", "quarry", "school", "stable", "studio", "temple", "theatre", "tower", "vault", "well",
)  # fmt: skip
_COLOURS = ("amber", "azure", "black", "brown", "crimson", "green", "grey", "orange", "purple", "silver", "white", "yellow")
OWNERS = tuple(f"{colour} {thing}" for colour in _COLOURS for thing in _THINGS)
CODES = range(1000, 10_000)


@dataclass(frozen=True)
class Fact:
    """A question with its answer.

    Attributes:
        ask: The question, e.g. "What is the code of the grey mill?".
        answer: The words that a right answer holds.
        tell: A sentence with the answer, for the prompt; ``""``: the model has to know it.
    """

    ask: str
    answer: str
    tell: str = ""


@dataclass(frozen=True)
class ShortLong:
    """A long question and the short ones it joins, in its order."""

    long: Problem
    short: tuple[Problem, ...]

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All of them, the long one first: what is to be sampled."""
        return (self.long, *self.short)


@dataclass(frozen=True)
class Alignment:
    """Shares of facts: right when asked singly (``short``) and together (``long``), and how the two agree."""

    short: float
    long: float
    aligned: float
    both_right: float
    both_wrong: float


# --- prompts -------------------------------------------------------------------------------------------------


def short_long_pairs(
    facts: Sequence[Fact], m: int = M, seed: int = 0, *, split: str | None = None, noise: Sequence[Fact] = ()
) -> list[ShortLong]:
    """Groups of ``m`` facts as pairs of one long and ``m`` short questions; facts left over are not used.

    Args:
        facts: Dealt out in an order drawn from the seed. Those told in the prompt stand there in another order than they are asked in.
        noise: Facts told in every prompt and asked in none.

    Raises:
        ValueError: fewer than ``m`` facts, ``m`` below 2, or a question that has two answers.
    """
    if m < 2 or len(facts) < m:
        raise ValueError(f"{len(facts)} facts, m={m}: a pair needs m facts, and m of 2 or more.")
    told: dict[str, str] = {}
    for fact in (*facts, *noise):
        if told.setdefault(fact.ask, fact.answer) != fact.answer:
            raise ValueError(f"{fact.ask!r} has two answers, {told[fact.ask]!r} and {fact.answer!r}: give each question one.")
    rng = random.Random(f"slaq-{seed}")
    order = rng.sample(list(facts), len(facts))
    return [_pair(order[i : i + m], noise, rng, split) for i in range(0, len(order) - m + 1, m)]


def _pair(group: Sequence[Fact], noise: Sequence[Fact], rng: random.Random, split: str | None) -> ShortLong:
    shown = [fact for fact in (*group, *noise) if fact.tell]
    rng.shuffle(shown)
    name = f"slaq-{splits.digest(repr((group, shown)))}"
    split = split or splits.split_of(repr(sorted(fact.ask for fact in group)))
    short = tuple(_problem(f"{name}-{i}", [fact], shown, split, position=i) for i, fact in enumerate(group))
    return ShortLong(_problem(name, group, shown, split, position=None), short)


def _problem(name: str, asked: Sequence[Fact], shown: Sequence[Fact], split: str, *, position: int | None) -> Problem:
    text, ranges = "", {}
    for fact in shown:
        text += " " * bool(text)
        ranges[fact] = (len(text), len(text) + len(fact.tell))
        text += fact.tell
    text += "\n\n" * bool(text)
    start = len(text)
    if len(asked) == 1:
        text += f"{asked[0].ask} Answer with it only."
    else:
        numbered = "\n".join(f"{i}. {fact.ask}" for i, fact in enumerate(asked, 1))
        text += f"Answer all {len(asked)} questions, each on a numbered line of its own, with the answer only.\n{numbered}"
    meta = {
        "task": "slaq",
        "split": split,
        "difficulty": len(asked),
        "grader": "facts",
        "pair": name.rsplit("-", 1)[0] if position is not None else name,
        "position": position,
        "golds": tuple(fact.answer for fact in asked),
        "wrong": tuple(dict.fromkeys(fact.answer for fact in shown)),
        "needed": tuple(ranges[fact] for fact in asked if fact in ranges),
        "query": (start, len(text)),
    }
    return Problem(name, ({"role": "user", "content": text},), "\n".join(fact.answer for fact in asked), meta)


def invented(rng: random.Random, owners: Sequence[str]) -> list[Fact]:
    """Facts nobody knows: a four-digit code for each owner ("grey mill"), all different.

    Raises:
        ValueError: an owner twice, none, or more than there are codes.
    """
    if not 1 <= len(owners) <= len(CODES) or len(set(owners)) != len(owners):
        raise ValueError(f"{len(owners)} owners, {len(set(owners))} different: give 1 to {len(CODES)}, each once.")
    codes = rng.sample(CODES, len(owners))
    return [
        Fact(f"What is the code of the {owner}?", str(code), f"The code of the {owner} is {code}.")
        for owner, code in zip(owners, codes, strict=True)
    ]


def pairs(split: str = "test", n: int = 40, seed: int = 0, *, m: int = M, noise: int = 10) -> list[ShortLong]:
    """``n`` pairs about invented facts, the same ones for the same seed. An owner is asked about in one split only.

    Args:
        noise: Facts told in a prompt beside those asked.

    Raises:
        ValueError: unknown split, ``m`` below 2, negative noise, or more facts than owners.
    """
    splits.check_split(split)
    own = [owner for owner in OWNERS if splits.split_of(owner) == split]
    if not 2 <= m <= len(own) or not 0 <= noise <= len(OWNERS) - m:
        raise ValueError(
            f"m={m}, noise={noise}: need m from 2 to {len(own)} (owners of split {split!r}), and noise from 0 to {len(OWNERS) - m}."
        )
    rng = random.Random(f"slaq-{split}-{seed}")
    found: list[ShortLong] = []
    for _ in range(n):
        asked = rng.sample(own, m)
        others = rng.sample([owner for owner in OWNERS if owner not in asked], noise)
        facts = invented(rng, asked + others)
        found += short_long_pairs(facts[:m], m, rng.randrange(2**32), split=split, noise=facts[m:])
    return found


def load(split: str = "test", n: int = 200, seed: int = 0, *, m: int = M, noise: int = 10) -> list[Problem]:
    """``n`` problems of :func:`pairs`, pair after pair, each long question before its short ones; the last pair may be cut off.
    Errors as :func:`pairs`."""
    found = pairs(split, math.ceil(n / max(1, m + 1)), seed, m=m, noise=noise)
    return [p for pair in found for p in pair.problems][:n]


# --- scores --------------------------------------------------------------------------------------------------


def right(problem: Problem, text: str) -> tuple[bool, ...]:
    """Whether an answer (without thinking) gives each fact asked for, in the order asked. ValueError for other tasks' problems."""
    if "golds" not in problem.meta:
        raise ValueError(f"{problem.id} is of task {problem.meta.get('task')!r}: give a problem of slaq.draw_pairs or slaq.load.")
    return grading.facts_right(problem.meta["golds"], problem.meta["wrong"], text)


def alignment_scores(short: Sequence[bool], long: Sequence[bool]) -> Alignment:
    """F_S, F_L and alignment of facts asked singly and together, one entry a fact in both.

    Raises:
        ValueError: no fact, or not the same number in both.
    """
    a, b = np.asarray(short, bool).ravel(), np.asarray(long, bool).ravel()
    if not len(a) or len(a) != len(b):
        raise ValueError(f"{len(a)} short and {len(b)} long answers: give one of each for every fact, and one fact at least.")
    return Alignment(*(float(share.mean()) for share in (a, b, a == b, a & b, ~a & ~b)))


def by_position(short: Sequence[Sequence[bool]], long: Sequence[Sequence[bool]]) -> pd.DataFrame:
    """Accuracy at each position of the long answer. One row of booleans a pair.

    Columns: ``position, n, short, long, aligned``, and ``after_right``, ``after_wrong``: accuracy in the long answer after a fact that
    was right or wrong (NaN where none was). Momentum is that the first is the higher.

    Raises:
        ValueError: no pair, or rows of different lengths.
    """
    a, b = list(map(tuple, short)), list(map(tuple, long))
    if not a or len({len(row) for row in (*a, *b)}) != 1 or len(a) != len(b):
        raise ValueError(
            f"{len(a)} short and {len(b)} long rows of lengths {sorted({len(row) for row in (*a, *b)})}: give a row of the same length in "
            "both for every pair, and one pair at least."
        )
    s, x = np.array(a, bool), np.array(b, bool)

    def after(t: int, before: bool) -> float:
        rows = x[:, t - 1] == before if t else np.zeros(len(x), bool)
        return float(x[rows, t].mean()) if rows.any() else math.nan

    columns = ["position", "n", "short", "long", "aligned", "after_right", "after_wrong"]
    rows = [
        (t, len(x), s[:, t].mean(), x[:, t].mean(), (s[:, t] == x[:, t]).mean(), after(t, True), after(t, False))
        for t in range(x.shape[1])
    ]
    return pd.DataFrame(rows, columns=columns)
