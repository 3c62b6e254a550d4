"""Metrics against naive loops, where their intervals end, and the one text cell."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats as scipy_stats

from toolkit import metrics, stats
from toolkit.metrics import METRICS, Judge, Outcomes, outcomes
from toolkit.stats import Effect

# --- what is possible ----------------------------------------------------------------------------------------------


def test_intervals_end_where_their_metric_does():
    base = Effect(30.0, 27.0, 33.0, 0.5)
    wide = Effect(0.6, -2.4, 3.1, math.nan, "2 seeds")
    share, tokens, score = (metrics.described(m) for m in ("accuracy_anything", "think_tokens", "aes"))
    ends = [
        (e.low, e.high)
        for e in (
            wide.within(share.bounds),
            wide.within(share.change_bounds(base)),
            wide.within(tokens.bounds),
            wide.within(score.bounds),
        )
    ]
    assert ends == [(0.0, 1.0), (-1.0, 1.0), (0.0, 3.1), (-2.4, 3.1)]
    shorter = Effect(-20.0, -95.0, 55.0, math.nan, "2 seeds").within(tokens.change_bounds(base))
    assert (shorter.low, shorter.high) == (-33.0, 55.0), "nothing shrinks by more than all of it"
    assert all(m.bounds[0] == 0 for m in metrics.METRICS.values() if m.unit in ("share", "tokens", "nats"))


# --- metrics against naive loops ---------------------------------------------------------------------------------


def of(correct, think, response=None, answers=None) -> Outcomes:
    zeros = np.zeros_like(correct)
    given = {"closed": zeros, "looping": zeros, "leaking": zeros, "answers": zeros if answers is None else answers}
    return Outcomes(correct=correct, think_tokens=think, response_tokens=zeros if response is None else response, **given)


def made_up(seed=0, n=7, samples=4) -> Outcomes:
    rng = np.random.default_rng(seed)
    correct, tokens = rng.integers(0, 2, (n, samples)).astype(float), rng.integers(5, 60, (n, samples)).astype(float)
    # Right answers are answer 0; wrong ones differ; one response never answered.
    answers = np.where(correct == 1, 0, rng.integers(1, 3, (n, samples))).astype(float)
    answers[0, 0], correct[0, 0] = -1, 0
    return of(correct, tokens, tokens + 4, answers)


@pytest.mark.parametrize("budget", [10.0, 60.0, 90.0, 1000.0])
def test_pass_and_vote_at_a_token_budget_equal_a_naive_loop(budget):
    o = made_up()
    passed, voted = outcomes.budgeted(o, budget)
    for i in range(7):
        expected = []
        for first in range(4):
            kept, spent = [], 0.0
            for s in [*range(first, 4), *range(first)]:
                if spent + o.response_tokens[i, s] > budget:
                    break
                spent += o.response_tokens[i, s]
                kept.append(s)
            said = [o.answers[i, s] for s in kept if o.answers[i, s] >= 0]
            most = max(said, key=lambda a: (said.count(a), -said.index(a))) if said else None
            expected.append((any(o.correct[i, s] for s in kept), most == 0))
        assert (passed[i], voted[i]) == pytest.approx(np.mean(expected, axis=0))


def test_the_accuracy_efficiency_score_by_hand():
    base = of(np.full((4, 1), 0.5), np.full((4, 1), 100.0))
    index = np.arange(4)[None]
    for right, tokens, expected in ((0.5, 50, 0.5), (0.6, 50, 0.5 + 3 * 0.2), (0.4, 50, 0.5 - 5 * 0.2), (0.5, 150, -0.5)):
        own = of(np.full((4, 1), right), np.full((4, 1), float(tokens)))
        assert outcomes.aes(own, base)(index)[0] == pytest.approx(expected)


EVERY = np.arange(7)[None]  # the problems as they are, without resampling


def value(name: str, own: Outcomes, base: Outcomes) -> float:
    return METRICS[name].how(own, base)(EVERY)[0]


def test_think_tokens_of_right_and_wrong_responses_and_tokens_per_right_answer_equal_naive_loops():
    own, base = made_up(1), made_up(0)
    flat = list(zip(own.correct.ravel(), own.think_tokens.ravel(), own.response_tokens.ravel(), strict=True))
    assert value("think_tokens_right", own, base) == pytest.approx(np.mean([t for c, t, _ in flat if c]))
    assert value("think_tokens_wrong", own, base) == pytest.approx(np.mean([t for c, t, _ in flat if not c]))
    assert value("tokens_per_right", own, base) == pytest.approx(sum(n for *_, n in flat) / sum(c for c, *_ in flat))


def test_without_a_right_answer_its_length_and_price_have_no_value():
    none = of(np.zeros((7, 2)), np.full((7, 2), 5.0), np.full((7, 2), 9.0))
    assert all(math.isnan(value(name, none, none)) for name in ("think_tokens_right", "tokens_per_right"))
    assert value("think_tokens_wrong", none, none) == 5


def test_ock_score_has_the_values_of_the_released_code():
    for right, tokens, expected in ((0.85, 625.0, 84.394), (1.0, 1e6, 53.849), (0.0, 0.0, 0.0)):
        own = of(np.full((7, 1), right), np.zeros((7, 1)), np.full((7, 1), tokens))
        assert value("ock_score", own, own) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("name", "times"), [("right_within_half", 0.5), ("right_within_1x", 1.0), ("right_within_2x", 2.0)])
def test_accuracy_within_a_budget_equals_a_naive_loop_and_ends_at_plain_accuracy(name, times):
    own, base = made_up(1), made_up(0)
    budget = times * base.response_tokens.mean()
    naive = np.mean([c if n <= budget else 0 for c, n in zip(own.correct.ravel(), own.response_tokens.ravel(), strict=True)])
    assert value(name, own, base) == pytest.approx(naive)
    assert metrics.right_within(1000.0)(own, base)(EVERY)[0] == pytest.approx(own.correct.mean())


def test_the_area_is_the_mean_of_accuracy_over_all_budgets():
    own, base = made_up(1), made_up(0)
    grid = (np.arange(4000) + 0.5) / 4000 * 2  # midpoints of budgets from 0 to twice base's tokens
    curve = [metrics.right_within(float(times))(own, base)(EVERY)[0] for times in grid]
    assert value("area_right_within_2x", own, base) == pytest.approx(np.mean(curve), abs=1e-3)
    golden = of(np.ones((1, 2)), np.zeros((1, 2)), np.array([[100.0, 300.0]]))
    # Twice the mean of 200 is 400: the area is the mean of 1 - 100 / 400 and 1 - 300 / 400.
    assert METRICS["area_right_within_2x"].how(golden, golden)(np.zeros((1, 1), int))[0] == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(3))
def test_row_order_does_not_change_any_metric(seed):
    """Lengths that tie often; rows of a table in any order, and problems in any order."""
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame(itertools.product("abcdefghijk", range(4)), columns=["problem_id", "sample"])
    drawn = {name: rng.integers(0, high, len(rows)) for name, high in (("correct", 2), ("think_tokens", 4), ("answer", 3))}
    more = {
        "response_tokens": drawn["think_tokens"] + 4,
        "closed": drawn["correct"],
        "looping": 1 - drawn["correct"],
        "leaking": 1 - drawn["correct"],
    }
    rows = rows.assign(**drawn, **more).astype({"answer": str})

    def values(table: pd.DataFrame, problems: str) -> dict[str, float]:
        o = Outcomes.from_rows(table, list(problems))
        return {
            name: d.estimate
            for name, d in Judge.against(o, [m for m, about in METRICS.items() if about.how], times=2).draws.items()
        }

    first = values(rows, "abcdefghijk")
    assert values(rows.sample(frac=1, random_state=seed), "abcdefghijk") == first
    assert values(rows, "kjihgfabcde") == pytest.approx(first)


def test_outcomes_align_problems_and_number_answers():
    rows = pd.DataFrame(
        [
            (p, s, s == 0, 3, 5, True, False, False, a)
            for (p, s), a in zip(itertools.product("ba", range(2)), ["1", "2", None, "7"], strict=True)
        ],
        columns=["problem_id", "sample", "correct", "think_tokens", "response_tokens", "closed", "looping", "leaking", "answer"],
    )
    o = Outcomes.from_rows(rows, ["a", "b"])
    assert o.answers.tolist() == [[-1, 0], [0, 1]] and o.correct.tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("counts", [(3, 1, 2), (2, 2, 1), (1, 2, 3)])
def test_outcomes_refuse_problems_with_different_numbers_of_samples(counts):
    """3 + 1 + 2 rows would fill an array of 2 problems with 3 samples each."""
    pairs = [(p, s) for p, n in zip("abc", counts, strict=True) for s in range(n)]
    rows = pd.DataFrame(pairs, columns=["problem_id", "sample"])
    rows = rows.assign(correct=1, think_tokens=3, response_tokens=5, closed=1, looping=0, leaking=0)
    least, most = (f"'{'abc'[counts.index(n)]}' has {n}" for n in (min(counts), max(counts)))
    with pytest.raises(ValueError, match=f"Problem {least} samples and problem {most}: expected the same number"):
        Outcomes.from_rows(rows, list("abc"))
    with pytest.raises(ValueError, match=r"Two rows of problem 'a' have sample 0: expected one row per problem and sample"):
        Outcomes.from_rows(pd.concat([rows, rows]), list("abc"))
    even = rows[rows["sample"] < min(counts)]
    assert Outcomes.from_rows(even, list("abc")).shape == (3, min(counts))
    other_numbers = even.assign(sample=range(len(even)))
    assert Outcomes.from_rows(other_numbers, list("abc")).shape == (3, min(counts)), "samples may be numbered in any way"


def test_a_board_of_any_task_knows_what_its_accuracy_is():
    found = metrics.described("accuracy_wordproblems")
    assert (found.label, found.unit, found.better, found.group) == ("wordproblems", "share", "high", "main")
    assert metrics.described("accuracy_lookup") is metrics.METRICS["accuracy_lookup"]
    with pytest.raises(KeyError):
        metrics.described("speed")


def test_a_judge_gives_the_effects_of_each_statistic_by_itself():
    base, seeds = made_up(0), [made_up(1), made_up(2), made_up(3)]
    judged = Judge.against(base, ("accuracy", "shortest_20", "aes"), seed=4).effects(seeds)
    for name in ("accuracy", "shortest_20"):
        f = [METRICS[name].how(own, base) for own in seeds]
        assert judged[name].estimate == stats.effect(f, 7, seed=4)
        paired = stats.effect([stats.difference(x, METRICS[name].how(base, base)) for x in f], 7, seed=4)
        assert [getattr(judged[name].change, k) for k in ("mean", "low", "high", "p")] == pytest.approx(
            [getattr(paired, k) for k in ("mean", "low", "high", "p")]
        )
    assert judged["aes"].change is judged["aes"].estimate


def test_the_mean_effect_is_that_of_means_and_leaves_out_what_has_no_value():
    rng = np.random.default_rng(0)
    values, base = rng.normal(size=(3, 20)), rng.normal(size=(1, 20))
    plain = stats.effect([stats.mean_of(row[:, None]) for row in values - base], 20)
    assert stats.mean_effect(values, base) == plain
    holes = np.concatenate([values, np.full((3, 2), np.nan)], axis=1)
    assert stats.mean_effect(holes, np.concatenate([base, np.ones((1, 2))], axis=1)) == plain
    assert math.isnan(stats.mean_effect(np.full((2, 3), np.nan)).mean)


def test_the_p_value_of_results_that_vary_over_seeds_alone_is_that_of_a_t_test_over_seeds():
    seeds = np.array([0.9, 1.0, 1.3, 0.7])
    rows = np.repeat(seeds[:, None], 9, axis=1)  # the quantile of 8 degrees of freedom overflows at a tiny p
    assert stats.mean_effect(rows).p == pytest.approx(scipy_stats.ttest_1samp(seeds, 0.0).pvalue)


def test_a_p_value_is_the_same_when_pytorch_flushes_denormal_numbers_to_zero():
    rows = np.random.default_rng(0).normal(1.0, 1.0, (3, 16))
    plain = stats.mean_effect(rows)
    torch.set_flush_denormal(True)
    try:
        assert stats.mean_effect(rows) == plain
    finally:
        torch.set_flush_denormal(False)


def test_a_cell_shows_the_mean_and_the_change_in_the_units_digits():
    own, change = {"mean": 0.5, "low": 0.4, "high": 0.6}, {"mean": -0.1, "low": -0.2, "high": -0.0}
    assert metrics.cell("accuracy", own) == "50.0 [40.0, 60.0]"
    assert metrics.cell("think_tokens", own, change, note="2 seeds") == "0.5 (-0.1 [-0.2, -0.0], 2 seeds)"
    assert metrics.cell("accuracy", own, dict.fromkeys(change, 0.0), note="no variance") == "50.0 (+0.0, no variance)"
    assert metrics.cell("accuracy", dict.fromkeys(own, 0.5), note="no variance") == "50.0 (no variance)"
    assert metrics.cell("aes", own, own, star=True, note="2 seeds") == "0.50* (2 seeds)"


def test_a_share_has_an_interval_although_some_resamples_have_no_effect_at_all():
    whole = np.array([[10.0], [10.0], [10.0], [0.0]])  # one resample in 256 draws the last problem only
    share = metrics.share_of(whole / 4, whole)
    assert (share.mean, share.low, share.high) == (0.25, 0.25, 0.25)
    assert math.isnan(metrics.share_of(whole / 4, whole - 8).mean)
