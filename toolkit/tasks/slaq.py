"""Short questions about single facts, and one long question about all of them: do the answers agree? After SLAQ (arXiv 2510.11218).

A *pair* is one long question that joins m short questions, together with these m short questions. F_S is the share of facts answered
correctly when asked in short questions, F_L the share when asked in the long question. Alignment is the share of facts that are right in
both answers or wrong in both. The paper finds that accuracy falls with the position in the long answer, and that right answers come in
streaks ("momentum").

Deviations: the paper tests what a model knows from training, and uses a language model as judge. Here a prompt may contain the facts that
its questions ask about, and further facts that no question asks about. ``invented`` makes up such facts. Answers are checked by comparing
words (``grading.facts_right``), not by a language model.

Units: shares are from 0 to 1; a position is a fact's index in the long answer, from 0.
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

M = 5  # facts per long question, as in the paper

_THINGS = (
    "archive", "bakery", "bridge", "cellar", "chapel", "dairy", "depot", "ferry", "forge", "garden", "harbour", "hostel", "kiosk", "lodge",
    "market", "mill", "museum", "orchard", "palace", "quarry", "school", "stable", "studio", "temple", "theatre", "tower", "vault", "well",
)  # fmt: skip
_COLOURS = ("amber", "azure", "black", "brown", "crimson", "green", "grey", "orange", "purple", "silver", "white", "yellow")
OWNERS = tuple(f"{colour} {thing}" for colour in _COLOURS for thing in _THINGS)
CODES = range(1000, 10_000)


@dataclass(frozen=True)
class Fact:
    """A fact: a question, its answer, and optionally a sentence for the prompt that gives the answer.

    Attributes:
        ask: The question, e.g. "What is the code of the grey mill?".
        answer: Words that a right answer contains, e.g. "1234".
        tell: Sentence for the prompt, e.g. "The code of the grey mill is 1234.". If it is ``""``, the prompt does not give the answer,
            and the question tests what the model knows.
    """

    ask: str
    answer: str
    tell: str = ""


@dataclass(frozen=True)
class ShortLong:
    """A *pair*: a long question about several facts, and the short questions that it joins.

    Attributes:
        long: The long question.
        short: The short questions, in the order in which the long question has them.
    """

    long: Problem
    short: tuple[Problem, ...]

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The long question, then the short ones."""
        return (self.long, *self.short)


@dataclass(frozen=True)
class Alignment:
    """Accuracy of short and long answers about the same facts, and their agreement. Every field is a share of these facts, from 0 to 1.

    Attributes:
        short: Share of facts answered correctly when asked alone, in a short question (F_S).
        long: Share of facts answered correctly when asked as part of one long question (F_L).
        aligned: Share of facts that are right in both answers or wrong in both.
        both_right: Share of facts that are right in both answers.
        both_wrong: Share of facts that are wrong in both answers.
    """

    short: float
    long: float
    aligned: float
    both_right: float
    both_wrong: float


# --- prompts -------------------------------------------------------------------------------------------------


def short_long_pairs(
    facts: Sequence[Fact], m: int = M, seed: int = 0, *, split: str | None = None, noise: Sequence[Fact] = ()
) -> list[ShortLong]:
    """Split facts into groups of ``m``, and return one *pair* per group: ``m`` short questions, and one long question that joins them.

    All prompts of a pair begin with the same sentences: those that state the facts of the group and of ``noise`` (``Fact.tell``). The order
    of the sentences is random, so that it is not the order of the questions.

    Args:
        facts: Facts to ask about. They are shuffled before they are grouped. Facts that are left over (fewer than ``m``) are not used.
        m: Facts per group, so questions per long question.
        seed: Seed of the shuffling.
        split: Split to record in ``meta``. Default: the split given by a hash of the group's questions.
        noise: Additional facts that every prompt states but no question asks about.

    Raises:
        ValueError: fewer than ``m`` facts, ``m`` below 2, or two facts that give the same question different answers.
    """
    if m < 2 or len(facts) < m:
        raise ValueError(f"{len(facts)} facts, m={m}: a pair needs m facts, and m of 2 or more.")
    answers: dict[str, str] = {}
    for fact in (*facts, *noise):
        if answers.setdefault(fact.ask, fact.answer) != fact.answer:
            raise ValueError(f"{fact.ask!r} has two answers, {answers[fact.ask]!r} and {fact.answer!r}: give each question one.")
    rng = random.Random(f"slaq-{seed}")
    order = rng.sample(list(facts), len(facts))
    return [_pair(order[i : i + m], noise, rng, split) for i in range(0, len(order) - m + 1, m)]


