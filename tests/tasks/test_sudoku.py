"""Sudoku: puzzles have one solution, traces keep the rules at every step and have exactly k dead ends, each of which proves its digit wrong."""

from __future__ import annotations

import random
import re
from itertools import permutations, product

import pytest

from toolkit.tasks import countdown, sudoku
from toolkit.tasks.generators import detours
from toolkit.tasks.generators.backtracking import NoDeadEndError
from toolkit.tasks.grading import grade
from toolkit.types import Problem

UNITS = (
    [[4 * r + c for c in range(4)] for r in range(4)]
    + [[4 * r + c for r in range(4)] for c in range(4)]
    + [[4 * (2 * R + r) + 2 * C + c for r, c in product(range(2), repeat=2)] for R, C in product(range(2), repeat=2)]
)


def naive_solutions(grid) -> set[tuple[int, ...]]:
    """All choices of four rows that are permutations, of which those that keep every unit and every given digit."""
    rows = list(permutations((1, 2, 3, 4)))
    fits = [[row for row in rows if all(g in (0, d) for g, d in zip(grid[4 * r : 4 * r + 4], row, strict=True))] for r in range(4)]
    whole = (sum(four, ()) for four in product(*fits))
    return {one for one in whole if all(len({one[i] for i in unit}) == 4 for unit in UNITS)}


def test_there_are_288_grids_and_neighbours_share_a_unit():
    assert len(set(sudoku._ALL)) == len(sudoku._ALL) == 288
    for cell in range(16):
        assert set(sudoku.neighbours(cell)) == {i for unit in UNITS if cell in unit for i in unit} - {cell}


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_puzzle_has_exactly_the_solution_it_stores(split):
    for p in sudoku.load(split, 60, seed=1):
        assert naive_solutions(p.meta["grid"]) == {tuple(p.meta["solution"])}
        assert p.meta["grid"].count(0) == p.meta["difficulty"]
        shown = p.messages[0]["content"].split(": ")[1].replace("/", "").replace(".", "0").split()
        assert list(map(int, shown)) == p.meta["grid"]
        assert grade(p, p.answer)
        wrong = p.answer.replace("1", "x").replace("2", "1").replace("x", "2")
        assert not grade(p, wrong)


def test_a_right_grid_in_a_sentence_is_right_and_a_wrong_one_is_not():
    for p in sudoku.load("test", 5):
        rows = p.answer.split(" / ")
        puzzle = sudoku.written(p.meta["grid"])
        for text in (
            f"The solution is {p.answer}.",
            f"**{p.answer}**",
            f"The solved grid:\n```\n{chr(10).join(rows)}\n```\nAll 4 rows, 4 columns and boxes hold the digits 1 to 4.",
            "\n".join(f"| {row.replace(' ', ' | ')} |" for row in rows),
            p.answer.replace(" ", "").replace("/", "\n"),
            f"{puzzle} -> {p.answer}",
        ):
            assert grade(p, text), text
            assert not grade(p, text.translate(str.maketrans("12", "21"))), text
        for text in (
            "",
            "1 2 3 4",
            puzzle,
            f"{p.answer} or rather {sudoku.written(sudoku.filled(random.Random(0)))}",
            " / ".join(rows[::-1]),
        ):
            assert not grade(p, text), text


def test_several_solutions_are_counted_up_to_the_bound():
    grid = [1, 2, 3, 4] + [0] * 12
    assert set(sudoku.solutions(grid, most=100)) == naive_solutions(grid)
    assert [len(list(sudoku.solutions(grid, most=m))) for m in (0, 1, 5)] == [0, 1, 5]


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_a_trace_replayed_from_its_text_keeps_the_rules_and_has_exactly_k_dead_ends(k):
    written = 0
    for p in sudoku.load("train", 150, blanks=(10, 12)):
        if len(detours.dead_ends(p)) < k:
            with pytest.raises(NoDeadEndError, match=f"not {k}"):
                detours.trace(p, k)
            continue
        trace, written = detours.trace(p, k), written + 1
        grid, stack, backs, steps = list(p.meta["grid"]), [], [], []
        for line in trace.text.splitlines():
            if placed := re.fullmatch(r"([A-D])([1-4]) = ([1-4])", line):
                cell, digit = 4 * "ABCD".index(placed[1]) + int(placed[2]) - 1, int(placed[3])
                assert cell == grid.index(0), "blanks are filled in order"
                assert all(grid[i] != digit for unit in UNITS if cell in unit for i in unit)
                grid[cell] = digit
                stack.append(cell)
                steps.append((cell, digit))
                continue
            row, column, to = re.fullmatch(r"([A-D])([1-4]) none, back to ([A-D][1-4])", line).groups()
            stuck = 4 * "ABCD".index(row) + int(column) - 1
            assert stuck == grid.index(0)
            assert {grid[i] for unit in UNITS if stuck in unit for i in unit} >= {1, 2, 3, 4}, "no digit is left"
            while (cell := stack.pop()) != 4 * "ABCD".index(to[0]) + int(to[1]) - 1:
                grid[cell] = 0
            assert not naive_solutions(grid), "the digit that is given up is wrong"
            backs.append((cell, grid[cell]))
            grid[cell] = 0
        assert grid == p.meta["solution"] and trace.answer == p.answer
        assert len(backs) == len(set(backs)) == k == trace.dead_ends
        assert steps == [(s.cell, s.digit) for s in trace.steps]
        assert [s.digit == p.meta["solution"][s.cell] for s in trace.steps if s.dead_end is None] == [True] * p.meta["difficulty"]
    assert written > 10


def test_dead_ends_are_all_wrong_digits_whose_consequences_are_forced():
    for p in sudoku.load("train", 40, seed=2):
        found = {end.placed[0] for end in detours.dead_ends(p)}
        grid, wanted = list(p.meta["grid"]), set()
        for cell in [i for i, d in enumerate(grid) if d == 0]:
            for digit in {1, 2, 3, 4} - {p.meta["solution"][cell]}:
                trial, at, options = list(grid), cell, [digit]
                if any(grid[i] == digit for unit in UNITS if cell in unit for i in unit):
                    continue
                while len(options) == 1:
                    trial[at] = options[0]
                    at = trial.index(0)
                    options = sorted({1, 2, 3, 4} - {trial[i] for unit in UNITS if at in unit for i in unit})
                if not options:
                    wanted.add((cell, digit))
            grid[cell] = p.meta["solution"][cell]
        assert found == wanted


def test_equal_seeds_give_equal_traces_and_other_seeds_others():
    p = next(p for p in sudoku.load("train", 50) if len(detours.dead_ends(p)) > 3)
    assert detours.trace(p, 1, seed=3) == detours.trace(p, 1, seed=3)
    assert len({detours.trace(p, 1, seed=s).text for s in range(30)}) > 1


def test_bad_ranges_and_problems_of_other_tasks_are_refused():
    with pytest.raises(ValueError, match=r"blanks=\(3, 14\)"):
        sudoku.load("train", 5, blanks=(3, 14))
    with pytest.raises(ValueError, match="of task 'countdown', not sudoku"):
        detours.dead_ends(countdown.load("train", 1)[0])
    assert isinstance(sudoku.problem(random.Random(0), "dev"), Problem)
