"""Load problems by the name of their task: ``tasks.load("arithmetic", "test", n=200, seed=0)``.

| name | problems |
|---|---|
| ``tiny`` | the tasks that ``tiny-reasoner`` was trained on: three quarters ``arithmetic``, one quarter ``lookup`` |
| ``arithmetic``, ``lookup``, ``running_sum`` | for the shipped model ``tiny-reasoner``, with only the characters that it knows |
| ``wordproblems`` | short English stories, for the shipped model ``smol-reasoner`` |
| ``countdown``, ``threading``, ``characters``, ``slaq``, ``target_length`` | for any language model |
| ``needle`` | a question about one fact in a long text; needs a model, ``lm=...``, since prompts may be as long as its context |
| ``gsm8k``, ``math500`` | downloaded from the Hugging Face hub with the package ``datasets`` |
| ``gym:NAME`` | the data set NAME of reasoning-gym |
| any other name | the path of a JSONL file of problems |

This package has one module per task. ``generators`` makes the stories, training texts and key-value pairs of some tasks, ``grading``
compares answers with gold answers, and ``external`` reads problems from the hub, from reasoning-gym and from files.

The splits are train, dev and test; no problem is in two of them. In a file, each problem may name its own split instead (``meta.split``,
see ``external.files``).
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
"""Task -> modules of this package that define its problems. A task that is not listed here has a module of its own name."""


def check(name: str, *split_names: str) -> None:
    """Raise an error unless ``name`` is a task, or a file of problems, that has all the splits ``split_names``. No model is needed.

    Raises:
        ValueError: ``name`` is neither a task nor a file, or it lacks one of the splits.
        ImportError: the task is ``gym:NAME``, and reasoning-gym is not installed.
    """
    if name.startswith(GYM):
        gym.check(name.removeprefix(GYM))
    elif not is_built_in(name) and not Path(name).is_file():
        raise ValueError(f"Unknown task {name!r}: choose one of {', '.join(NAMES)}, {GYM}NAME, or give a JSONL file of problems.")
    for split in split_names:
        splits.check_split(split) if is_built_in(name) else files.check(name, split)


def is_built_in(name: str) -> bool:
    """Return True if ``name`` is one of ``NAMES`` or ``gym:NAME``. Any other name is taken for the path of a file of problems."""
    return name in NAMES or name.startswith(GYM)


def modules(name: str) -> list[str]:
    """Return the dotted names of the modules that define the problems of the task ``name``.

    >>> modules("tiny")
    ['toolkit.tasks.arithmetic', 'toolkit.tasks.lookup']
    """
    if name in NAMES:
        return [f"toolkit.tasks.{module}" for module in _MODULES.get(name, (name,))]
    return [f"toolkit.tasks.external.{'gym' if name.startswith(GYM) else 'files'}"]


def load(name: str, split: str = "test", n: int = 200, seed: int = 0, *, lm: LM | None = None) -> list[Problem]:
    """Return ``n`` problems from one split of a task. Equal seeds give equal problems.

    If the split of a data set or file has fewer than ``n`` problems, all of them are returned and a warning is logged.

    Args:
        name: A name in the module's table, or the path of a JSONL file.
        split: ``"train"``, ``"dev"`` or ``"test"``; a file may have others.
        lm: Model, which only two tasks use. ``needle`` requires it, to fit prompts to the model's context. ``characters`` uses it, if
            given, to record how the model's tokenizer cuts each word into tokens.

    Raises:
        ImportError: the task needs reasoning-gym or ``datasets``, which is not installed.
        ValueError: unknown split, ``needle`` without a model, a name that is neither a task nor a file, or a generated task that does not
            have ``n`` different problems.

    >>> [p.messages[0]["content"] for p in load("arithmetic", "test", n=2)]
    ['30+40-27-34-7=?', 'please 20+42+33+2-1-25-31+7=?']
    """
    problems = _load(name, split, n, seed, lm)
    if len(problems) < n:
        log.warning(
            "%s has %d problems of split %s, fewer than the %d requested: all of them are used.", name, len(problems), split, n
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
                raise ValueError(
                    "Needle prompts are fitted to a model's context and tokenizer: give a model, load('needle', lm=lm)."
                )
            return needle.load(lm, split, n, seed)
    if name.startswith(GYM):
        return gym.load(name.removeprefix(GYM), split, n, seed)
    check(name)
    return files.load(name, split, n, seed)
