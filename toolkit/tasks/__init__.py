"""Problems by name: ``tasks.load("arithmetic", "test", n=200, seed=0)``.

``tiny`` is the tiny reasoner's own mix (three quarters arithmetic, one quarter lookup), ``wordproblems`` the smol reasoner's;
``gsm8k`` and ``math500`` come through the ``datasets`` library or a local file with the same columns; ``needle`` is sized for a
model (``lm=...``), ``threading`` is not. ``running_sum`` are long chains for the tiny reasoner, ``characters``, ``slaq`` and
``target_length`` are for language models, ``gym:NAME`` is a data set of reasoning-gym; anything else is a path to a JSONL file of problems.
"""

from __future__ import annotations

from pathlib import Path

from toolkit.lm import LM
from toolkit.tasks import (
    arithmetic,
    backtracking,
    characters,
    grading,
    gym,
    lookup,
    mathematics,
    needle,
    running_sum,
    slaq,
    target_length,
    threading,
    wordproblems,
)
from toolkit.types import Problem

NAMES = (
    "tiny", "arithmetic", "countdown", "lookup", "gsm8k", "math500", "needle", "threading", "wordproblems",
    "running_sum", "characters", "slaq", "target_length",
)  # fmt: skip
GYM = "gym:"


def check(name: str) -> None:
    """Raise ValueError unless ``name`` is a task or a file, ImportError if it needs an extra: to be asked before a model is loaded."""
    if name.startswith(GYM):
        gym.check(name.removeprefix(GYM))
    elif name not in NAMES and not Path(name).is_file():
        raise ValueError(f"Unknown task {name!r}: choose one of {', '.join(NAMES)}, {GYM}NAME, or give a JSONL file of problems.")
    elif name not in NAMES:
        grading.problems_of(name)


def load(name: str, split: str = "test", n: int = 200, seed: int = 0, *, lm: LM | None = None) -> list[Problem]:
    """``n`` problems of a task's split; the same ones for the same seed.

    Args:
        lm: The model that ``needle`` is sized for, and whose tokens tag ``characters``; the other tasks do not read it.

    Raises:
        ImportError: ``gym:NAME`` without reasoning-gym.
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
        case "running_sum":
            return running_sum.load(split, n, seed)
        case "characters":
            return characters.load(split, n, seed, tokenizer=None if lm is None else lm.tokenizer)
        case "slaq":
            return slaq.load(split, n, seed)
        case "target_length":
            return target_length.load(split, n, seed)
        case "needle":
            if lm is None:
                raise ValueError("Needle problems are sized for a model's context and tokenizer: give load('needle', ..., lm=lm).")
            return needle.load(lm, split, n, seed)
    if name.startswith(GYM):
        return gym.load(name.removeprefix(GYM), split, n, seed)
    if not Path(name).is_file():
        check(name)
    return grading.problems_of(name)[:n]
