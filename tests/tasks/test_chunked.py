"""Chains with t operations per line: every line recomputes, the lines are ceil(T / t), and joined they use every digit once in order."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.tasks.generators import chunked
from toolkit.tasks.grading import grade

DIGITS = st.lists(st.integers(0, 9), min_size=2, max_size=20)


@given(DIGITS, st.integers(1, 25))
def test_every_line_recomputes_and_together_they_use_every_digit_in_order(digits, size):
    lines = chunked.lines(digits, size)
    assert len(lines) == math.ceil((len(digits) - 1) / size)
    used, before = [digits[0]], digits[0]
    for i, line in enumerate(lines):
        left, right = line.split("=")
        values = list(map(int, left.split("+")))
        assert values[0] == before and int(right) == sum(values) % 10
        assert len(values) - 1 == (size if i + 1 < len(lines) else (len(digits) - 2) % size + 1)
        used, before = used + values[1:], int(right)
    assert used == digits and before == sum(digits) % 10


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_response_of_every_size_has_the_right_answer_and_splits_are_disjoint(split):
    rng = random.Random(0)
    for _ in range(30):
        p = chunked.problem(rng, split, 6)
        assert p.meta["split"] == split and p.meta["difficulty"] == 6 == p.messages[0]["content"].count("+")
        for size in (1, 2, 3, 9):
            text = chunked.response(p, size)
            thought, answer = text.removeprefix("<think>").split("</think>")
            assert thought.count("\n") == math.ceil(6 / size) and grade(p, answer)
    others = {chunked.problem(rng, "dev", 3).id for _ in range(200)}
    assert not others & {chunked.problem(rng, split, 3).id for _ in range(200)}


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="size=0"):
        chunked.lines([1, 2], 0)
    with pytest.raises(ValueError, match="1 digits"):
        chunked.lines([1], 1)
    with pytest.raises(ValueError, match="Unknown split"):
        chunked.problem(random.Random(0), "valid", 3)
