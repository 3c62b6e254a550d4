"""Sudoku of 4 x 4 cells: fill the blanks so that every row, column and 2 x 2 box has each digit from 1 to 4 once.

The task stands beside ``countdown``, as in arXiv 2505.24273. ``generators/detours.py`` writes chains of thought that try a given number of
wrong digits and go back. The difficulty is the number of blanks.

A prompt shows the rows, with ``.`` for a blank, as in ``1 . 3 . / . . 1 2 / 2 1 . . / . 3 . 1``. The answer shows the filled rows in the
same form. Each puzzle has exactly one solution. An answer is right if its last 16 digits without letters between them are the solution.

Deviations: the paper's Sudoku has 9 x 9 cells. The smaller size, the number of blanks and the words of the prompt are ours.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from toolkit.tasks import splits
from toolkit.types import Problem

SIDE, BOX = 4, 2  # cells per row, and per side of a box
BLANKS = (6, 10)  # range of the number of blanks; with more than 12, a 4 x 4 puzzle has several solutions
BLANK = 0

Grid = tuple[int, ...]
"""The 16 digits, row by row; 0 is a blank."""


def problem(rng: random.Random, split: str, *, blanks: tuple[int, int] = BLANKS) -> Problem:
    """Draw random puzzles until one belongs to ``split``, and return it. A hash of the puzzle decides the split.

    ``meta["grid"]`` holds the puzzle and ``meta["solution"]`` its only solution, each as 16 digits row by row; 0 is a blank.

    Args:
        rng: Source of every random choice.
        split: ``"train"``, ``"dev"`` or ``"test"``.
        blanks: Inclusive range of the number of blanks.
    """
    while True:
        solution = filled(rng)
        grid = list(solution)
        for cell in rng.sample(range(SIDE**2), rng.randint(*blanks)):
            grid[cell] = BLANK
        content = f"Fill the blanks of this Sudoku: {written(grid)}"
        if splits.split_of(written(grid)) == split and len(list(solutions(grid, most=2))) == 1:
            break
    meta = {
        "task": "sudoku",
        "split": split,
        "difficulty": grid.count(BLANK),
        "grader": "sudoku",
        "grid": grid,
        "solution": list(solution),
    }
    return Problem(f"sudoku-{splits.digest(content)}", ({"role": "user", "content": content},), written(solution), meta)


def load(split: str, n: int = 200, seed: int = 0, *, blanks: tuple[int, int] = BLANKS) -> list[Problem]:
    """Return ``n`` different problems of ``split`` ("train", "dev" or "test"). Equal seeds give equal problems.

    Args:
        blanks: Inclusive range of the number of blanks.

    Raises:
        ValueError: unknown split, a range outside 1..12, or fewer than ``n`` different problems in that range.
    """
    splits.check_split(split)
    if not 1 <= blanks[0] <= blanks[1] <= 12:
        raise ValueError(f"blanks={blanks}: give an inclusive range within 1..12. With more blanks a puzzle has several solutions.")
    rng = random.Random(f"sudoku-{split}-{seed}")
    return splits.distinct(lambda: problem(rng, split, blanks=blanks), n)


def written(grid: Sequence[int]) -> str:
    """Return a grid as text, such as ``1 . 3 4 / 3 4 1 2 / 2 1 4 3 / 4 3 2 1``; ``.`` is a blank."""
    rows = (grid[i : i + SIDE] for i in range(0, SIDE**2, SIDE))
    return " / ".join(" ".join(str(digit) if digit else "." for digit in row) for row in rows)


def name(cell: int) -> str:
    """Return the name of a cell: a letter for its row and a number for its column.

    >>> name(0), name(7)
    ('A1', 'B4')
    """
    return f"{'ABCD'[cell // SIDE]}{cell % SIDE + 1}"


def neighbours(cell: int) -> list[int]:
    """Return the other cells in the row, column and box of a cell, in order. Their digits must differ from that of the cell."""
    row, column = divmod(cell, SIDE)

    def meets(other: int) -> bool:
        r, c = divmod(other, SIDE)
        return r == row or c == column or (r // BOX, c // BOX) == (row // BOX, column // BOX)

    return [other for other in range(SIDE**2) if other != cell and meets(other)]


_NEIGHBOURS = [neighbours(cell) for cell in range(SIDE**2)]


def candidates(grid: Sequence[int], cell: int) -> list[int]:
    """Return the digits that a blank cell may have: those in none of its neighbours, in order."""
    seen = {grid[other] for other in _NEIGHBOURS[cell]}
    return [digit for digit in range(1, SIDE + 1) if digit not in seen]


def solutions(grid: Sequence[int], *, most: int) -> Iterator[Grid]:
    """Yield the solutions of a puzzle, at most ``most`` of them, by depth-first search over the blanks in order."""
    if most < 1:
        return
    if BLANK not in grid:
        yield tuple(grid)
        return
    cell, count = list(grid).index(BLANK), 0
    for digit in candidates(grid, cell):
        for solution in solutions([*grid[:cell], digit, *grid[cell + 1 :]], most=most - count):
            count += 1
            yield solution
        if count >= most:
            return


def filled(rng: random.Random) -> Grid:
    """Return a random solved grid. There are 288 solved 4 x 4 grids, and all are equally likely."""
    return rng.choice(_ALL)


_ALL = list(solutions([BLANK] * SIDE**2, most=10**6))
