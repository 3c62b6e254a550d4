"""ALP, GR3 and DOT against naive loops over rollouts, and the claims in their files."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from batches import batch_of
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from toolkit import rewards
from toolkit.rewards import RewardBatch, groups
from toolkit.rewards.alp import ALP
from toolkit.rewards.dot import DOT, can_fire
from toolkit.rewards.gr3 import GR3, average_margin, factors
from toolkit.types import Rollout, Span


@st.composite
def batches(draw):
    """Up to 4 problems with up to 12 rows each, in any order; half of the problems have right answers only."""
    rows = []
    for g in range(draw(st.integers(1, 4))):
        easy = draw(st.booleans())
        size = draw(st.integers(1, 12))
        rows += [
            (f"q{g}", easy or draw(st.booleans()), draw(st.one_of(st.integers(0, 60), st.integers(0, 900)))) for _ in range(size)
        ]
    rows = draw(st.permutations(rows))
    return batch_of([r[1] for r in rows], [r[2] for r in rows], [r[0] for r in rows])


def members(batch: RewardBatch, row: int) -> list[int]:
    return [i for i in range(len(batch)) if batch["problem_id"][i] == batch["problem_id"][row]]


# --- ALP ---------------------------------------------------------------------------------------------------------


@given(batch=batches(), beta=st.floats(0, 0.1))
def test_alp_charges_each_token_by_the_solve_rate(batch, beta):
    expected = []
    for i in range(len(batch)):
        group = members(batch, i)
        rate = sum(bool(batch["correct"][j]) for j in group) / len(group)
        expected.append(float(batch["correct"][i]) - beta * batch["tokens"][i] * max(rate, 1 / len(group)))
    assert_allclose(ALP(beta)(batch).values, expected, atol=1e-9)


def test_alp_in_fractions_of_a_length_is_alp_with_a_smaller_price():
    batch = batch_of([1, 0, 1], [100, 300, 50])
    assert_allclose(ALP(0.5, "fraction", 1000)(batch).values, ALP(0.0005)(batch).values)


def test_alp_matters_in_a_mixed_group_only_if_advantages_are_not_divided_by_the_spread_of_correctness():
    """The published price is far below correctness in a mixed group, and at unit scale in a group that is all right."""
    mixed, solved = batch_of([1, 0], [8000, 100]), batch_of([1, 1], [8000, 100])
    assert np.ptp(ALP()(mixed).values) == pytest.approx(1, abs=1e-3)
    values = ALP()(solved).values
    assert 0 < np.ptp(values) < 1e-3
    assert_allclose(groups.z_scores(values, solved.groups, np.ones(2, bool), ddof=1), [-math.sqrt(0.5), math.sqrt(0.5)])


# --- GR3 ---------------------------------------------------------------------------------------------------------


@given(batch=batches(), alpha=st.floats(0, 3))
def test_gr3_divides_by_the_length_relative_to_the_group(batch, alpha):
    expected = []
    for i in range(len(batch)):
        average = statistics.mean(int(batch["tokens"][j]) for j in members(batch, i))
        ratio = batch["tokens"][i] / average if average else 1.0
        expected.append(float(batch["correct"][i]) / (1 + alpha * ratio))
    assert_allclose(GR3(alpha)(batch).values, expected, atol=1e-9)


@given(batch=batches(), scale=st.integers(2, 9))
def test_gr3_does_not_depend_on_the_unit_of_length(batch, scale):
    longer = batch.with_columns(tokens=batch["tokens"] * scale)
    assert_allclose(GR3()(longer).values, GR3()(batch).values)


def test_the_margin_of_gr3_is_the_advantage_of_an_average_right_answer():
    batch = batch_of([1, 1, 0, 1, 1], [100, 300, 200, 50, 5000], ["a", "a", "a", "b", "b"])
    values = GR3(0.5)(batch).values
    assert_allclose(average_margin(batch, 0.5), [1 / 1.5 - values[:3].mean(), 1 / 1.5 - values[3:].mean()])
    assert average_margin(batch_of([1, 1, 1], [1, 1, 1000]), 1.0)[0] < 0, "so many short answers discourage an average one"
    assert factors(batch_of([1, 1], [0, 0]), 1.0).tolist() == [0.5, 0.5]


# --- DOT ---------------------------------------------------------------------------------------------------------


@given(batch=batches(), alpha=st.sampled_from([0.5, 1.0, 1.5, 3.0]), margin=st.sampled_from([0.25, 4, 32]))
def test_dot_takes_the_reward_of_outliers_in_solved_groups(batch, alpha, margin):
    expected = []
    for i in range(len(batch)):
        lengths = [int(batch["tokens"][j]) for j in members(batch, i)]
        solved = all(batch["correct"][j] for j in members(batch, i))
        spread = statistics.stdev(lengths) if len(lengths) > 1 else 0.0
        limit = math.floor(statistics.fmean(lengths) + alpha * spread + 1e-9)
        length = lengths[members(batch, i).index(i)]
        needed = max(16, margin * length) if margin < 1 else margin
        expected.append(0.0 if solved and length - limit >= needed else float(batch["correct"][i]))
    assert_allclose(DOT(alpha, margin)(batch).values, expected)


@pytest.mark.parametrize("samples", [*range(1, 40), 200])
@pytest.mark.parametrize("alpha", [1.5, 3])
def test_dot_can_fire_just_where_one_extreme_length_is_cut(samples, alpha):
    """One very long response among equal ones has the largest possible z-score, (G - 1) / sqrt(G)."""
    batch = batch_of([1] * samples, [100] * (samples - 1) + [10**6])
    fires = bool(DOT(alpha, margin=1)(batch).values.min() == 0)
    assert fires == can_fire(samples, alpha) == (DOT(alpha).warning(samples) is None)


def test_dot_says_that_it_cuts_nothing_with_eight_samples():
    assert "dot cuts nothing: of 8 lengths, none is more than 2.47 standard deviations" in DOT().warning(8)
    assert DOT().warning(32) is None


# --- uses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ALP(-1), "beta=-1"),
        (lambda: ALP(assumed_unit="words"), "choose tokens or fraction"),
        (lambda: ALP(assumed_unit="fraction"), "positive length"),
        (lambda: ALP(longest=100), "none with 'tokens'"),
        (lambda: GR3(-0.1), "alpha=-0.1"),
        (lambda: DOT(margin=0), "margin"),
        (lambda: DOT(least=2), "least"),
    ],
)
def test_bad_parameters_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("name", ["alp", "gr3", "dot"])
def test_trl_and_offline_scoring_pay_the_same(name):
    lengths, correct = [20, 20, 20, 20, 20, 300], [True] * 6
    reward = rewards.ALL[name].make(**{"dot": {"alpha": 1.5}}.get(name, {}))
    entry = rewards.as_trl(reward, generations=6, columns={"correct": lambda completions, **_: correct})
    paid = entry(["?"] * 6, ["7"] * 6, [list(range(n)) for n in lengths])
    rollouts = [
        Rollout("q", i, tuple(range(n + 1)), 1, Span(2, n), Span(n, n + 1), "stop", "7", True) for i, n in enumerate(lengths)
    ]
    assert_allclose(rewards.score(rollouts, reward)["reward"], paid)
    assert paid[5] < paid[0]
