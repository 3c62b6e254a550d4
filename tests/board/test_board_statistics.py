"""The board's statistics on data whose truth is known: coverage, false alarms, power, and its front."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import simulate_seeds
from scipy import stats as scipy_stats

from toolkit import stats
from toolkit.board import Spec, reading, statistics
from toolkit.board.measure import Result
from toolkit.board.statistics import holm_corrected
from toolkit.stats import Draws, Effect, effect


def drawn(rng, seeds: int, n: int, *, mean=0.0, by_problem=0.3, by_seed=0.05, noise=0.2) -> np.ndarray:
    """``[seeds, problems]``: a true mean, and random effects of problems, of seeds, and of both."""
    problem, seed = rng.normal(0, by_problem, n), rng.normal(0, by_seed, seeds) if seeds > 1 else np.zeros(1)
    return mean + problem[None] + seed[:, None] + rng.normal(0, noise, (seeds, n))


def estimated(values: np.ndarray, seed: int = 0) -> Effect:
    return effect([stats.mean_of(row[:, None]) for row in values], values.shape[1], seed=seed, times=300)


@pytest.mark.parametrize(("seeds", "by_seed"), [(1, 0.0), (3, 0.0), (3, 0.05), (3, 0.3), (5, 0.1)])
def test_intervals_cover_the_truth_about_95_times_in_100(seeds, by_seed):
    """At least that often: each variance keeps its own degrees of freedom, which is cautious where both matter."""
    rng = np.random.default_rng(seeds)
    hits = []
    for trial in range(300):
        e = estimated(drawn(rng, seeds, 60, mean=0.1, by_seed=by_seed), trial)
        hits.append(e.low <= 0.1 <= e.high)
    assert 0.92 <= np.mean(hits) <= 1.0  # two standard errors of 300 trials below .95


def test_an_interval_that_ignored_the_seeds_would_not_cover():
    rng = np.random.default_rng(0)
    hits = []
    for trial in range(300):
        values = drawn(rng, 3, 60, by_seed=0.3)
        e = stats.bootstrap(stats.mean_of(values.T), 60, seed=trial, times=300)
        hits.append(e.low <= 0.0 <= e.high)
    assert np.mean(hits) < 0.8


def board_of(rng, conditions: int, effect_of_first: float = 0.0, seeds_of_first: int = 3) -> dict[str, dict[str, Effect]]:
    found = {}
    for i in range(conditions):
        mean = effect_of_first if i == 0 else 0.0
        seeds = 1 if i % 2 else 3 if i else seeds_of_first
        found[f"c{i}"] = {m: estimated(drawn(rng, seeds, 60, mean=mean)) for m in statistics.HEADLINE}
    return found


def test_a_null_board_rarely_has_a_significant_row_and_a_planted_effect_is_found():
    rng = np.random.default_rng(3)
    false_alarms, found = [], []
    for _ in range(60):
        corrected = holm_corrected(board_of(rng, 12))
        false_alarms.append(min(p for own in corrected.values() for p in own.values()) < 0.05)
        corrected = holm_corrected(board_of(rng, 12, effect_of_first=0.4, seeds_of_first=5))
        found.append(corrected["c0"]["accuracy"] < 0.05)
    assert np.mean(false_alarms) <= 0.1  # 5 % at most, and 1.8 standard errors of 60 boards
    assert np.mean(found) >= 0.9


def test_one_seed_has_the_percentile_interval_of_the_paired_bootstrap():
    values = np.random.default_rng(1).normal(size=(1, 40))
    ours, theirs = effect([stats.mean_of(values.T)], 40), stats.bootstrap(stats.mean_of(values.T), 40)
    assert (ours.mean, ours.low, ours.high) == pytest.approx((theirs.mean, theirs.low, theirs.high), abs=1e-12)


def test_no_change_at_all_has_p_1_and_a_constant_change_what_its_resamples_can_tell():
    nothing, always = (effect([stats.mean_of(np.full((30, 1), v))] * 3, 30) for v in (0.0, 0.5))
    assert (nothing.low, nothing.high, nothing.p, nothing.note) == (0.0, 0.0, 1.0, "no variance")
    assert (always.mean, always.p, always.note) == (0.5, 2 / (stats.RESAMPLES + 1), "no variance")


@pytest.mark.parametrize("change", [0.125, 0.1 + 0.2, 1.0])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_equal_differences_in_few_problems_are_not_significant(n, change):
    """Signs of five equal differences agree by chance in 1 of 16 cases; rounding is no variance either."""
    flat = effect([stats.difference(stats.mean_of(np.full((n, 8), 0.1 + change)), stats.mean_of(np.full((n, 8), 0.1)))], n)
    nearly = effect([stats.mean_of(change + 1e-9 * np.arange(n)[:, None])], n)
    assert flat.p == 2.0 ** (1 - n) and flat.note == "no variance" and not flat.excludes_zero
    assert nearly.p >= 2.0 ** (1 - n) > 0.05


def test_a_p_value_is_never_0():
    rng = np.random.default_rng(0)
    for seeds, n in ((1, 40), (1, 3000), (3, 40), (5, 300)):
        sure = effect([stats.mean_of(1 + 1e-6 * rng.normal(size=(n, 1))) for _ in range(seeds)], n, times=200)
        assert 0 < sure.p < 0.05


# --- few seeds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_a_null_board_has_a_star_in_at_most_5_percent_whatever_seeds_spread(seeds, spread):
    """Satterthwaite's degrees of freedom gave up to .63 (two seeds) and .29 (three). 60 boards of 40: the binomial deviation is 2.8 %."""
    found = simulate_seeds.null_boards(np.random.default_rng(1), 60, seeds=seeds, problems=40, spread=spread)
    assert simulate_seeds.family_wise(found) <= 0.05 + 2 * 0.028
    assert simulate_seeds.coverage(found) >= 0.94
    if (seeds, spread) == (2, 3.0):
        assert simulate_seeds.family_wise(found, "satterthwaite") > 0.3, "the simulation sees what was wrong"


