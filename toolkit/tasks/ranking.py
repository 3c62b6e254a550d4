"""Listwise ranking: put passages in order of how much they say about a subject.

A passage says something about one or more subjects, for example "explains the mill, omits the river". The verb gives the relevance of the
passage for a question about the subject: *explains* 3, *describes* 2, *mentions* 1, *omits* 0. A passage that does not contain the subject
has relevance 0. So counting words, as BM25 does, finds the passages with the subject but cannot order them.

An answer lists all identifiers, the most relevant first: ``[3] > [1] > [2]``. It is right if no ranking has a higher NDCG. So passages of
equal relevance may be in any order.

Candidates are chosen from a generated corpus. ``bm25`` takes the passages that BM25 scores highest, in this order (extra ``search``).
``drawn`` takes passages at random, and at least one that is relevant. ``problem`` takes passages and relevance of your own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

import numpy as np

from toolkit.stats.rankings import written
from toolkit.tasks import splits
from toolkit.types import Problem

VERBS = ("omits", "mentions", "describes", "explains")
"""Verb -> relevance of a passage for the subject that follows it: the index in this list."""
SUBJECTS = (
    "mill", "river", "harbour", "bridge", "orchard", "market", "garden", "tower", "quarry", "ferry", "chapel", "museum",
    "forest", "canal", "castle", "school", "prison", "bakery", "stable", "cellar", "palace", "temple", "library", "station",
)  # fmt: skip
CANDIDATES, CORPUS, CLAUSES = 10, 60, (1, 3)  # per problem: passages in the prompt, passages in the corpus, subjects per passage

Retriever = Callable[[str, Sequence[str], int, random.Random], Sequence[int]]
"""Function ``(subject, corpus, number of candidates, random numbers) -> indices`` of the candidates, in the order of the prompt."""


class MissingBM25Error(ImportError):
    """The package bm25s is not installed."""


def corpus(rng: random.Random, n: int, clauses: tuple[int, int] = CLAUSES) -> list[str]:
    """Return ``n`` random passages.

    Args:
        rng: Source of every random choice.
        n: Number of passages.
        clauses: Smallest and largest number of subjects per passage.
    """
    if not 1 <= clauses[0] <= clauses[1] <= len(SUBJECTS):
        raise ValueError(f"clauses={clauses}: give an inclusive range of subjects per passage within 1 to {len(SUBJECTS)}.")
    return [", ".join(f"{rng.choice(VERBS)} the {s}" for s in rng.sample(SUBJECTS, rng.randint(*clauses))) for _ in range(n)]


def relevance(subject: str, passage: str) -> int:
    """Return the relevance of a generated passage for a subject, from 0 to 3.

    >>> relevance("river", "explains the mill, describes the river")
    2
    """
    verb = re.search(rf"(\w+) the {re.escape(subject)}\b", passage)
    return VERBS.index(verb[1]) if verb else 0


def best(relevance: Sequence[int]) -> list[int]:
    """Return the ranking with the most relevant passages first. Equally relevant ones keep their order.

    >>> best([0, 3, 1, 3])
    [1, 3, 2, 0]
    """
    return sorted(range(len(relevance)), key=lambda i: -relevance[i])


# --- candidates ----------------------------------------------------------------------------------------------


def drawn(subject: str, passages: Sequence[str], n: int, rng: random.Random) -> list[int]:
    """Return the indices of ``n`` random passages in random order. About half contain the subject, and at least one is relevant.

    Raises:
        ValueError: there are fewer than ``n`` passages, or none is relevant.
    """
    with_subject = [i for i, p in enumerate(passages) if re.search(rf"\b{re.escape(subject)}\b", p)]
    relevant = [i for i in with_subject if relevance(subject, passages[i])]
    if n > len(passages) or not relevant:
        raise ValueError(f"{len(passages)} passages, {len(relevant)} relevant ones: need {n} or more, and one that is relevant.")
    chosen = [rng.choice(relevant)]
    rest = [i for i in with_subject if i not in chosen]
    chosen += rng.sample(rest, min(max(0, n // 2 - 1), len(rest)))
    chosen += rng.sample([i for i in range(len(passages)) if i not in chosen], n - len(chosen))
    return rng.sample(chosen, n)


def bm25_scores(question: str, passages: Sequence[str]) -> np.ndarray:
    """Return the BM25 score of each passage for the words of ``question``, with the defaults of the package bm25s.

    Raises:
        MissingBM25Error: bm25s is not installed.
    """
    try:
        from bm25s import BM25
    except ImportError as error:
        raise MissingBM25Error("BM25 needs the package bm25s: pip install 'reasoning-length-toolkit[search]'") from error
    index = BM25()
    index.index([_words(p) for p in passages], show_progress=False)
    return np.asarray(index.get_scores(_words(question)))


def bm25(subject: str, passages: Sequence[str], n: int, rng: random.Random) -> list[int]:
    """Return the indices of the ``n`` passages that BM25 scores highest, the highest first. Equal scores are in random order.

    Raises:
        MissingBM25Error: bm25s is not installed.
        ValueError: there are fewer than ``n`` passages.
    """
    if n > len(passages):
        raise ValueError(f"{len(passages)} passages: {n} candidates need as many.")
    order, scores = rng.sample(range(len(passages)), len(passages)), bm25_scores(subject, passages)
    return sorted(order, key=lambda i: -scores[i])[:n]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


# --- problems ------------------------------------------------------------------------------------------------


def message(subject: str, passages: Sequence[str]) -> str:
    """Return the prompt: the instruction, then the numbered passages."""
    listed = "\n".join(f"[{i}] {p}" for i, p in enumerate(passages, 1))
    return (
        f"Rank these {len(passages)} passages by how much they say about the subject {subject!r}. A passage that explains the subject says "
        "more than one that describes it, and that says more than one that mentions it. A passage that omits it says nothing.\n"
        f"{listed}\nAnswer with all identifiers, the most relevant first, such as [2] > [1]."
    )


def problem(subject: str, passages: Sequence[str], relevance: Sequence[int], *, split: str | None = None) -> Problem:
    """Return one problem: rank ``passages`` for ``subject``. Its gold answer is the best ranking.

    Args:
        subject: What the passages should be about.
        passages: The candidates, in the order of the prompt.
        relevance: Relevance of each passage, 0 or more; at least one above 0.
        split: Split to record in ``meta``. Default: the split given by a hash of subject and passages.

    Raises:
        ValueError: fewer than two passages, not one relevance per passage, or no passage is relevant.
    """
    if len(passages) < 2 or len(relevance) != len(passages) or min(relevance) < 0 or max(relevance) == 0:
        raise ValueError(
            f"{len(passages)} passages with relevance {list(relevance)[:20]}: give two or more, a number of 0 or more for each, and at "
            "least one above 0."
        )
    content = message(subject, passages)
    meta = {
        "task": "ranking",
        "split": split or splits.split_of(content),
        "difficulty": len(passages),
        "grader": "ranking",
        "subject": subject,
        "passages": list(passages),
        "relevance": list(relevance),
    }
    name = f"ranking-{splits.digest(content)}"
    return Problem(name, ({"role": "user", "content": content},), written(best(relevance)), meta)


def load(
    split: str = "test",
    n: int = 200,
    seed: int = 0,
    *,
    candidates: int = CANDIDATES,
    clauses: tuple[int, int] = CLAUSES,
    retrieve: Retriever = drawn,
) -> list[Problem]:
    """Return ``n`` different problems of ``split`` ("train", "dev" or "test"). Equal seeds give equal problems.

    Each problem has a corpus of its own, of 60 passages, or of as many as there are candidates if these are more. A hash of subject and
    candidates decides the split.

    Args:
        candidates: Passages per problem, 2 or more.
        clauses: Fewest and most subjects per passage.
        retrieve: Chooses the candidates: ``drawn`` at random, or ``bm25``.

    Raises:
        ValueError: unknown split, fewer than 2 candidates, an impossible range of clauses, or fewer than ``n`` different problems.
        MissingBM25Error: ``retrieve`` is ``bm25``, and bm25s is not installed.
    """
    splits.check_split(split)
    if candidates < 2:
        raise ValueError(f"candidates={candidates}: a ranking needs 2 passages or more.")
    rng = random.Random(f"ranking-{split}-{seed}")

    def draw() -> Problem:
        while True:
            subject, passages = rng.choice(SUBJECTS), corpus(rng, max(CORPUS, candidates), clauses)
            if not any(relevance(subject, p) for p in passages):
                continue
            chosen = [passages[i] for i in retrieve(subject, passages, candidates, rng)]
            grades = [relevance(subject, p) for p in chosen]
            if any(grades) and splits.split_of(message(subject, chosen)) == split:
                return problem(subject, chosen, grades)

    return splits.distinct(draw, n)
