"""Mentalese: the rule keeps every equation and nothing else, its inverse restores them, the control is as long and has fewer steps."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.methods import mentalese
from toolkit.tasks import arithmetic
from toolkit.tasks.generators.traces import Habits

VERBOSE = Habits(wait_calm=0.6, wait_hasty=0.3, slip_easy=0.1, slip_hard=0.1)


def trace_of(seed: int) -> str:
    rng = random.Random(seed)
    return arithmetic.write_trace(arithmetic.problem(rng, "train"), rng, VERBOSE).text


def naive(trace: str) -> str:
    """The lines of a generated trace without re-checks; a corrected line has its right result."""
    lines: list[str] = []
    for line in trace.splitlines():
        if line.startswith("wait "):
            lines[-1] = line.split()[1]
        else:
            lines.append(line)
    return "".join(f"{line}\n" for line in lines)


@given(st.integers(0, 10**6))
def test_mentalese_expands_to_the_steps_without_words_and_checks(seed):
    trace = trace_of(seed)
    short = mentalese.compress(trace)
    assert mentalese.expand(short) == naive(trace)
    assert mentalese.compress(mentalese.expand(short)) == short
    assert len(short) < len(trace) and not any(c.isspace() or c.isalpha() for c in short)


def test_words_blanks_and_lines_without_an_equation_are_dropped():
    text = "First I add.\n17 + 5 = 22 apples, as asked\nSo 22 - 9.5 = 12.5!\nDone.\nThat makes = 12.5\n"
    assert mentalese.compress(text) == "17+5=22-9.5=12.5;=12.5"
    assert mentalese.compress("no numbers here") == mentalese.expand("") == ""


def test_a_number_that_only_begins_like_the_result_before_is_kept():
    assert mentalese.compress("1+1=2\n22-9=13\n") == "1+1=2;22-9=13"
    assert mentalese.compress("3-5=-2\n-2+7=5\n") == "3-5=-2+7=5"


def test_an_equation_that_returns_later_is_a_step_of_its_own():
    assert mentalese.expand(mentalese.compress("10-5=5\n5+5=10\n10-5=5\n")) == "10-5=5\n5+5=10\n10-5=5\n"


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_the_control_keeps_steps_whole_and_in_order_and_comes_near_the_length(seed, share):
    trace = trace_of(seed)
    thin = mentalese.thinned(trace, share * len(trace), random.Random(seed))
    kept, lines = thin.splitlines(keepends=True), trace.splitlines(keepends=True)
    rest = iter(lines)
    assert all(line in rest for line in kept)
    assert abs(len(thin) - share * len(trace)) <= max(map(len, lines))
    assert mentalese.thinned(trace, len(trace), random.Random(seed)) == trace


def test_the_control_is_chosen_at_random_and_by_its_measure():
    trace = "1+1=2\n2+1=3\n3+1=4\n4+1=5\n"
    assert len({mentalese.thinned(trace, 6, random.Random(s)) for s in range(20)}) == 4
    assert mentalese.thinned(trace, 2, random.Random(0), measure=lambda text: text.count("\n")).count("\n") == 2


def test_a_text_that_is_not_mentalese_is_refused():
    with pytest.raises(ValueError, match="no number after an equals sign"):
        mentalese.expand("17+5=x")