@pytest.mark.parametrize("seeds", [3, 5])
def test_p_is_the_level_at_which_the_interval_ends_at_zero(seeds):
    rng = np.random.default_rng(seeds)
    for _ in range(20):
        centres, resampled = rng.normal(0.1, 0.1, seeds), rng.normal(0.1, 0.05, 500)
        e = stats.combine([Draws(centre, resampled) for centre in centres], 50)
        variances = resampled.var() * 50 / 49, centres.var(ddof=1) / seeds
        assert stats.half_width(e.p, *variances, 50, seeds) == pytest.approx(abs(e.mean))
        assert (e.p < 0.05) == e.excludes_zero


def test_two_seeds_are_not_given_a_star():
    """However clear they look; and the interval says how many there are. One seed of something random is fewer still."""
    rng = np.random.default_rng(0)
    two, one = ([stats.mean_of(0.9 + 0.01 * rng.normal(size=(200, 1))) for _ in range(n)] for n in (2, 1))
    found = {"two": effect(two, 200), "one": effect(one, 200, seeded=True), "fixed": effect(one, 200)}
    assert [e.note for e in found.values()] == ["2 seeds", "1 seed", ""]
    corrected = holm_corrected({name: {"accuracy": e} for name, e in found.items()})
    assert corrected == {"two": {}, "one": {}, "fixed": {"accuracy": pytest.approx(found["fixed"].p)}}
    assert found["two"].low < found["two"].mean < found["two"].high
    board = {
        "conditions": {"two": {"metrics": {"accuracy": reading._interval(found["two"])}}},
        "paired": {"two": {"accuracy": reading._interval(found["two"]) | {"p": None, "p_holm": None}}},
        "metrics": {"accuracy": {"label": "accuracy", "unit": "share"}},
    }
    (text,) = reading.text_table(board, ["accuracy"])["accuracy"]
    assert text.endswith(", 2 seeds)") and "*" not in text


def test_nothing_to_estimate_from_is_an_error():
    with pytest.raises(ValueError, match="0 seeds"):
        effect([], 3)


def test_headline_metrics_are_corrected_together_and_others_alone():
    e = Effect(0.1, 0.0, 0.2, 0.01)
    corrected = holm_corrected({n: {"accuracy": e, "think_tokens": e, "closed": e} for n in ("a", "b")})
    assert corrected["a"] == {"accuracy": pytest.approx(0.04), "think_tokens": pytest.approx(0.04), "closed": pytest.approx(0.02)}


def test_a_metric_without_a_value_is_left_out_of_the_correction():
    nan = Effect(math.nan, math.nan, math.nan, math.nan)
    assert holm_corrected({"a": {"accuracy": nan}, "b": {"accuracy": Effect(0.0, 0.0, 0.0, 0.04)}}) == {
        "a": {},
        "b": {"accuracy": 0.04},
    }


# --- the front --------------------------------------------------------------------------------------------------


def test_the_front_holds_whoever_is_not_beaten_in_both():
    right = {
        "base": np.full((1, 20), 0.5),
        "worse": np.full((1, 20), 0.4),
        "better": np.full((2, 20), 0.7),
        "shorter": np.full((1, 20), 0.3),
    }
    long = {
        "base": np.full((1, 20), 30.0),
        "worse": np.full((1, 20), 31.0),
        "better": np.full((2, 20), 30.0),
        "shorter": np.full((1, 20), 9.0),
    }
    assert statistics.on_front(right, long, times=50) == {"base": 0.0, "worse": 0.0, "better": 1.0, "shorter": 1.0}


def test_an_undecided_front_is_a_probability():
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(3, 50)) for name in ("a", "b")}
    same = {name: np.full((1, 50), 10.0) for name in ("a", "b")}
    front = statistics.on_front(values, same)
    assert 0 < front["a"] < 1 and front["a"] + front["b"] == pytest.approx(1.0, abs=0.05)


