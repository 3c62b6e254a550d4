"""Countdown, and chains of thought that solve it with exactly k dead ends. How much backtracking is enough? arXiv 2505.24273.

A problem asks to make a target (100 to 999) of 4 to 6 numbers (1 to 100) with ``+ - * /``. A trace goes along a solution, leaves
it k times for a dead end that runs to its end, and goes back each time::

    Step 1: 4 * 25 = 100.
    Step 2: 100 - 7 = 93.
    Step 3: 93 + 3 = 96.
    That ends at 96, not at 310. Back to step 1.
    Step 2: 100 + 3 = 103.
    ...

Every step recomputes, and which steps failed is known: an exact oracle for failed-step fractions (``methods/failed_steps`` reads
these cues), matched short and long chains of the same problem and answer, and seeds for fine-tuning.

Deviations: the released code repeats one dead end when it backtracks twice or more; here all k differ (ours). Its checker demands
that every number is used although the prompt allows some; ``verify`` does as the prompt says (``every=True`` demands them).
Results stay whole and positive, and neither a dead end nor a solution meets the target on its way (ours).
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from toolkit.tasks import words
from toolkit.types import Problem

NUMBERS, VALUES, TARGETS = (4, 6), (1, 100), (100, 999)
LARGEST = 9999  # of results on the way: ours
TRIES = 2000  # draws of dead ends before a problem is said to have no more: ours
LONGEST_ANSWER = 400  # characters of an answer that are looked at

_OPS: Mapping[str, Callable[[Any, Any], Any]] = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_NODES: Mapping[type, str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


@dataclass(frozen=True)
class Move:
    """One operation: ``left op right = result``."""

    left: int
    op: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.op} {self.right} = {self.result}"


@dataclass(frozen=True)
class TraceStep:
    """A step as it stands in a trace.

    Attributes:
        number: The number it bears, from 1: how deep in the chain it is.
        dead_end: Index of the dead end it belongs to, or ``None`` on the way to the solution.
    """

    number: int
    move: Move
    dead_end: int | None

    def __str__(self) -> str:
        return f"Step {self.number}: {self.move}."


@dataclass(frozen=True)
class Trace:
    """A chain of thought with its dead ends.

    Attributes:
        text: What stands between the think tags.
        steps: All steps in the order they are written.
        answer: The solution as an expression.
    """

    text: str
    steps: tuple[TraceStep, ...]
    answer: str

    @property
    def failed(self) -> tuple[int, ...]:
        """Ids (places in ``steps``) of the steps in dead ends."""
        return tuple(i for i, step in enumerate(self.steps) if step.dead_end is not None)

    @property
    def dead_ends(self) -> int:
        """How many times it backtracks."""
        return len({step.dead_end for step in self.steps} - {None})


class NoDeadEndError(ValueError):
    """A problem does not have as many different dead ends."""


# --- problems ------------------------------------------------------------------------------------------------


def problem(rng: random.Random, split: str, *, numbers: tuple[int, int] = NUMBERS) -> Problem:
    """Draw one problem of ``split``; ``meta["moves"]`` is its solution, which uses every number."""
    while True:
        own = [rng.randint(*VALUES) for _ in range(rng.randint(*numbers))]
        moves = _chain(rng, own)
        shown = sorted(own)
        if (
            moves is None
            or not TARGETS[0] <= moves[-1].result <= TARGETS[1]
            or any(m.result == moves[-1].result for m in moves[:-1])
        ):
            continue
        target = moves[-1].result
        content = f"Make {target} from the numbers {', '.join(map(str, shown))}. Use + - * / and each number at most once. Answer with the expression."
        if words.split_of(f"{shown}{target}") == split and target not in shown:
            break
    meta = {
        "task": "countdown",
        "split": split,
        "difficulty": len(own),
        "grader": "countdown",
        "numbers": shown,
        "target": target,
        "moves": [[m.left, m.op, m.right, m.result] for m in moves],
    }
    return Problem(f"countdown-{words.digest(content)}", ({"role": "user", "content": content},), expression(moves), meta)


def load(split: str, n: int = 200, seed: int = 0, *, numbers: tuple[int, int] = NUMBERS) -> list[Problem]:
    """``n`` distinct problems of ``split`` ("train", "dev" or "test"), the same ones for the same seed.

    Raises:
        ValueError: unknown split, or fewer than three numbers.
    """
    words.check_split(split)
    if not 3 <= numbers[0] <= numbers[1]:
        raise ValueError(f"numbers={numbers}: give an inclusive range of at least 3 numbers.")
    rng = random.Random(f"countdown-{split}-{seed}")
    return words.distinct(lambda: problem(rng, split, numbers=numbers), n)


def solution(p: Problem) -> list[Move]:
    """The moves of a problem's solution. Raises ValueError for a problem of another task."""
    if p.meta.get("task") != "countdown":
        raise ValueError(f"Problem {p.id!r} is of task {p.meta.get('task')!r}, not countdown.")
    return [Move(*move) for move in p.meta["moves"]]


