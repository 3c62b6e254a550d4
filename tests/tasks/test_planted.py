"""Planted errors: right arithmetic around them, the rate that was asked for, and a control with equal totals and no error."""

from __future__ import annotations

import re

import numpy as np
import pytest

from toolkit.tasks import arithmetic, running_sum
from toolkit.tasks.generators import planted as planting

CHAINS = running_sum.load("test", 40, horizons=(8, 8))


def written(history) -> list[tuple[int, int, int]]:
    """``(before, operand, total)`` of every line, read by a pattern that shares nothing with the code."""
    return [tuple(map(int, m)) for m in re.findall(r"^(-?\d+)([+-]\d+)=(-?\d+)$", history.text, flags=re.MULTILINE)]


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_every_line_goes_on_from_the_line_before_and_is_wrong_exactly_where_it_says(rate):
    for p in CHAINS:
        history = running_sum.planted(p, 5, rate)
        lines = written(history)
        assert len(lines) == 5 and lines[0][0] == p.meta["start"]
        assert [operand for _, operand, _ in lines] == list(p.meta["deltas"][:5])
        assert [before for before, _, _ in lines[1:]] == [total for _, _, total in lines[:-1]] == list(history.totals[:-1])
        assert [a + b != total for a, b, total in lines] == list(history.wrong)
        assert all(abs(a + b - total) <= 10 for a, b, total in lines)
        assert history.problem.answer == str(history.totals[-1] + sum(p.meta["deltas"][5:])), "gold follows the history"


def test_without_errors_the_history_is_the_truth_and_the_reader_agrees_with_the_flags():
    for p in CHAINS:
        assert list(running_sum.planted(p, 8 - 1, 0.0).totals) == running_sum.totals(p)[:7]
        history = running_sum.planted(p, 7, 0.5)
        assert [not step for step in running_sum.execution_of(p, history.text).step[:7]] == list(history.wrong)


def test_errors_come_at_the_nominal_rate_where_they_are_possible_and_are_nested():
    low, high = ([running_sum.planted(p, 7, rate).wrong for p in CHAINS] for rate in (0.3, 1.0))
    possible = np.mean(high)
    assert possible > 0.9, "an error is nearly always possible"
    n = 7 * len(CHAINS)
    assert abs(np.mean(low) - 0.3 * possible) < 4 * np.sqrt(0.21 / n)
    # The same draws decide at both rates. At rate 1 every turn is drawn, so this holds trivially; compare two rates below 1.
    more = [running_sum.planted(p, 7, 0.8).wrong for p in CHAINS]
    missed = sum(a and not b for x, y in zip(low, more, strict=True) for a, b in zip(x, y, strict=True))
    assert missed <= 0.02 * n, "a turn drawn at a low rate is drawn at a higher one, unless no error is possible there"


def test_later_totals_stay_in_the_range_that_the_model_was_trained_on():
    for p in CHAINS:
        history = running_sum.planted(p, 5, 1.0)
        later = history.totals[-1] + np.cumsum(p.meta["deltas"][5:])
        assert min(*history.totals, *later) >= 0 and max(*history.totals, *later) <= arithmetic.LARGEST


def test_the_control_has_equal_totals_and_next_lines_but_no_error():
    for p in CHAINS:
        history = running_sum.planted(p, 5, 1.0)
        control = running_sum.explained(history)
        assert control.totals == history.totals and not any(control.wrong) and any(history.wrong)
        assert all(a + b == total for a, b, total in written(control))
        expression = control.problem.messages[0]["content"].removesuffix("=?")
        values, signs = arithmetic.parse(expression)
        assert all(1 <= v <= planting.LARGEST_OPERAND for v in values)
        assert eval(expression) == int(control.problem.answer) == int(history.problem.answer)
        assert len(signs) == 8 and control.problem.meta["deltas"][5:] == p.meta["deltas"][5:]
        assert control.problem.id != history.problem.id


def test_the_largest_operand_is_that_of_the_task():
    largest = max(v for p in running_sum.load("train", 300) for v in arithmetic.parse(p.meta["expression"])[0])
    assert largest == planting.LARGEST_OPERAND


@pytest.mark.parametrize(("turns", "rate", "noise"), [(0, 0.1, 10), (8, 0.1, 10), (3, 1.1, 10), (3, -0.1, 10), (3, 0.1, 0)])
def test_a_history_that_cannot_be_is_refused(turns, rate, noise):
    with pytest.raises(ValueError, match=f"turns={turns}, rate={rate}, noise={noise}: need 1 to 7 turns"):
        running_sum.planted(CHAINS[0], turns, rate, noise=noise)


def test_another_task_is_refused():
    with pytest.raises(ValueError, match=r"give a problem of running_sum\.load"):
        running_sum.planted(arithmetic.load("test", 1)[0], 1)