def _pair(group: Sequence[Fact], noise: Sequence[Fact], rng: random.Random, split: str | None) -> ShortLong:
    stated = [fact for fact in (*group, *noise) if fact.tell]
    rng.shuffle(stated)
    name = f"slaq-{splits.digest(repr((group, stated)))}"
    split = split or splits.split_of(repr(sorted(fact.ask for fact in group)))
    short = tuple(_problem(f"{name}-{i}", [fact], stated, split, position=i) for i, fact in enumerate(group))
    return ShortLong(_problem(name, group, stated, split, position=None), short)


def _problem(name: str, questions: Sequence[Fact], stated: Sequence[Fact], split: str, *, position: int | None) -> Problem:
    text, ranges = "", {}  # ranges: fact -> character range of its sentence in the prompt
    for fact in stated:
        text += " " * bool(text)
        ranges[fact] = (len(text), len(text) + len(fact.tell))
        text += fact.tell
    text += "\n\n" * bool(text)
    start = len(text)
    if len(questions) == 1:
        text += f"{questions[0].ask} Answer with it only."
    else:
        numbered = "\n".join(f"{i}. {fact.ask}" for i, fact in enumerate(questions, 1))
        text += f"Answer all {len(questions)} questions, each on a numbered line of its own, with the answer only.\n{numbered}"
    meta = {
        "task": "slaq",
        "split": split,
        "difficulty": len(questions),
        "grader": "facts",
        "pair": name.rsplit("-", 1)[0] if position is not None else name,
        "position": position,
        "golds": tuple(fact.answer for fact in questions),
        "wrong": tuple(dict.fromkeys(fact.answer for fact in stated)),
        "needed": tuple(ranges[fact] for fact in questions if fact in ranges),
        "query": (start, len(text)),
    }
    return Problem(name, ({"role": "user", "content": text},), "\n".join(fact.answer for fact in questions), meta)


def invented(rng: random.Random, owners: Sequence[str]) -> list[Fact]:
    """Return one made-up fact per owner: a four-digit code that "belongs" to it. All codes differ.

    Args:
        owners: Names of the things that have a code, such as "grey mill". There are 9000 codes.

    Raises:
        ValueError: no owner, an owner given twice, or more owners than codes.
    """
    if not 1 <= len(owners) <= len(CODES) or len(set(owners)) != len(owners):
        raise ValueError(f"{len(owners)} owners, {len(set(owners))} different: give 1 to {len(CODES)}, each once.")
    codes = rng.sample(CODES, len(owners))
    return [
        Fact(f"What is the code of the {owner}?", str(code), f"The code of the {owner} is {code}.")
        for owner, code in zip(owners, codes, strict=True)
    ]


def draw_pairs(split: str = "test", n: int = 40, seed: int = 0, *, m: int = M, noise: int = 10) -> list[ShortLong]:
    """Return ``n`` *pairs*, each made of ``m`` short questions and one long question that joins them. Equal seeds give equal pairs.

    The questions are about made-up facts: codes of things such as "grey mill" (``OWNERS``). All questions about a thing are in one split.

    Args:
        m: Facts per long question.
        noise: Number of additional facts that each prompt states but no question asks about.

    Raises:
        ValueError: unknown split, ``m`` below 2, negative ``noise``, or ``m`` or ``noise`` so large that ``OWNERS`` has too few things.
    """
    splits.check_split(split)
    owners = [owner for owner in OWNERS if splits.split_of(owner) == split]
    if not 2 <= m <= len(owners) or not 0 <= noise <= len(OWNERS) - m:
        raise ValueError(
            f"m={m}, noise={noise}: need m from 2 to {len(owners)} (owners of split {split!r}), and noise from 0 to {len(OWNERS) - m}."
        )
    rng = random.Random(f"slaq-{split}-{seed}")
    pairs: list[ShortLong] = []
    for _ in range(n):
        chosen = rng.sample(owners, m)
        # The additional facts may be about things of any split, since no question asks about them.
        others = rng.sample([owner for owner in OWNERS if owner not in chosen], noise)
        facts = invented(rng, chosen + others)
        pairs += short_long_pairs(facts[:m], m, rng.randrange(2**32), split=split, noise=facts[m:])
    return pairs