def expression(moves: Sequence[Move]) -> str:
    """Moves as one expression: ``((4 * 25) - 7) + 3``."""
    text = str(moves[0].left)
    for i, move in enumerate(moves):
        text = f"{f'({text})' if i else text} {move.op} {move.right}"
    return text


def _chain(rng: random.Random, numbers: Sequence[int]) -> list[Move] | None:
    """Random operations along the numbers in order, results whole and positive; ``None`` if chance has it otherwise."""
    moves, value = [], numbers[0]
    for right in numbers[1:]:
        op = rng.choice("+-*/")
        if op == "/" and value % right:
            return None
        result = value // right if op == "/" else _OPS[op](value, right)
        if not 1 <= result <= LARGEST:
            return None
        moves.append(Move(value, op, right, result))
        value = result
    return moves


# --- traces --------------------------------------------------------------------------------------------------


def trace(p: Problem, dead_ends: int, *, seed: int = 0) -> Trace:
    """A chain of thought for a problem with exactly so many different dead ends; the same one for the same seed.

    Raises:
        NoDeadEndError: the problem does not have so many.
    """
    moves, rng = solution(p), random.Random(f"{p.id}-{dead_ends}-{seed}")
    found: list[tuple[int, tuple[Move, ...]]] = []
    for _ in range(TRIES):
        if len(found) == dead_ends:
            break
        start = rng.randrange(len(moves))
        wrong = _dead_end(rng, p, moves, start)
        if wrong is not None and (start, wrong) not in found:
            found.append((start, wrong))
    else:
        raise NoDeadEndError(
            f"Problem {p.id!r} has {len(found)} different dead ends in {TRIES} tries, not {dead_ends}: ask for fewer."
        )
    return _written(p, moves, sorted(found, key=lambda end: end[0]))


def _dead_end(rng: random.Random, p: Problem, moves: Sequence[Move], start: int) -> tuple[Move, ...] | None:
    """From move ``start`` on another first operation, and on to the end with the numbers left; never through the target."""
    left = [moves[0].left, *(m.right for m in moves)] if start == 0 else [m.right for m in moves[start:]]
    rng.shuffle(left)
    chain = _chain(rng, left if start == 0 else [moves[start].left, *left])
    if chain is None or chain[0] == moves[start] or any(m.result == p.meta["target"] for m in chain):
        return None
    return tuple(chain)


def _written(p: Problem, moves: Sequence[Move], ends: Sequence[tuple[int, tuple[Move, ...]]]) -> Trace:
    steps: list[TraceStep] = []
    lines: list[str] = []

    def write(step: TraceStep) -> None:
        steps.append(step)
        lines.append(str(step))

    done = 0
    for k, (start, wrong) in enumerate(ends):
        for i in range(done, start):
            write(TraceStep(i + 1, moves[i], None))
        done = start
        for i, move in enumerate(wrong, start):
            write(TraceStep(i + 1, move, k))
        lines.append(f"That ends at {wrong[-1].result}, not at {p.meta['target']}. Back to step {start}.")
    for i in range(done, len(moves)):
        write(TraceStep(i + 1, moves[i], None))
    return Trace("\n".join(lines) + "\n", tuple(steps), expression(moves))


def examples(
    problems: Sequence[Problem], dead_ends: int, *, seed: int = 0, tags: tuple[str, str] = ("<think>", "</think>")
) -> list[dict]:
    """Conversations to fine-tune on: ``{"messages": [question, thinking in tags and the answer]}``, a problem each."""
    rows = []
    for p in problems:
        told = trace(p, dead_ends, seed=seed)
        reply = {"role": "assistant", "content": f"{tags[0]}\n{told.text}{tags[1]}\n{told.answer}"}
        rows.append({"messages": [*map(dict, p.messages), reply]})
    return rows


# --- checking ------------------------------------------------------------------------------------------------


def verify(text: str, numbers: Sequence[int], target: int, *, every: bool = False) -> bool:
    """Whether the last expression of a text makes the target of the numbers, each used at most once; exact fractions.

    ``expression = value`` is read as the expression. Anything but whole numbers, ``+ - * /`` and brackets is wrong.

    Args:
        every: Each number has to be used.
    """
    found = [
        e.strip()
        for e in re.findall(r"[\d(][\d +*/()-]*", text[-LONGEST_ANSWER:].replace("×", "*").replace("÷", "/").replace("−", "-"))
    ]
    told = [e for e in found if re.search(r"\d\s*\)*\s*[+*/-]\s*\(*\s*\d", e)]
    if not told:
        return False
    try:
        value, used = _value(ast.parse(told[-1], mode="eval").body)
    except (SyntaxError, ZeroDivisionError, ValueError):
        return False
    return value == target and (Counter(used) == Counter(numbers) if every else Counter(used) <= Counter(numbers))


def _value(node: ast.AST) -> tuple[Fraction, list[int]]:
    """Value of an expression and the numbers in it. Raises ValueError for anything but whole numbers and the four operations."""
    match node:
        case ast.Constant(value=int(number)):
            return Fraction(number), [number]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _NODES:
            (a, used), (b, more) = _value(left), _value(right)
            return _OPS[_NODES[type(op)]](a, b), used + more
    raise ValueError(f"{ast.dump(node)} is no number and none of + - * /.")
