"""Countdown: make a target (100 to 999) from 4 to 6 numbers (1 to 100), each used at most once, with ``+ - * /``.

The task is that of arXiv 2505.24273. ``generators/backtracking.py`` writes chains of thought with a given number of *dead ends*: steps that
are tried, do not reach the target, and are given up. ``grading/countdown.py`` checks answers.

Deviations: the intermediate results of the solution in ``meta["moves"]`` are whole and positive, and none of them equals the target. These
conditions are our choice. The paper's checker demands that an answer uses every number, although its prompt allows fewer. Our checker
allows fewer.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.tasks import splits
from toolkit.types import Problem

NUMBERS, VALUES, TARGETS = (4, 6), (1, 100), (100, 999)  # ranges: how many numbers, their values, the target
LARGEST = 9999  # largest intermediate result: our choice

_OPERATORS: Mapping[str, Callable[[Any, Any], Any]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True)
class Operation:
    """One operation, ``left op right = result``, where ``op`` is one of ``+ - * /``."""

    left: int
    op: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.op} {self.right} = {self.result}"


def problem(
    rng: random.Random,
    split: str,
    *,
    numbers: tuple[int, int] = NUMBERS,
    values: tuple[int, int] = VALUES,
    targets: tuple[int, int] = TARGETS,
) -> Problem:
    """Draw random problems until one belongs to ``split``, and return it. A hash of the given numbers and the target decides the split.

    ``meta["moves"]`` holds a solution that uses every number, one ``[left, op, right, result]`` per operation.

    Args:
        rng: Source of every random choice.
        split: ``"train"``, ``"dev"`` or ``"test"``.
        numbers: Fewest and most numbers that a problem gives, such as ``(4, 6)``.
        values: Smallest and largest value of a given number.
        targets: Smallest and largest target.
    """
    while True:
        drawn = [rng.randint(*values) for _ in range(rng.randint(*numbers))]
        operations = random_chain(rng, drawn)
        given = sorted(drawn)
        if (
            operations is None
            or not targets[0] <= operations[-1].result <= targets[1]
            or any(o.result == operations[-1].result for o in operations[:-1])
        ):
            continue  # no valid chain, a target out of range, or the target reached too early
        target = operations[-1].result
        content = f"Make {target} from the numbers {', '.join(map(str, given))}. Use + - * / and each number at most once. Answer with the expression."
        if splits.split_of(f"{given}{target}") == split and target not in given:
            break
    meta = {
        "task": "countdown",
        "split": split,
        "difficulty": len(drawn),
        "grader": "countdown",
        "numbers": given,
        "target": target,
        "moves": [[o.left, o.op, o.right, o.result] for o in operations],
    }
    return Problem(f"countdown-{splits.digest(content)}", ({"role": "user", "content": content},), expression(operations), meta)


def load(
    split: str,
    n: int = 200,
    seed: int = 0,
    *,
    numbers: tuple[int, int] = NUMBERS,
    values: tuple[int, int] = VALUES,
    targets: tuple[int, int] = TARGETS,
) -> list[Problem]:
    """Return ``n`` different problems of ``split`` ("train", "dev" or "test"). Equal seeds give equal problems.

    Args:
        numbers: Fewest and most numbers that a problem gives, such as ``(4, 6)``.
        values: Smallest and largest value of a given number. Smaller values suit small models.
        targets: Smallest and largest target.

    Raises:
        ValueError: unknown split, a range that is empty, numbers below 3, values or targets below 1, or fewer than ``n`` different problems.
    """
    splits.check_split(split)
    if not 3 <= numbers[0] <= numbers[1]:
        raise ValueError(f"numbers={numbers}: give an inclusive range for how many numbers a problem has, at least 3 numbers.")
    for name, (low, high) in {"values": values, "targets": targets}.items():
        if not 1 <= low <= high:
            raise ValueError(f"{name}={(low, high)}: give an inclusive range of whole numbers from 1.")
    rng = random.Random(f"countdown-{split}-{seed}")
    return splits.distinct(lambda: problem(rng, split, numbers=numbers, values=values, targets=targets), n)


def solution(p: Problem) -> list[Operation]:
    """Return the operations of the solution stored in ``p.meta["moves"]``, in order.

    Raises:
        ValueError: ``p`` is not a countdown problem.
    """
    if p.meta.get("task") != "countdown":
        raise ValueError(f"Problem {p.id!r} is of task {p.meta.get('task')!r}, not countdown.")
    return [Operation(*values) for values in p.meta["moves"]]


def expression(operations: Sequence[Operation]) -> str:
    """Return operations as one expression, such as ``((4 * 25) - 7) + 3``.

    Args:
        operations: Operations in order. The left operand of each must be the result of the one before.
    """
    text = str(operations[0].left)
    for i, o in enumerate(operations):
        text = f"{f'({text})' if i else text} {o.op} {o.right}"
    return text


def random_chain(rng: random.Random, numbers: Sequence[int]) -> list[Operation] | None:
    """Combine the numbers from left to right with random operators, and return the operations.

    Return ``None`` if the result of any operation is not whole, is below 1 or is above ``LARGEST`` (9999).
    """
    operations, value = [], numbers[0]
    for right in numbers[1:]:
        op = rng.choice("+-*/")
        if op == "/" and value % right:
            return None
        result = value // right if op == "/" else _OPERATORS[op](value, right)
        if not 1 <= result <= LARGEST:
            return None
        operations.append(Operation(value, op, right, result))
        value = result
    return operations
