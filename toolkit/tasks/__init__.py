"""Load the problems of a task by its name: ``tasks.load("arithmetic", "test", n=200, seed=0)``.

| name | problems |
|---|---|
| ``arithmetic`` | additions and subtractions, such as ``17+5-9=?`` |
| ``lookup`` | variables whose values are in the prompt, such as ``K=5; B=K; B?`` |
| ``tiny`` | three quarters ``arithmetic``, one quarter ``lookup``: the two tasks that ``tiny-reasoner`` was trained on |
| ``running_sum`` | chains of additions and subtractions, longer than in ``arithmetic`` |
| ``wordproblems`` | arithmetic in short English stories, for the shipped model ``smol-reasoner`` |
| ``searching`` | facts about people, in the weights of the shipped model ``tiny-searcher``, in its corpus, or in neither |
| ``countdown`` | reach a target number from given numbers |
| ``sudoku`` | fill the blanks of a 4 x 4 Sudoku |
| ``threading`` | find values, or follow chains of keys and values, in a JSON object |
| ``characters`` | count or find the characters of a word |
| ``slaq`` | the same facts asked one by one and all at once |
| ``target_length`` | questions to be answered in a given number of words |
| ``instructions`` | questions to be answered under stated constraints, such as a number of words |
| ``writing`` | texts of a given number of words, with given headings and keywords |
| ``ranking`` | put passages in order of how much they say about a subject |
| ``text_to_sql`` | questions in two languages about a table, to be answered with an SQL query |
| ``needle`` | a question about one fact in a long text; needs a model, ``lm=...``, because prompts are fitted to its context |
| ``gsm8k``, ``math500`` | downloaded from the Hugging Face hub with the package ``datasets`` |
| ``gym:NAME`` | the data set NAME of reasoning-gym |
| any other name | the path of a JSONL file of problems |

The first four are for the shipped model ``tiny-reasoner`` and use only characters that it knows. ``searching`` is
for ``tiny-searcher``. The tasks from ``countdown`` on are for any language model.

This package has one module per task. ``generators`` writes stories, training texts and key-value pairs for some of them. ``grading``
compares answers with gold answers. ``external`` reads problems from the hub, from reasoning-gym and from files.

The splits are train, dev and test; no problem is in two of them. A file may name its own splits, one per problem (``meta.split``, see
``external.files``).
"""

from __future__ import annotations

import logging
from pathlib import Path

from toolkit.lm import LM
from toolkit.tasks import (
    arithmetic,
    characters,
    countdown,
    haystack,
    instructions,
    lookup,
    needle,
    ranking,
    running_sum,
    searching,
    slaq,
    splits,
    sudoku,
    target_length,
    text_to_sql,
    threading,
    wordproblems,
    writing,
)
from toolkit.tasks.external import files, gym, mathematics
from toolkit.types import Problem

NAMES = (
    "tiny", "arithmetic", "countdown", "lookup", "gsm8k", "math500", "needle", "threading", "wordproblems",
    "running_sum", "characters", "slaq", "target_length", "writing", "ranking", "text_to_sql", "searching", "instructions", "sudoku",
)  # fmt: skip
GYM = "gym:"
log = logging.getLogger(__name__)
_MODULES: dict[str, tuple[str, ...]] = {
    "tiny": ("arithmetic", "lookup"), "gsm8k": ("external.mathematics",), "math500": ("external.mathematics",),
}  # fmt: skip
"""Task -> modules of this package that define its problems. Every other name in ``NAMES`` is also the name of its module."""


def check(name: str, *split_names: str) -> None:
    """Check that a task or file of problems exists and has all the splits ``split_names``; raise an error if not. No model is needed.

    Raises:
        ValueError: ``name`` is neither a task nor a file, or one of the splits does not exist.
        ImportError: the task is ``gym:NAME``, and reasoning-gym is not installed.
    """
    if name.startswith(GYM):
        gym.check(name.removeprefix(GYM))
    elif not is_built_in(name) and not Path(name).is_file():
        if Path(name).suffix in (".json", ".jsonl") or len(Path(name).parts) > 1:
            raise ValueError(f"No problem file at {name}: a task is such a JSONL file, one of {', '.join(NAMES)}, or {GYM}NAME.")
        raise ValueError(f"Unknown task {name!r}: choose one of {', '.join(NAMES)}, {GYM}NAME, or give a JSONL file of problems.")
    for split in split_names:
        splits.check_split(split) if is_built_in(name) else files.check(name, split)


