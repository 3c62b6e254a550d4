"""Splits of problems: train, dev and test by a hash of the content, so that no problem is in two of them."""

from __future__ import annotations

from collections.abc import Callable

from toolkit.origins import digest
from toolkit.types import Problem

SPLITS = ("train", "dev", "test")

__all__ = ["SPLITS", "check_split", "digest", "distinct", "split_by_id", "split_of"]


def split_of(content: str) -> str:
    """Return the split of a generated problem, by a hash of its content: 80 % train, 10 % dev, 10 % test.

    Equal content is in the same split on every machine, so splits are disjoint.

    >>> split_of("17+5-9")
    'dev'
    """
    bucket = int(digest(content)[:8], 16) % 10
    return "train" if bucket < 8 else "dev" if bucket == 8 else "test"


def split_by_id(problem_id: str) -> str:
    """Return the split of a problem from a file or data set without splits, by a hash of its id: 50 % train, 10 % dev, 40 % test.

    The test share is large because such sources are small, and evaluation needs enough problems. A problem stays in its split when other
    problems are added or reordered.
    """
    # The prefix makes this hash independent of split_of.
    bucket = int(digest(f"split-{problem_id}")[:8], 16) % 10
    return "train" if bucket < 5 else "dev" if bucket == 5 else "test"


def distinct(draw: Callable[[], Problem], n: int) -> list[Problem]:
    """Call ``draw`` until it has returned ``n`` problems with different ids, and return these problems in the order drawn.

    Raises:
        ValueError: a thousand draws in a row gave no new problem, so there are probably fewer than ``n`` different ones.
    """
    problems: dict[str, Problem] = {}
    repeated = 0
    while len(problems) < n:
        p = draw()
        repeated = repeated + 1 if p.id in problems else 0
        problems.setdefault(p.id, p)
        if repeated == 1000:
            raise ValueError(
                f"Asked for {n} problems, found only {len(problems)} different ones: ask for fewer, or widen the ranges."
            )
    return list(problems.values())


def check_split(split: str) -> None:
    """Raise ValueError if ``split`` is not one of train, dev, test."""
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}: choose one of {', '.join(SPLITS)}.")
