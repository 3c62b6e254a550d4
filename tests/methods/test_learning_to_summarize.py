"""Learning to summarize: rewards and KL against sums by hand, best-of-n against all sets, the optimum against other policies."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import special

from toolkit.methods import learning_to_summarize as lts


def test_the_rewards_of_the_tokens_sum_to_that_of_the_response():
    rng = np.random.default_rng(0)
    policy, initial = -rng.exponential(size=7), -rng.exponential(size=7)
    rewards = lts.shaped_rewards(2.5, policy, initial, beta=0.3)
    assert rewards.sum() == pytest.approx(2.5 - 0.3 * (policy.sum() - initial.sum()))
    assert rewards[:-1] == pytest.approx([-0.3 * (policy[i] - initial[i]) for i in range(6)])
    assert lts.shaped_rewards(2.5, policy, policy, beta=0.3).tolist() == [0] * 6 + [2.5]
    with pytest.raises(ValueError, match="one per token from each model"):
        lts.shaped_rewards(1.0, policy, initial[:3])


def test_both_estimators_have_the_kl_as_their_mean_and_k3_is_never_negative():
    rng = np.random.default_rng(1)
    p, q = special.log_softmax(rng.normal(size=6)), special.log_softmax(rng.normal(size=6))
    exact = sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
    for kind in ("k1", "k3"):
        assert np.exp(p) @ lts.kl_terms(p, q, kind) == pytest.approx(exact)
    assert (lts.kl_terms(p, q, "k3") >= 0).all() and (lts.kl_terms(p, q, "k1") < 0).any()
    near = special.log_softmax(p + 0.05 * rng.normal(size=6))
    spread = {k: np.exp(p) @ np.square(lts.kl_terms(p, near, k)) for k in ("k1", "k3")}
    assert spread["k3"] < spread["k1"] / 10
    with pytest.raises(ValueError, match="choose k1 or k3"):
        lts.kl_terms(p, q, "k2")


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_is_the_mean_over_all_sets(ties):
    rng = np.random.default_rng(2)
    scores, values = rng.normal(size=7).round(0 if ties else 9), rng.normal(size=7)
    for n in range(1, 8):
        best = []
        for chosen in combinations(range(7), n):
            top = max(scores[list(chosen)])
            best.append(np.mean([values[i] for i in chosen if scores[i] == top]))
        assert lts.best_of_n(scores, values, n) == pytest.approx(np.mean(best))
    with pytest.raises(ValueError, match="1 to 7"):
        lts.best_of_n(scores, values, 8)


def test_the_kl_of_best_of_n_is_that_of_its_distribution_over_many_responses():
    # Rank k of N is the best of n with probability k^n - (k-1)^n over N^n, draws with replacement; N large stands for a continuum.
    ranks, total = np.arange(1, 20001) / 20000, 20000
    for n in (1, 2, 8):
        p = ranks**n - (ranks - 1 / total) ** n
        p = p[p > 0]
        assert (p * np.log(p * total)).sum() == pytest.approx(lts.best_of_n_kl(n), abs=1e-3)


def test_no_other_policy_has_a_higher_penalised_reward_than_the_tilted_one():
    rng = np.random.default_rng(3)
    scores, beta = rng.normal(size=6), 0.4

    def objective(p):
        return p @ scores - beta * (p @ np.log(p * 6))

    best, kl = lts.tilted(scores, beta)
    assert kl == pytest.approx(best @ np.log(best * 6))
    others = special.softmax(np.log(best) + rng.normal(scale=0.3, size=(200, 6)), axis=1)
    assert all(objective(best) > objective(other) for other in others)
    assert lts.tilted(scores, 1e6)[1] < 1e-6 and lts.tilted(scores, 1e-3)[1] == pytest.approx(math.log(6))
    with pytest.raises(ValueError, match="above 0"):
        lts.tilted(scores, 0.0)


def test_optimising_a_biased_score_loses_quality_in_the_end_and_a_random_score_changes_none():
    rng = np.random.default_rng(4)
    quality = rng.normal(size=(400, 64))
    # The score agrees with quality except for a few responses of high score and low quality.
    hacked = rng.random((400, 64)) < 0.03
    quality = np.where(hacked, -3.0, quality)
    scores = np.where(hacked, 5.0, quality + 0.5 * rng.normal(size=quality.shape))
    curve = lts.optimisation_curve(scores, quality, ns=(1, 4, 64), betas=(10.0, 0.1))
    table = {(r.by, r.setting, r.measure): r for r in curve.itertuples()}
    assert [table["best of n", n, "score"].mean for n in (1, 4, 64)] == sorted(
        table["best of n", n, "score"].mean for n in (1, 4, 64)
    )
    assert table["best of n", 4, "quality"].low > 0 > table["best of n", 64, "quality"].high
    assert table["best of n", 1, "quality"].mean == pytest.approx(0)
    assert table["penalty", 10.0, "quality"].mean > table["penalty", 0.1, "quality"].mean
    assert table["penalty", 10.0, "score"].kl < table["penalty", 0.1, "score"].kl
    control = lts.optimisation_curve(rng.normal(size=quality.shape), quality, ns=(4, 64))
    assert all(r.low < 0 < r.high for r in control.itertuples() if r.measure == "quality")
