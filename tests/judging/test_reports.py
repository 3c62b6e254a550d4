"""Reports on judges: formulas against naive versions, and judges whose faults are known are found out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize, special

from toolkit import judging, stats
from toolkit.judging import reports
from toolkit.tasks.generators import preferences


def judged(weight_of_length: float, n: int = 400, seed: int = 0, scale: float = 1.0):
    """Scores, lengths, pairs and problems: labels follow true quality, the judge also counts length."""
    rng = np.random.default_rng(seed)
    quality, lengths = rng.normal(size=2 * n), rng.integers(5, 60, 2 * n).astype(float)
    rows = np.arange(2 * n).reshape(n, 2)
    p = special.expit(quality[rows[:, 0]] - quality[rows[:, 1]])
    pairs = np.where((rng.random(n) < p)[:, None], rows, rows[:, ::-1])
    return scale * quality + weight_of_length * lengths, lengths, pairs, np.repeat(np.arange(n), 2).astype(str)


def row(table, metric):
    return table.set_index("metric").loc[metric]


def naive_calibration_error(gap, bins):
    p = [1 / (1 + math.exp(-g)) for g in [*gap, *(-gap)]]
    y, total = [1] * len(gap) + [0] * len(gap), 0.0
    for b in range(bins):
        inside = [i for i, v in enumerate(p) if (b / bins < v or b == 0) and v <= (b + 1) / bins]
        if inside:
            total += len(inside) / len(p) * abs(np.mean([y[i] for i in inside]) - np.mean([p[i] for i in inside]))
    return total


@pytest.mark.parametrize("seed", range(5))
def test_the_calibration_error_is_that_of_a_loop_over_bins(seed):
    gap = np.random.default_rng(seed).normal(0.5, 2, 60)
    assert reports.calibration_error(gap) == pytest.approx(naive_calibration_error(gap, 10))
    curve = judging.reliability(gap)
    assert curve["share"].sum() == pytest.approx(1)
    assert (curve["share"] * (curve["observed"] - curve["predicted"]).abs()).sum() == pytest.approx(reports.calibration_error(gap))


def test_a_calibrated_judge_has_the_error_of_its_reference_and_an_overconfident_one_more():
    for scale, calibrated in ((1.0, True), (5.0, False)):
        scores, lengths, pairs, problems = judged(0.0, n=600, scale=scale)
        found = row(judging.report(scores, lengths, pairs, problems), "calibration error")
        assert (found["mean"] < 2 * found["reference"]) == calibrated
        assert (found["mean"] > 0.15) != calibrated


def test_a_judge_of_length_alone_has_no_accuracy_at_equal_length_and_its_bias_is_reported():
    fair, biased = (judging.report(*judged(w, n=1500)).set_index("metric") for w in (0.0, 10.0))
    assert fair.loc["accuracy", "low"] > 0.5 and abs(fair.loc["length correlation", "mean"]) < 0.1
    assert fair.loc["length effect", "low"] < 0 < fair.loc["length effect", "high"]
    assert biased.loc["accuracy", "low"] < 0.5 < biased.loc["accuracy", "high"]
    assert biased.loc["length correlation", "mean"] > 0.95
    assert biased.loc["longer preferred", "mean"] > 0.95 and abs(biased.loc["longer preferred", "reference"] - 0.5) < 0.08
    assert biased.loc["length effect", "low"] > 2


def test_a_system_that_wins_by_length_alone_wins_half_at_equal_length():
    rng = np.random.default_rng(1)
    longer = rng.normal(20, 20, 3000)  # the system writes longer responses
    wins = (rng.random(3000) < special.expit(2 * np.tanh(longer / longer.std()))).astype(float)
    rate, effect = judging.at_equal_length(wins, longer, np.arange(3000))
    assert wins.mean() > 0.65
    assert rate.low < 0.5 < rate.high and effect.low < 2 < effect.high


def test_the_fit_at_equal_length_maximises_the_penalised_likelihood():
    rng = np.random.default_rng(2)
    wins, longer = rng.choice([0.0, 0.5, 1.0, 0.3], 80), rng.normal(5, 12, 80)
    x = np.tanh(longer / longer.std())

    def loss(w):
        z = w[0] + w[1] * x
        return -(wins * special.log_expit(z) + (1 - wins) * special.log_expit(-z)).sum() + w[1] ** 2 / 2

    best = optimize.minimize(loss, [0, 0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).x
    rate, effect = judging.at_equal_length(wins, longer, np.arange(80))
    assert rate.mean == pytest.approx(special.expit(best[0]), abs=1e-5)
    assert effect.mean == pytest.approx(best[1], abs=1e-5)


def test_without_length_differences_the_rate_is_the_plain_one_and_all_wins_are_no_error():
    wins = np.array([1.0, 1, 0, 1])
    rate, effect = judging.at_equal_length(wins, np.zeros(4), list("abcd"))
    assert rate.mean == pytest.approx(0.75) and effect.mean == 0
    assert judging.at_equal_length(np.ones(4), np.array([1.0, 2, 3, -4]), list("abcd"))[0].mean > 0.999


def test_reports_refuse_pairs_across_problems_and_outcomes_out_of_range():
    scores, lengths, pairs, problems = judged(0.0, n=4)
    with pytest.raises(ValueError, match="Pair 0 has responses to two problems"):
        judging.report(scores, lengths, pairs[:1] * 0 + [0, 5], problems)
    with pytest.raises(ValueError, match="0 pairs"):
        judging.report(scores, lengths, pairs[:0], problems)
    with pytest.raises(ValueError, match="from 0 to 1"):
        judging.at_equal_length(np.array([2.0]), np.array([1.0]), ["a"])


def test_margins_give_the_minimum_of_the_loss_of_llama_2_and_widen_the_gaps():
    drawn = preferences.pairs("train", 200)
    x = np.array([r.quality for p in drawn for r in (p.chosen, p.rejected)], float)
    pairs, margins = np.arange(400).reshape(200, 2), np.array([p.margin for p in drawn])
    scale = x.std(axis=0)
    gaps = []
    for m in (None, margins):
        w = stats.bradley_terry(x, pairs, strength=0.5, margins=m)
        v = torch.tensor(w * scale, requires_grad=True)
        z = torch.tensor((x[pairs[:, 0]] - x[pairs[:, 1]]) / scale) @ v - torch.tensor(0.0 if m is None else m)
        (torch.nn.functional.softplus(-z).sum() + 0.5 * v @ v).backward()
        assert v.grad.abs().max() < 1e-2
        gaps.append((x @ w)[pairs[:, 0]] - (x @ w)[pairs[:, 1]])
    assert gaps[1].mean() > gaps[0].mean()
    assert stats.spearman(gaps[1], margins) > 0.9
    with pytest.raises(ValueError, match="give one finite number per pair"):
        stats.bradley_terry(x, pairs, strength=1.0, margins=np.full(200, np.nan))


def test_a_judge_that_is_always_right_has_no_love_of_length_however_many_pairs_a_prompt_has():
    # One pair in which the longer response is better, three of another prompt in which the shorter one is.
    scores = [1.0, 0.0, *[1.0, 0.0] * 3]
    lengths = [9.0, 5.0, *[5.0, 9.0] * 3]
    pairs, problems = np.arange(8).reshape(4, 2), np.array(["a"] * 2 + ["b"] * 6)
    table = reports.report(np.array(scores), np.array(lengths), pairs, problems)
    assert row(table, "longer preferred")["mean"] == row(table, "longer preferred")["reference"] == 0.5
