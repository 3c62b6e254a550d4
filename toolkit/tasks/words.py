"""Words that a prompt of the tiny reasoner may carry, and the split rule shared by its tasks."""

from __future__ import annotations

import random
from collections.abc import Callable

from toolkit.origins import digest
from toolkit.types import Problem

CUES = ("quick", "brief", "hurry")  # push towards short thinking
NEUTRAL = ("please", "today", "hello")  # push nowhere
SPLITS = ("train", "dev", "test")


def split_of(content: str) -> str:
    """The split a problem belongs to, by a hash of its content: 80 % train, 10 % dev, 10 % test.

    Splits are disjoint by construction: the same content falls in the same split on every machine.
    """
    bucket = int(digest(content)[:8], 16) % 10
    return "train" if bucket < 8 else "dev" if bucket == 8 else "test"


def own_split(problem_id: str) -> str:
    """The split of a problem that comes without one, by a hash of its id: 50 % train, 10 % dev, 40 % test.

    A file is small, and both the making and the judging need their share of it. Lines added or reordered move no other problem.
    """
    bucket = int(digest(f"split-{problem_id}")[:8], 16) % 10
    return "train" if bucket < 5 else "dev" if bucket == 5 else "test"


def distinct(draw: Callable[[], Problem], n: int) -> list[Problem]:
    """The first ``n`` distinct problems that ``draw`` gives.

    Raises:
        ValueError: a thousand draws in a row gave nothing new, so there are not so many.
    """
    found: dict[str, Problem] = {}
    repeated = 0
    while len(found) < n:
        p = draw()
        repeated = repeated + 1 if p.id in found else 0
        found.setdefault(p.id, p)
        if repeated == 1000:
            raise ValueError(f"Asked for {n} problems, found only {len(found)} different ones: ask for fewer, or widen the ranges.")
    return list(found.values())


def check_split(split: str) -> None:
    """Raise ValueError if ``split`` is not one of train, dev, test."""
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}: choose one of {', '.join(SPLITS)}.")


def with_word(content: str, rng: random.Random, *, cue_share: float = 0.3, neutral_share: float = 0.3) -> tuple[str, str]:
    """Put a cue word, a neutral word or nothing before or after ``content``; returns (prompt, word)."""
    u = rng.random()
    word = rng.choice(CUES) if u < cue_share else rng.choice(NEUTRAL) if u < cue_share + neutral_share else ""
    if not word:
        return content, word
    return (f"{word} {content}" if rng.random() < 0.5 else f"{content} {word}"), word
