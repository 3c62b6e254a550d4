"""Problems by name: ``tasks.load("arithmetic", "test", n=200, seed=0)``.

| name | problems |
|---|---|
| ``tiny`` | training mix of the tiny reasoner: three quarters arithmetic, one quarter lookup |
| ``arithmetic``, ``lookup``, ``running_sum`` | for the tiny reasoner |
| ``wordproblems`` | for the smol reasoner |
| ``countdown``, ``threading``, ``characters``, ``slaq``, ``target_length`` | for language models |
| ``needle`` | prompts sized for a model: needs ``lm=...`` |
| ``gsm8k``, ``math500`` | from the hub through ``datasets``, or from a local file with the same columns |
| ``gym:NAME`` | a data set of reasoning-gym |
| any other | a path to a JSONL file of problems |

Files of this package: one per task here; ``generators`` draw stories, traces and keys for them; ``grading`` compares answers with gold
answers; ``external`` holds problems from the hub, from reasoning-gym and from files.

Splits are train, dev and test, and no problem is in two of them. A file may name its own splits (``meta.split``, see ``external.files``).
"""

from __future__ import annotations

import logging
from pathlib import Path

from toolkit.lm import LM
from toolkit.tasks import (
    arithmetic,
    characters,
    countdown,
    lookup,
    needle,
    running_sum,
    slaq,
    splits,
    target_length,
    threading,
    wordproblems,
)
from toolkit.tasks.external import files, gym, mathematics
from toolkit.types import Problem

NAMES = (
    "tiny", "arithmetic", "countdown", "lookup", "gsm8k", "math500", "needle", "threading", "wordproblems",
    "running_sum", "characters", "slaq", "target_length",
)  # fmt: skip
GYM = "gym:"
log = logging.getLogger(__name__)
_MODULES: dict[str, tuple[str, ...]] = {
    "tiny": ("arithmetic", "lookup"), "gsm8k": ("external.mathematics",), "math500": ("external.mathematics",),
}  # fmt: skip
"""Task -> modules of this package that it is defined in, if they do not have its name."""


def check(name: str, *split_names: str) -> None:
    """Check a task's name and splits, without a model.

    Raises:
        ValueError: ``name`` is neither a task nor a file, or it has no such split.
        ImportError: the task needs an extra that is not installed.
    """
    if name.startswith(GYM):
        gym.check(name.removeprefix(GYM))
    elif not is_built_in(name) and not Path(name).is_file():
        raise ValueError(f"Unknown task {name!r}: choose one of {', '.join(NAMES)}, {GYM}NAME, or give a JSONL file of problems.")
    for split in split_names:
        splits.check_split(split) if is_built_in(name) else files.check(name, split)


def is_built_in(name: str) -> bool:
    """Return whether a task is one of ``NAMES`` or ``gym:NAME``, and not a file."""
    return name in NAMES or name.startswith(GYM)


def modules(name: str) -> list[str]:
    """Return the modules of the toolkit that define a task's problems.

    >>> modules("tiny")
    ['toolkit.tasks.arithmetic', 'toolkit.tasks.lookup']
    """
    if name in NAMES:
        return [f"toolkit.tasks.{module}" for module in _MODULES.get(name, (name,))]
    return [f"toolkit.tasks.external.{'gym' if name.startswith(GYM) else 'files'}"]


def load(name: str, split: str = "test", n: int = 200, seed: int = 0, *, lm: LM | None = None) -> list[Problem]:
    """Return ``n`` problems of a task's split, the same ones for the same seed.

    If the split has fewer than ``n`` problems, return all of them and log a warning.

    Args:
        split: ``"train"``, ``"dev"`` or ``"test"``; a file may have others.
        lm: Model that ``needle`` sizes its prompts for, and whose tokens ``characters`` records. Other tasks ignore it.

    Raises:
        ImportError: ``gym:NAME`` without reasoning-gym.
        ValueError: unknown split, ``needle`` without a model, or a name that is neither a task nor a file.

    >>> [p.messages[0]["content"] for p in load("arithmetic", "test", n=2)]
    ['30+40-27-34-7=?', 'please 20+42+33+2-1-25-31+7=?']
    """
    problems = _load(name, split, n, seed, lm)
    if len(problems) < n:
        log.warning(
            "%s has %d problems of split %s, fewer than the %d asked for: all of them are taken.", name, len(problems), split, n
        )
    return problems


def _load(name: str, split: str, n: int, seed: int, lm: LM | None) -> list[Problem]:
    match name:
        case "tiny":
            quarter = n // 4
            return arithmetic.load(split, n - quarter, seed) + lookup.load(split, quarter, seed)
        case "arithmetic":
            return arithmetic.load(split, n, seed)
        case "countdown":
            return countdown.load(split, n, seed)
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
