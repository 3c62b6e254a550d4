"""Holm's correction of the p-values of a board, and the Pareto front of accuracy and think length.

Estimates, intervals and p-values come from ``toolkit.metrics`` and ``toolkit.stats.seeds``. Holm's correction counts the tests of all
conditions of the board. The tests of accuracy and of think tokens are corrected together. Those of any other metric are corrected only
among themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy import ndarray

from toolkit import stats
from toolkit.stats import Effect

HEADLINE = ("accuracy", "think_tokens")  # the metrics that are corrected together, and the axes of the Pareto front


def holm_corrected(paired: Mapping[str, Mapping[str, Effect]]) -> dict[str, dict[str, float]]:
    """Return the p-values after Holm's correction, as condition -> metric -> corrected p-value.

    The tests of all conditions are corrected together: those of accuracy and think tokens as one set, those of each other metric as a set
    of their own. Effects without a p-value are left out.

    Args:
        paired: Differences from base (condition minus base), as condition -> metric -> effect.
    """
    corrected: dict[str, dict[str, float]] = {name: {} for name in paired}
    metrics = {metric for effects in paired.values() for metric in effects}
    families = [[m for m in HEADLINE if m in metrics], *([m] for m in sorted(metrics - set(HEADLINE)))]
    for family in families:
        tests = [(name, m) for name, effects in paired.items() for m in family if m in effects and not math.isnan(effects[m].p)]
        if not tests:
            continue
        values = stats.holm(np.array([paired[name][m].p for name, m in tests]))
        for (name, m), p in zip(tests, values, strict=True):
            corrected[name][m] = float(p)
    return corrected


def on_front(
    accuracy: Mapping[str, ndarray], tokens: Mapping[str, ndarray], *, seed: int = 0, times: int = 1000
) -> dict[str, float]:
    """Return the probability that each condition is on the Pareto front of accuracy and think length.

    The probability is the share of bootstrap resamples (of problems and of seeds) in which the condition is on the front. A condition is on
    the front unless another one dominates it. The other one dominates it if it is at least as accurate, thinks at most as long, and is
    strictly better in at least one of the two.

    Args:
        accuracy: Condition -> accuracy, ``[seeds, problems]``, 0 to 1.
        tokens: Condition -> mean number of think tokens, ``[seeds, problems]``.
        seed: Random seed of the resamples.
        times: Number of resamples.

    Returns:
        Condition -> probability, 0 to 1.
    """
    names = list(accuracy)
    n = next(iter(accuracy.values())).shape[1]
    # A resample of problems (or seeds) is a row of weights, so that a resampled mean is a weighted sum.
    problem_weights = np.stack([np.bincount(row, minlength=n) for row in stats.resamples(n, seed=seed, times=times)]) / n
    resampled = []
    for table in (accuracy, tokens):
        rng = np.random.default_rng(seed)  # restarted, so that both metrics get the same resamples of seeds
        means = []
        for name in names:
            seeds = len(table[name])
            seed_weights = np.stack([np.bincount(row, minlength=seeds) for row in rng.integers(0, seeds, (times, seeds))]) / seeds
            # t: resamples, s: seeds, n: problems.
            means.append(np.einsum("ts,sn,tn->t", seed_weights, table[name], problem_weights, optimize=True))
        resampled.append(np.stack(means))
    correct, length = resampled  # [conditions, times]
    front = {}
    for i, name in enumerate(names):
        as_good = (correct >= correct[i]) & (length <= length[i])
        # [conditions, times]: True where another condition keeps this one off the front.
        better = as_good & ((correct > correct[i]) | (length < length[i]))
        front[name] = float(1 - np.any(better, axis=0).mean())
    return front
