"""Graders: ways to compare an answer with the gold answer. A problem names its grader in ``meta["grader"]``; ``grade`` applies it."""

from __future__ import annotations

import math
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from toolkit import constraints, expressions, stats
from toolkit.stats import rankings
from toolkit.store import DamagedFileError, checked, load_problems
from toolkit.tasks.external import gym
from toolkit.tasks.grading import countdown
from toolkit.tasks.grading.answers import (
    NUMBER,
    RECALL,
    contains,
    facts_right,
    identifiers,
    last_digits,
    last_number,
    same_words,
    word_recall,
)
from toolkit.tasks.text_to_sql import another
from toolkit.tools.queries import executes_like, query_of
from toolkit.types import Problem

READ_OF_META: dict[str, dict[str, Any]] = {
    "math": {},
    "recall": {},
    "contains": {},
    "exact": {},
    "countdown": {"numbers": list[int], "target": int},
    "sudoku": {"solution": list[int]},
    "identifiers": {},
    "identifier set": {},
    "facts": {"golds": list[str], "wrong": list[str]},
    "length": {"low_words": float, "high_words": float | None},
    "constraints": {"instruction": str},
    "ranking": {"relevance": list[int]},
    "sql": {"schema": str},
    "gym": {"gym": {"name": str, "settings": str, "seed": int, "size": int, "index": int}},
}
"""Name of a grader -> the fields that it requires in a problem's ``meta``, with their types."""


def problems_of(path: str | Path) -> list[Problem]:
    """Return the problems of a JSONL file, after checking that each can be graded.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: a line is not a problem; it names an unknown grader in ``meta.grader``; or it lacks a field of ``meta`` that its
            grader requires. If a line names no grader, its gold answer must have exactly one number.
        ValueError: the file holds no problem.
    """
    return load_problems(path, _check)


def _check(problem: Problem, where: str) -> None:
    grader = problem.meta.get("grader")
    if grader is None:
        if (count := len(NUMBER.findall(expressions.plain_numbers(problem.answer)))) != 1:
            raise DamagedFileError(
                f"{where}: the answer {problem.answer[:40]!r} holds {count or 'no'} number{'s' * (count > 1)}, but without a grader "
                f"exactly one number is compared. Name a grader in meta.grader: {', '.join(READ_OF_META)} (math for fractions and formulas)."
            )
        return
    if grader not in READ_OF_META:
        raise DamagedFileError(
            f"{where}: unknown grader {str(grader)[:40]!r}. Name one of {', '.join(READ_OF_META)}, or none for numbers."
        )
    checked(problem.meta, READ_OF_META[grader], where, f"The grader {grader!r} reads this of the problem's meta.")


def grade(problem: Problem, answer: str) -> bool:
    """Return True if ``answer`` (the text after the think span) is right, compared with the problem's gold answer.

    ``meta["grader"]`` chooses the comparison. The answer is right if:

    - no grader: its last number equals the last number of the gold answer.
    - ``"math"``: the package math-verify finds the two answers equal (see ``toolkit.expressions``). math-verify is installed
      with the toolkit's optional dependencies ``tasks``.
    - ``"recall"``: it contains more than half of the gold answer's words (see ``word_recall``).
    - ``"contains"``: it contains the gold answer's words in order and without gaps.
    - ``"exact"``: its words are those of the gold answer, and no others.
    - ``"countdown"``: its last expression makes ``meta["target"]`` from ``meta["numbers"]``.
    - ``"sudoku"``: the last digits in it, as many as ``meta["solution"]`` has and without letters between them, are those of the solution.
    - ``"identifiers"``: it ends with the identifiers (words with a digit) of the gold answer, in order. Other identifiers may come before
      them.
    - ``"identifier set"``: its identifiers are those of the gold answer, in any order, and no others.
    - ``"facts"``: each numbered part i contains ``meta["golds"][i]`` and none of the other answers in the list ``meta["wrong"]``.
    - ``"length"``: it has more than ``meta["low_words"]`` and at most ``meta["high_words"]`` words (``None``: no upper limit).
    - ``"constraints"``: it meets every constraint that is stated in ``meta["instruction"]`` (see ``toolkit.constraints``).
    - ``"ranking"``: it names every passage once, ``[3] > [1] > [2]``, in an order of the highest NDCG for ``meta["relevance"]``.
    - ``"sql"``: the query in it gives the rows of the gold query, on the tables that the script ``meta["schema"]`` makes.
      For problems of ``tasks.text_to_sql``, also on other rows, one table per seed in ``meta["table_seeds"]``.
    - ``"gym"``: the problem's reasoning-gym data set gives it the full score.

    ``"identifiers"`` and ``"identifier set"`` ignore the words in ``meta["asked"]``: an answer may repeat the keys asked about.

    >>> grade(Problem("sum", ({"role": "user", "content": "17+5=?"},), "22"), "17 + 5 = 22")
    True
    """
    gold = problem.answer
    match problem.meta.get("grader"):
        case "math":
            return expressions.equal(gold, answer)
        case "recall":
            return word_recall(gold, answer) > RECALL
        case "contains":
            return contains(gold, answer)
        case "exact":
            return same_words(gold, answer)
        case "countdown":
            return countdown.verify(answer, problem.meta["numbers"], problem.meta["target"])
        case "sudoku":
            return last_digits(answer, len(problem.meta["solution"])) == list(problem.meta["solution"])
        case "identifiers" | "identifier set" as grader:
            wanted = identifiers(gold)
            answered = [word for word in identifiers(answer) if word not in problem.meta.get("asked", ())]
            return answered[-len(wanted) :] == wanted if grader == "identifiers" else set(answered) == set(wanted)
        case "facts":
            return all(facts_right(problem.meta["golds"], problem.meta["wrong"], answer))
        case "length":
            low, high = problem.meta["low_words"], problem.meta["high_words"]
            return low < stats.words(answer) <= (math.inf if high is None else high)
        case "constraints":
            return all(c.met(answer) for c in constraints.extract(problem.meta["instruction"]))
        case "ranking":
            relevance = problem.meta["relevance"]
            ranking = [int(i) - 1 for i in rankings.IDENTIFIER.findall(answer)]
            once = sorted(ranking) == list(range(len(relevance)))
            return once and all(relevance[i] >= relevance[j] for i, j in pairwise(ranking))
        case "sql":
            schema, query = problem.meta["schema"], query_of(answer)
            others = (another(schema, seed) for seed in problem.meta.get("table_seeds", ()))
            return all(executes_like(query, gold, database) for database in chain((schema,), others))
        case "gym":
            return gym.verify(problem, answer)
    number, gold_number = last_number(answer), last_number(gold)
    return number is not None and gold_number is not None and float(number) == float(gold_number)
