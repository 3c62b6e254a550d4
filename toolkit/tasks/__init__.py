"""Problems by name: ``tasks.load("arithmetic", "test", n=200, seed=0)``.

``tiny`` is the tiny reasoner's own mix (three quarters arithmetic, one quarter lookup), ``wordproblems`` the smol reasoner's;
``gsm8k`` and ``math500`` come through the ``datasets`` library or a local file with the same columns; ``needle`` is sized for a
model (``lm=...``), ``threading`` is not. ``running_sum`` are long chains for the tiny reasoner, ``characters``, ``slaq`` and
``target_length`` are for language models, ``gym:NAME`` is a data set of reasoning-gym; anything else is a path to a JSONL file of problems.

Splits are train, dev and test, and no problem is in two of them. A file may name its own (``meta.split``, see ``files``).
"""

from __future__ import annotations

import logging
from pathlib import Path

from toolkit.lm import LM
from toolkit.tasks import (
    arithmetic,
    backtracking,
    characters,
    files,
    gym,
    lookup,
    mathematics,
    needle,
    running_sum,
    slaq,
    target_length,
    threading,
    wordproblems,
    words,
)
from toolkit.types import Problem

NAMES = (
    "tiny", "arithmetic", "countdown", "lookup", "gsm8k", "math500", "needle", "threading", "wordproblems",
    "running_sum", "characters", "slaq", "target_length",
)  # fmt: skip
GYM = "gym:"
log = logging.getLogger(__name__)
_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "tiny": ("arithmetic", "lookup"), "countdown": ("backtracking",), "gsm8k": ("mathematics",), "math500": ("mathematics",),
}  # fmt: skip
"""Modules of this package that a task is in, where they are not called so."""


def check(name: str, *splits: str) -> None:
    """Raise ValueError unless ``name`` is a task or a file with these splits, ImportError if it needs an extra. Needs no model."""
    if name.startswith(GYM):
        gym.check(name.removeprefix(GYM))
    elif not is_built_in(name) and not Path(name).is_file():
        raise ValueError(f"Unknown task {name!r}: choose one of {', '.join(NAMES)}, {GYM}NAME, or give a JSONL file of problems.")
    for split in splits:
        words.check_split(split) if is_built_in(name) else files.check(name, split)


def is_built_in(name: str) -> bool:
    """Whether a task is none of a file: one of :data:`NAMES`, or ``gym:NAME``."""
    return name in NAMES or name.startswith(GYM)


def modules(name: str) -> list[str]:
    """The modules of the toolkit that a task's problems come from."""
    if name in NAMES:
        return [f"toolkit.tasks.{own}" for own in _ELSEWHERE.get(name, (name,))]
    return ["toolkit.tasks.gym" if name.startswith(GYM) else "toolkit.tasks.files"]


def load(name: str, split: str = "test", n: int = 200, seed: int = 0, *, lm: LM | None = None) -> list[Problem]:
    """``n`` problems of a task's split; the same ones for the same seed. If there are fewer, all of them, and a log line says so.

    Args:
        lm: The model that ``needle`` is sized for, and whose tokens tag ``characters``; the other tasks do not read it.

    Raises:
        ImportError: ``gym:NAME`` without reasoning-gym.
        ValueError: unknown split, ``needle`` without a model, or a name that is neither a task nor a file; lists the tasks.
    """
    found = _load(name, split, n, seed, lm)
    if len(found) < n:
        log.warning(
            "%s has %d problems of split %s, fewer than the %d asked for: all of them are taken.", name, len(found), split, n
        )
    return found


def _load(name: str, split: str, n: int, seed: int, lm: LM | None) -> list[Problem]:
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
    check(name)
    return files.load(name, split, n, seed)
