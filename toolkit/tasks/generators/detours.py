"""Chains of thought (*traces*) that solve 4 x 4 Sudoku with exactly k dead ends.

After "How Much Backtracking is Enough?" (arXiv 2505.24273); ``backtracking`` does the same for countdown. A trace fills the blanks in
reading order. In between, it tries a wrong digit, goes on until a blank has no digit left (a *dead end*), and goes back, k times in all.
Example for k = 1 (the first row is ``. . 3 4``)::

    A1 = 2
    A2 = 1
    B1 none, back to A1
    A1 = 1
    A2 = 2

Every digit differs from those in its row, column and box when it is written. Between the wrong digit and the blank without a digit, each
blank has only one possible digit. So a dead end proves that its first digit is wrong.

Deviations: the paper takes wrong digits from a depth-first search on 9 x 9 cells; the words of the trace, and that the digits of a dead end
are forced, are ours.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from toolkit.tasks.generators.backtracking import NoDeadEndError
from toolkit.tasks.sudoku import BLANK, candidates, name, written
from toolkit.types import Problem


@dataclass(frozen=True)
class Placed:
    """A digit that a trace writes into a cell.

    Attributes:
        cell: Index of the cell, 0 to 15, row by row.
        digit: The digit, 1 to 4.
        dead_end: Index, from 0, of the dead end that the step belongs to; ``None`` for a digit of the solution.
    """

    cell: int
    digit: int
    dead_end: int | None

    def __str__(self) -> str:
        return f"{name(self.cell)} = {self.digit}"


@dataclass(frozen=True)
class Trace:
    """A chain of thought that solves a Sudoku, with its dead ends marked.

    Attributes:
        text: The text between the think tags.
        steps: All digits in the order in which they are written, including those in dead ends.
        answer: The filled rows.
    """

    text: str
    steps: tuple[Placed, ...]
    answer: str

    @property
    def dead_ends(self) -> int:
        """Number of dead ends in the chain of thought."""
        return len({step.dead_end for step in self.steps} - {None})


@dataclass(frozen=True)
class DeadEnd:
    """A wrong digit and the digits that follow from it, up to a blank for which no digit is possible.

    Attributes:
        placed: Pairs ``(cell, digit)`` in the order of writing, with cells and digits as in ``Placed``. The first is the wrong digit.
        stuck: Index of the cell for which no digit is possible.
    """

    placed: tuple[tuple[int, int], ...]
    stuck: int


def dead_ends(p: Problem) -> list[DeadEnd]:
    """Return all dead ends of a Sudoku in which every digit after the first is forced, in order of their cells and digits.

    Before the first digit of a dead end, all blanks before its cell hold the digits of the solution.

    Raises:
        ValueError: the problem is not of ``tasks.sudoku``.
    """
    if p.meta.get("task") != "sudoku":
        raise ValueError(f"Problem {p.id!r} is of task {p.meta.get('task')!r}, not sudoku.")
    grid, found = list(p.meta["grid"]), []
    for cell in [i for i, digit in enumerate(grid) if digit == BLANK]:
        right = p.meta["solution"][cell]
        found += [end for digit in candidates(grid, cell) if digit != right and (end := _forced(grid, cell, digit))]
        grid[cell] = right
    return found


def _forced(grid: list[int], cell: int, digit: int) -> DeadEnd | None:
    """Return the dead end that begins with a digit in a cell; ``None`` if a blank after it has several digits."""
    grid, placed = list(grid), []
    while True:
        grid[cell] = digit
        placed.append((cell, digit))
        cell = grid.index(BLANK)  # there is one: with a wrong digit, the grid cannot be filled
        possible = candidates(grid, cell)
        if len(possible) > 1:
            return None
        if not possible:
            return DeadEnd(tuple(placed), cell)
        (digit,) = possible


def trace(p: Problem, k: int, *, seed: int = 0) -> Trace:
    """Return a chain of thought that solves the Sudoku ``p`` and contains exactly ``k`` different dead ends, chosen at random.

    Equal seeds give equal results.

    Raises:
        NoDeadEndError: the puzzle has fewer than ``k`` dead ends.
        ValueError: the problem is not of ``tasks.sudoku``.
    """
    found = dead_ends(p)
    if len(found) < k:
        raise NoDeadEndError(f"Problem {p.id!r} has {len(found)} dead ends, not {k}: ask for fewer, or for more blanks.")
    chosen = sorted(random.Random(f"{p.id}-{k}-{seed}").sample(range(len(found)), k))
    steps: list[Placed] = []
    lines: list[str] = []
    solution = p.meta["solution"]
    for cell in [i for i, digit in enumerate(p.meta["grid"]) if digit == BLANK]:
        for number, index in enumerate(chosen):
            end = found[index]
            if end.placed[0][0] == cell:
                steps += (own := [Placed(c, d, number) for c, d in end.placed])
                lines += [*map(str, own), f"{name(end.stuck)} none, back to {name(cell)}"]
        steps.append(Placed(cell, solution[cell], None))
        lines.append(str(steps[-1]))
    return Trace("\n".join(lines) + "\n", tuple(steps), written(solution))
