"""Problems by name: ``tasks.load("arithmetic", "test", n=200, seed=0)``.

``tiny`` is the tiny reasoner's own mix (three quarters arithmetic, one quarter lookup); ``gsm8k`` and ``math500`` come
through the ``datasets`` library or a local file with the same columns; anything else is a path to a JSONL file of problems.
"""

from __future__ import annotations

from pathlib import Path

from toolkit import store
from toolkit.tasks import arithmetic, lookup, mathematics
from toolkit.types import Problem

NAMES = ("tiny", "arithmetic", "lookup", "gsm8k", "math500")


def load(name: str, split: str = "test", n: int = 200, seed: int = 0) -> list[Problem]:
    """``n`` problems of a task's split; the same ones for the same seed.

    Raises:
        ValueError: unknown split, or a name that is neither a task nor a file; lists the tasks.
    """
    match name:
        case "tiny":
            few = n // 4
            return arithmetic.load(split, n - few, seed) + lookup.load(split, few, seed)
        case "arithmetic":
            return arithmetic.load(split, n, seed)
        case "lookup":
            return lookup.load(split, n, seed)
        case "gsm8k":
            return mathematics.gsm8k(split, n, seed)
        case "math500":
            return mathematics.math500(split, n, seed)
    if not Path(name).is_file():
        raise ValueError(f"Unknown task {name!r}: choose one of {', '.join(NAMES)}, or give a JSONL file of problems.")
    return store.load_problems(name)[:n]
