"""Grading of answers: exact numbers for our own tasks, math-verify for mathematics, words and identifiers for retrieval.

A verifier that is no comparison of texts is a function of the problem and the answer, and has a name in :func:`grade`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit import stats
from toolkit.store import DamagedFileError, checked, load_problems
from toolkit.tasks import backtracking, gym
from toolkit.types import Problem

_NUMBER = re.compile(r"(?<!\d)-?\d[\d,]*(?:\.\d+)?")  # a minus after a number is no sign: "12-5" ends in 5
_WORD = re.compile(r"[a-z0-9]+")
_NUMBERED = re.compile(r"^[^\w\n]*(\d+)[.):]\**(?=\s)", re.MULTILINE)
_IDENTIFIER = re.compile(r"[*&a-z0-9]+(?:-[*&a-z0-9]+)*")
RECALL = 0.5  # of the needle's words, above which arXiv 2404.15574's released code counts an answer as right


def last_number(text: str) -> str | None:
    """The last number of a text without thousands separators, or ``None``."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "").rstrip(".") if found else None


def word_recall(gold: str, text: str) -> float:
    """Share of the gold words that occur in ``text``, each as often as it occurs there at most: ROUGE-1 recall, in [0, 1].

    Case and punctuation do not count. Deviation from the code of arXiv 2404.15574: no stemming, as needles are copied literally.
    """
    wanted, said = Counter(_WORD.findall(gold.lower())), Counter(_WORD.findall(text.lower()))
    if not wanted:
        raise ValueError(f"The gold answer {gold!r} has no words, so its recall is undefined: give one with letters or digits.")
    return sum((wanted & said).values()) / sum(wanted.values())


def contains(gold: str, text: str) -> bool:
    """Whether the gold words stand in ``text`` one after the other; case and punctuation do not count."""
    wanted, said = (" ".join(_WORD.findall(t.lower())) for t in (gold, text))
    return f" {wanted} " in f" {said} "


def parts(text: str, n: int) -> list[str]:
    """An answer to ``n`` questions in its parts: the lines after ``1.``, ``2)``, ``3:``; else its lines, in order; ``""`` for a
    missing one. The first one counts where a number occurs twice. With one question, the whole text."""
    if n == 1:
        return [text]
    marks = list(_NUMBERED.finditer(text))
    if not marks:
        lines = [line for line in text.splitlines() if line.strip()]
        return (lines + [""] * n)[:n]
    ends = [m.start() for m in marks[1:]] + [len(text)]
    found = {int(m[1]): text[m.end() : end] for m, end in reversed(list(zip(marks, ends, strict=True)))}
    return [found.get(i + 1, "") for i in range(n)]


def facts_right(golds: Sequence[str], wrong: Sequence[str], text: str) -> tuple[bool, ...]:
    """Whether each part of an answer holds its gold words, and none of the words that would answer something else.

    Args:
        wrong: What is not to be said in any part, unless it is the gold answer of that part: a list of everything is no answer.
    """
    return tuple(
        contains(gold, part) and not any(contains(other, part) for other in wrong if other != gold)
        for gold, part in zip(golds, parts(text, len(golds)), strict=True)
    )


def identifiers(text: str) -> list[str]:
    """Words with a digit in them, such as the keys and values of ``tasks.threading``, in order."""
    return [word for word in _IDENTIFIER.findall(text.lower()) if any(c.isdigit() for c in word)]


READ_OF_META: dict[str, dict[str, Any]] = {
    "math": {},
    "recall": {},
    "contains": {},
    "countdown": {"numbers": list[int], "target": int},
    "identifiers": {},
    "identifier set": {},
    "facts": {"golds": list[str], "wrong": list[str]},
    "length": {"low_words": float, "high_words": float | None},
    "gym": {"gym": {"name": str, "settings": str, "seed": int, "size": int, "index": int}},
}
"""What each grader reads of a problem's ``meta``, by type."""


def problems_of(path: str | Path) -> list[Problem]:
    """The problems of a JSONL file, each of which can be graded.

    Raises:
        FileNotFoundError, DamagedFileError, ValueError: as ``store.load_problems``; a problem names no grader that there is, or lacks
            what that grader reads. All of it before anything is sampled.
    """
    problems = load_problems(path)
    for problem in problems:
        _check(problem, path)
    return problems


def _check(problem: Problem, source: str | Path) -> None:
    where, grader = f"{source}, problem {problem.id[:40]!r}", problem.meta.get("grader")
    if grader is None:
        if (count := len(_NUMBER.findall(problem.answer))) != 1:
            raise DamagedFileError(
                f"{where}: the answer {problem.answer[:40]!r} holds {count or 'no'} number{'s' * (count > 1)}, and one number is all that is "
                f"compared without a grader. Name one in meta.grader: {', '.join(READ_OF_META)} (math for fractions and formulas)."
            )
        return
    if grader not in READ_OF_META:
        raise DamagedFileError(
            f"{where}: unknown grader {str(grader)[:40]!r}. Name one of {', '.join(READ_OF_META)}, or none for numbers."
        )
    checked(problem.meta, READ_OF_META[grader], where, f"The grader {grader!r} reads this of the problem's meta.")


def grade(problem: Problem, answer: str) -> bool:
    """Whether ``answer`` (the text after the think span) gives the problem's gold answer.

    ``meta["grader"]`` chooses: ``"math"`` verifies with math-verify (the ``[tasks]`` extra); ``"recall"`` wants a word recall
    above :data:`RECALL`; ``"contains"`` the gold words one after the other; ``"countdown"`` any expression that makes the target of the
    numbers; ``"identifiers"`` the gold identifiers, as the last ones of the text in their order; ``"identifier set"`` these
    identifiers and no others, in any order (keys named in ``meta["asked"]`` may be repeated); ``"facts"`` every one of
    ``meta["golds"]`` in its part of the text (:func:`facts_right`); ``"length"`` more than ``meta["low_words"]`` words and
    ``meta["high_words"]`` (``None``: any number) at most; ``"gym"`` the full score of the problem's reasoning-gym data set. Anything
    else compares the last number of the text with the gold number.
    """
    gold = problem.answer
    match problem.meta.get("grader"):
        case "math":
            return _verified(gold, answer)
        case "recall":
            return word_recall(gold, answer) > RECALL
        case "contains":
            return contains(gold, answer)
        case "countdown":
            return backtracking.verify(answer, problem.meta["numbers"], problem.meta["target"])
        case "identifiers" | "identifier set" as grader:
            wanted = identifiers(gold)
            said = [word for word in identifiers(answer) if word not in problem.meta.get("asked", ())]
            return said[-len(wanted) :] == wanted if grader == "identifiers" else set(said) == set(wanted)
        case "facts":
            return all(facts_right(problem.meta["golds"], problem.meta["wrong"], answer))
        case "length":
            low, high = problem.meta["low_words"], problem.meta["high_words"]
            return low < stats.words(answer) <= (math.inf if high is None else high)
        case "gym":
            return gym.verify(problem, answer)
    number, gold_number = last_number(answer), last_number(gold)
    return number is not None and gold_number is not None and float(number) == float(gold_number)


def _verified(gold: str, answer: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("Grading mathematics needs math-verify: pip install 'reasoning-length-toolkit[tasks]'.") from error
    # A gold answer such as \frac{1}{2} parses only inside a mathematics environment.
    return bool(verify(parse(f"${gold}$", parsing_timeout=None), parse(answer, parsing_timeout=None), timeout_seconds=None))