def is_built_in(name: str) -> bool:
    """Return True if ``name`` is one of ``NAMES`` or begins with ``gym:``. ``load`` treats any other name as the path of a file."""
    return name in NAMES or name.startswith(GYM)


def modules(name: str) -> list[str]:
    """Return the dotted names of the modules that define the problems of the task ``name``.

    >>> modules("tiny")
    ['toolkit.tasks.arithmetic', 'toolkit.tasks.lookup']
    """
    if name in NAMES:
        return [f"toolkit.tasks.{module}" for module in _MODULES.get(name, (name,))]
    return [f"toolkit.tasks.external.{'gym' if name.startswith(GYM) else 'files'}"]


def load(
    name: str, split: str = "test", n: int = 200, seed: int = 0, *, lm: LM | None = None, max_new_tokens: int = haystack.RESPONSE
) -> list[Problem]:
    """Return ``n`` problems from one split of a task. Equal seeds give equal problems.

    If the split has fewer than ``n`` problems, the result depends on the task. ``gsm8k``, ``math500`` and files give all problems of the
    split, and a warning is logged. Every other task raises ValueError.

    Args:
        name: One of ``NAMES``, such as ``"arithmetic"``; ``"gym:NAME"`` for the data set NAME of reasoning-gym; or the path of a JSONL
            file. The docstring of ``toolkit.tasks`` describes the tasks.
        split: ``"train"``, ``"dev"`` or ``"test"``; a file may have others.
        lm: Model; only two tasks use it. ``needle`` requires it, to fit prompts to the model's context. For ``characters`` it is optional:
            its tokenizer is used to record how each word is cut into tokens.
        max_new_tokens: Token budget of a response; only ``needle`` uses it. Its longest prompts leave that many tokens of the model's
            context free, but at least 256, so that their lengths are the same for all smaller budgets.

    Raises:
        ImportError: the task needs reasoning-gym or ``datasets``, which is not installed.
        ValueError: unknown split, ``needle`` without a model, a name that is neither a task nor a file, a line of the file that is not a
            problem, or fewer than ``n`` different problems (not for ``gsm8k``, ``math500`` and files).

    >>> [p.messages[0]["content"] for p in load("arithmetic", "test", n=2)]
    ['30+40-27-34-7=?', 'please 20+42+33+2-1-25-31+7=?']
    """
    problems = _load(name, split, n, seed, lm, max_new_tokens)
    if len(problems) < n:
        divided = "" if is_built_in(name) else " If no line of the file names its split (meta.split), a hash of the id decides it."
        log.warning(
            "%s has %d problems of split %s, fewer than the %d requested: all of them are used.%s",
            *(name, len(problems), split, n, divided),
        )
    return problems


def _load(name: str, split: str, n: int, seed: int, lm: LM | None, max_new_tokens: int) -> list[Problem]:
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
        case "sudoku":
            return sudoku.load(split, n, seed)
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
        case "writing":
            return writing.load(split, n, seed)
        case "text_to_sql":
            return text_to_sql.load(split, n, seed)
        case "instructions":
            return instructions.load(split, n, seed)
        case "ranking":
            return ranking.load(split, n, seed)
        case "searching":
            return searching.load(split, n, seed)
        case "needle":
            if lm is None:
                raise ValueError(
                    "Needle prompts are fitted to a model's context and tokenizer: give a model, load('needle', lm=lm)."
                )
            return needle.load(lm, split, n, seed, response=max(haystack.RESPONSE, max_new_tokens))
    if name.startswith(GYM):
        return gym.load(name.removeprefix(GYM), split, n, seed)
    check(name)
    return files.load(name, split, n, seed)
