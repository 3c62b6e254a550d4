"""Problems by name: ``tasks.load("arithmetic", "test", n=200, seed=0)``.

``tiny`` is the tiny reasoner's own mix (three quarters arithmetic, one quarter lookup), ``wordproblems`` the smol reasoner's;
``gsm8k`` and ``math500`` come through the ``datasets`` library or a local file with the same columns; ``needle`` is sized for a
model (``lm=...``), ``threading`` is not; anything else is a path to a JSONL file of problems.
"""

from __future__ import annotations

from pathlib import Path

from toolkit import store
from toolkit.lm import LM
from toolkit.tasks import arithmetic, backtracking, lookup, mathematics, needle, threading, wordproblems
from toolkit.types import Problem

NAMES = ("tiny", "arithmetic", "countdown", "lookup", "gsm8k", "math500", "needle", "threading", "wordproblems")


def check(name: str) -> None:
    """Raise ValueError unless ``name`` is a task or a file: to be asked before a model is loaded."""
    if name not in NAMES and not Path(name).is_file():
        raise ValueError(f"Unknown task {name!r}: choose one of {', '.join(NAMES)}, or give a JSONL file of problems.")


def load(name: str, split: str = "test", n: int = 200, seed: int = 0, *, lm: LM | None = None) -> list[Problem]:
    """``n`` problems of a task's split; the same ones for the same seed.

    Args:
        lm: The model that ``needle`` is sized for; the other tasks do not read it.

    Raises:
        ValueError: unknown split, ``needle`` without a model, or a name that is neither a task nor a file; lists the tasks.
    """
    match name:
        case "tiny":
            few = n // 4
            return arithmetic.load(split, n - few, seed) + lookup.load(split, few, seed)
        case "arithmetic":
            return arithmetic.load(split, n, seed)
        case "countdown":
            return backtracking.load(split, n, seed)
        case "lookup":
            return lookup.load(split, n, seed)
        case "gsm8k":
            return mathematics.gsm8k(split, n, seed)
        case "math500":
            return mathematics.math500(split, n, seed)
        case "wordproblems":
            return wordproblems.load(split, n, seed)
        case "threading":
            return threading.load(split, n, seed)
        case "needle":
            if lm is None:
                raise ValueError("Needle problems are sized for a model's context and tokenizer: give load('needle', ..., lm=lm).")
            return needle.load(lm, split, n, seed)
    check(name)
    return store.load_problems(name)[:n]