def results_of(name: str, seeds: int, *, family: str = "control", problems: int = 12, samples: int = 3) -> reading.ConditionResults:
    """Made-up results, in which each seed has response lengths of its own; ``points`` holds the same lengths as a mean per problem."""
    results = []
    for seed in range(seeds):
        rng = np.random.default_rng([seed, *map(ord, name)])
        pairs = [(f"p{i}", s) for i in range(problems) for s in range(samples)]
        rows = pd.DataFrame(pairs, columns=["problem_id", "sample"])
        tokens = rng.integers(10, 40, len(rows)) + 10 * seed
        rows = rows.assign(correct=1, think_tokens=tokens, response_tokens=tokens, closed=1, looping=0, leaking=0)
        means = rows.groupby("problem_id")["think_tokens"].mean()
        points = pd.DataFrame({"metric": "think_tokens", "problem_id": means.index, "value": means.to_numpy()})
        results.append(Result(rows, points, {"seed": seed}))
    return reading.ConditionResults(Spec(name, family, lambda ground, seed: None), tuple(results))


@pytest.mark.parametrize("seeds", [(1, 1), (3, 1), (1, 3), (3, 3)])
def test_a_change_takes_all_seeds_of_both_conditions_whatever_the_metric(seeds):
    """``response_tokens`` is computed from outcomes, ``think_tokens`` from means per problem; here they are the same numbers."""
    own, other = (results_of(name, n) for name, n in zip(("own", "other"), seeds, strict=True))
    table = reading.AlignedResults({"base": results_of("base", 1, family="base"), "own": own, "other": other})
    by_mean, by_outcomes = (table.change(metric, "own", "other") for metric in ("think_tokens", "response_tokens"))
    for name in ("mean", "low", "high", "p"):
        assert getattr(by_outcomes, name) == pytest.approx(getattr(by_mean, name), nan_ok=True)
    assert by_mean.note == by_outcomes.note
    medians = [np.mean([r.rows["think_tokens"].median() for r in part.results]) for part in (own, other)]
    assert table.change("think_tokens_q50", "own", "other").mean == pytest.approx(medians[0] - medians[1])
    for metric in ("think_tokens_q90", "pass_at_2x", "aes"):
        alone = table.judge.effects(table.outcomes("own"), seeded=True)[metric].change
        change = table.change(metric, "own")
        assert (change.mean, change.low, change.high) == pytest.approx((alone.mean, alone.low, alone.high)), metric


def test_different_numbers_of_seeds_cannot_be_paired():
    table = reading.AlignedResults({"base": results_of("base", 1), "own": results_of("own", 2), "other": results_of("other", 3)})
    for metric in ("think_tokens", "think_tokens_q50"):
        with pytest.raises(ValueError, match="Seeds cannot be paired: 2 of 'own' and 3 of 'other'"):
            table.change(metric, "own", "other")
    with pytest.raises(KeyError, match="no values of 'review'"):
        table.change("review", "own")


def test_error_bars_of_shifts_cover_the_spread_over_seeds():
    def shift(cosine: float, half: float = 0.05) -> dict[str, float]:
        return {"cosine": cosine, "low": cosine - half, "high": cosine + half, "random": 0.2, "size": 0.1}

    assert reading._mean_shift([shift(0.3)], 20) == shift(0.3)  # one seed: over problems only
    apart = reading._mean_shift([shift(c) for c in (0.9, 0.0, -0.9)], 20)
    assert (apart["low"], apart["cosine"], apart["high"]) == (-1.0, 0.0, 1.0) and apart["random"] == pytest.approx(0.2)
    near = reading._mean_shift([shift(c) for c in (0.32, 0.3, 0.28)], 20)
    wanted = np.hypot(
        scipy_stats.t.ppf(0.975, 19) * 0.05 / 1.96, scipy_stats.t.ppf(0.975, 2) * np.std([0.32, 0.3, 0.28], ddof=1) / 3**0.5
    )
    assert (near["high"] - near["low"]) / 2 == pytest.approx(wanted) and near["cosine"] == pytest.approx(0.3)
    # Seeds that agree share their problems: the interval is as wide as that of one seed, up to the quantile.
    same = reading._mean_shift([shift(0.3)] * 3, 10_000)
    assert same["high"] - same["low"] == pytest.approx(0.1, rel=1e-3)


def test_a_metric_that_base_has_no_value_of_is_shown_without_a_difference():
    unknown = {"mean": None, "low": None, "high": None, "p": None, "p_holm": None}
    board = {
        "conditions": {"steered": {"metrics": {"accuracy": {"mean": 0.5, "low": 0.4, "high": 0.6}}}},
        "paired": {"steered": {"accuracy": unknown}},
        "metrics": {"accuracy": {"label": "accuracy", "unit": "share"}},
    }
    (text,) = reading.text_table(board, ["accuracy"])["accuracy"]
    assert text.startswith("50") and "(" not in text