def load(split: str = "test", n: int = 200, seed: int = 0, *, m: int = M, noise: int = 10) -> list[Problem]:
    """Return ``n`` questions about made-up facts: each long question, followed by the ``m`` short questions that it joins.

    They are from ``draw_pairs``. The list is cut after ``n`` questions, so the last long question may lack some of its short ones.

    Args:
        m: Facts per long question.
        noise: Number of additional facts that each prompt states but no question asks about.

    Raises:
        ValueError: unknown split, ``m`` below 2, negative ``noise``, or ``m`` or ``noise`` so large that ``OWNERS`` has too few things.
    """
    pairs = draw_pairs(split, math.ceil(n / max(1, m + 1)), seed, m=m, noise=noise)
    return [p for pair in pairs for p in pair.problems][:n]


# --- scores --------------------------------------------------------------------------------------------------


def judge_answer(problem: Problem, text: str) -> tuple[bool, ...]:
    """Return one flag per question in a problem, in order: True if the question is answered correctly.

    The answer is split into one part per question. A part is correct if it contains the fact's answer and the answer of no other fact in
    the prompt.

    Args:
        problem: A long or a short question.
        text: The whole answer, without the thinking.

    Raises:
        ValueError: a problem of another task.
    """
    if "golds" not in problem.meta:
        raise ValueError(f"{problem.id} is of task {problem.meta.get('task')!r}: give a problem of slaq.draw_pairs or slaq.load.")
    return grading.facts_right(problem.meta["golds"], problem.meta["wrong"], text)


def alignment_scores(short: Sequence[bool], long: Sequence[bool]) -> Alignment:
    """Compare answers to short questions with answers to long questions about the same facts.

    Return the accuracy of each (F_S, F_L), and the share of facts that are right in both answers or wrong in both (``aligned``).

    Args:
        short: One flag per fact: whether the answer to its short question is right.
        long: One flag per fact, in the same order: whether its part of the answer to the long question is right.

    Raises:
        ValueError: no facts, or flags for different numbers of facts.

    >>> alignment_scores([True, True, False, False], [True, False, False, False]).aligned
    0.75
    """
    a, b = np.asarray(short, bool).ravel(), np.asarray(long, bool).ravel()
    if not len(a) or len(a) != len(b):
        raise ValueError(f"{len(a)} short and {len(b)} long answers: give one of each for every fact, and at least one fact.")
    return Alignment(*(float(share.mean()) for share in (a, b, a == b, a & b, ~a & ~b)))


def by_position(short: Sequence[Sequence[bool]], long: Sequence[Sequence[bool]]) -> pd.DataFrame:
    """Return the accuracy of short and long answers by position, one row per position of a fact in the long answer.

    A *pair* is one long question and the short questions that it joins.

    Args:
        short: Per pair, one flag per fact, in the order of the long question: True if the answer to its short question is right.
        long: Per pair, one flag per fact, in the same order: True if its part of the answer to the long question is right.

    Returns:
        A table with these columns. ``position``: from 0. ``n``: number of pairs. ``short``: share of right short answers. ``long``: share
        of right parts of long answers. ``aligned``: share of facts that are right in both or wrong in both. ``after_right``: as ``long``,
        but only for pairs whose long answer is right at the previous position. ``after_wrong``: the same if it is wrong there. The last
        two are NaN if there is no such pair. The paper's *momentum* means that ``after_right`` is higher than ``after_wrong``.

    Raises:
        ValueError: no pairs; ``short`` and ``long`` differ in their number of pairs; or pairs differ in their number of facts.
    """
    a, b = list(map(tuple, short)), list(map(tuple, long))
    if not a or len({len(row) for row in (*a, *b)}) != 1 or len(a) != len(b):
        raise ValueError(
            f"{len(a)} short and {len(b)} long rows of lengths {sorted({len(row) for row in (*a, *b)})}: give a row of the same length in "
            "both for every pair, and at least one pair."
        )
    s, x = np.array(a, bool), np.array(b, bool)  # short and long, pairs x positions

    def after(t: int, before: bool) -> float:
        rows = x[:, t - 1] == before if t else np.zeros(len(x), bool)
        return float(x[rows, t].mean()) if rows.any() else math.nan

    columns = ["position", "n", "short", "long", "aligned", "after_right", "after_wrong"]
    rows = [
        (t, len(x), s[:, t].mean(), x[:, t].mean(), (s[:, t] == x[:, t]).mean(), after(t, True), after(t, False))
        for t in range(x.shape[1])
    ]
    return pd.DataFrame(rows, columns=columns)
