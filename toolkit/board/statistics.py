"""Holm's correction over the board, and its Pareto front.

Estimates, intervals and p-values are those of ``toolkit.metrics`` and ``toolkit.stats.seeds``. Holm's correction is over all conditions: for
the two headline metrics together, for every other metric by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy import ndarray

from toolkit import stats
from toolkit.stats import Effect

HEADLINE = ("accuracy", "think_tokens")


def holm_corrected(paired: Mapping[str, Mapping[str, Effect]]) -> dict[str, dict[str, float]]:
    """Holm's correction of every p-value over all conditions; the headline metrics are one family, any other metric is its own."""
    corrected: dict[str, dict[str, float]] = {name: {} for name in paired}
    metrics = {metric for own in paired.values() for metric in own}
    families = [[m for m in HEADLINE if m in metrics], *([m] for m in sorted(metrics - set(HEADLINE)))]
    for family in families:
        where = [(name, m) for name, own in paired.items() for m in family if m in own and not math.isnan(own[m].p)]
        if not where:
            continue
        values = stats.holm(np.array([paired[name][m].p for name, m in where]))
        for (name, m), p in zip(where, values, strict=True):
            corrected[name][m] = float(p)
    return corrected


def on_front(
    accuracy: Mapping[str, ndarray], tokens: Mapping[str, ndarray], *, seed: int = 0, times: int = 1000
) -> dict[str, float]:
    """How often each condition is on the Pareto front (nobody at least as accurate and as short, and better in one) when problems and
    seeds are resampled.

    Args:
        accuracy: Condition -> ``[seeds, problems]``.
        tokens: The same of think tokens.
    """
    names = list(accuracy)
    n = next(iter(accuracy.values())).shape[1]
    weights = np.stack([np.bincount(row, minlength=n) for row in stats.resamples(n, seed=seed, times=times)]) / n
    drawn = []
    for table in (accuracy, tokens):
        rng = np.random.default_rng(seed)
        own = []
        for name in names:
            seeds = len(table[name])
            chosen = np.stack([np.bincount(row, minlength=seeds) for row in rng.integers(0, seeds, (times, seeds))]) / seeds
            own.append(np.einsum("ts,sn,tn->t", chosen, table[name], weights, optimize=True))
        drawn.append(np.stack(own))
    right, long = drawn
    front = {}
    for i, name in enumerate(names):
        as_good = (right >= right[i]) & (long <= long[i])
        beaten = as_good & ((right > right[i]) | (long < long[i]))
        front[name] = float(1 - np.any(beaten, axis=0).mean())
    return front
