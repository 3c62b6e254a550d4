"""Effects of the position in a long answer, from the paper on misaligned short and long answers (SLAQ), arXiv:2510.11218.

A long question joins m short ones (``tasks.slaq``). The paper finds that accuracy falls with the position in the long answer, and that
right answers follow right answers (*momentum*). ``methods/slaq.py`` has the rest of the paper.

Equations::

    momentum = P(right | previous right) - P(right | previous wrong), over neighbouring positions of a long answer

Deviations: the controls are ours. The accuracy of the same facts in short questions is subtracted from a fall with position. Momentum is
compared with its expectation if the parts of an answer are independent given how many of them are right, and given the positions.

Units and signs: effects are shares from -1 to 1; + is the claimed direction (accuracy falls, right follows right).

Cost: nothing here runs a model. ``pattern_probabilities`` counts all 2^m patterns of m right or wrong parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from toolkit import stats
from toolkit.stats import Estimate

MOST = 12  # parts of a long answer whose patterns are counted
RIDGE = 1e-6  # on the weights of positions, in the fit of ``pattern_probabilities``


def position_effect(short: Bool[ndarray, "_ _"], long: Bool[ndarray, "pairs facts"]) -> Mapping[str, Estimate]:
    """Return how much accuracy falls from the first to the last position of the long answer, by a straight line through all positions.

    Args:
        short: Per pair and position, whether the answer to the short question is right. In a short question there is no position, so this
            is the control.
        long: Whether the part of the long answer is right.

    Returns:
        Estimates with 95 % intervals over pairs, as shares: ``long``, ``short`` and ``long - short``. + means that accuracy falls.

    Raises:
        ValueError: no pairs, fewer than two positions, or arrays of different shapes.
    """
    _check_flags(short, long)
    at = np.arange(long.shape[1]) - (long.shape[1] - 1) / 2
    falls = {name: -(x * at).sum(axis=1) / (at @ at) * (len(at) - 1) for name, x in (("long", long), ("short", short))}
    falls["long - short"] = falls["long"] - falls["short"]
    return {name: stats.bootstrap(stats.mean_of(x[:, None]), len(x)) for name, x in falls.items()}


def momentum(long: Bool[ndarray, "pairs facts"]) -> Mapping[str, Estimate]:
    """Return how much more often a part of a long answer is right after a right part than after a wrong one.

    Some pairs are easier than others, and some positions are, which alone makes right parts follow right parts. So ``chance`` is the
    momentum that is expected if neither matters beyond that: the ratio of the expected counts in a Rasch model (conditional on the number
    of right parts of each answer, with weights of the positions that give each position its observed number of right parts).

    Returns:
        Estimates with 95 % intervals over pairs, as differences of shares: ``momentum``, ``chance`` and ``momentum - chance``.

    Raises:
        ValueError: no pairs, fewer than two positions, or more than 12.
    """
    x = long.astype(float)

    patterns, given = pattern_probabilities(long)
    real = _counts(x)
    expected = _counts(patterns) @ given.T  # [counts, number of right parts]
    chance = expected[:, long.sum(axis=1)]

    def of(counts: ndarray) -> stats.Statistic:
        return lambda index: _difference(counts[:, index].sum(axis=-1))

    parts = {"momentum": of(real), "chance": of(chance), "momentum - chance": stats.difference(of(real), of(chance))}
    return {name: stats.bootstrap(statistic, len(long)) for name, statistic in parts.items()}


def momentum_p(long: Bool[ndarray, "pairs facts"], *, draws: int = 10_000, seed: int = 0) -> float:
    """Return a one-sided p-value for momentum: the share of answers without momentum that show at least as much.

    Such answers are drawn from the Rasch model of ``momentum``, with as many right parts in each answer as observed. The interval of
    ``momentum - chance`` is too narrow for few answers; this test is exact given the weights of the positions.

    Raises:
        ValueError: as ``momentum``.
    """
    patterns, given = pattern_probabilities(long)
    rng, counts = np.random.default_rng(seed), _counts(patterns)
    drawn = np.stack([rng.choice(len(patterns), size=draws, p=given[total]) for total in long.sum(axis=1)], axis=1)
    return stats.permutation_p(
        _difference(counts[:, drawn].sum(axis=-1)) >= _difference(_counts(long.astype(float)).sum(axis=-1)) - 1e-12
    )


def _counts(rows: Float[ndarray, "_ facts"]) -> Float[ndarray, "4 _"]:
    """Return for each row: right parts after a right part, parts after a right part, and the same after a wrong part."""
    before, after = rows[:, :-1], rows[:, 1:]
    return np.stack(
        [(before * after).sum(axis=1), before.sum(axis=1), ((1 - before) * after).sum(axis=1), (1 - before).sum(axis=1)]
    )


def _difference(counts: ndarray) -> ndarray:
    """Return P(right | previous right) - P(right | previous wrong) from sums of counts; 0 if one of the two does not occur."""
    hit_right, n_right, hit_wrong, n_wrong = counts
    defined = (n_right > 0) & (n_wrong > 0)
    return np.where(defined, hit_right / np.where(n_right > 0, n_right, 1) - hit_wrong / np.where(n_wrong > 0, n_wrong, 1), 0.0)


def pattern_probabilities(
    long: Bool[ndarray, "pairs facts"],
) -> tuple[Float[ndarray, "patterns facts"], Float[ndarray, "_ patterns"]]:
    """Return all patterns of right and wrong parts, and the probability of each given its number of right parts, in a Rasch model.

    The logarithm of a pattern's probability is the sum of the weights of its right positions, up to a constant. The weights are such that every
    position has as many right parts as observed, given the number of right parts of each answer.

    Returns:
        patterns: 0 and 1 for wrong and right, one row per pattern.
        given: One row per number of right parts, from 0 to the number of positions.
    """
    _check_flags(long, long)
    if long.shape[1] > MOST:
        raise ValueError(f"Long answers of {long.shape[1]} parts have too many patterns to count: expected at most {MOST} parts.")
    m = long.shape[1]
    patterns = np.array(list(product((0.0, 1.0), repeat=m)))
    of_total = np.stack([patterns.sum(axis=1) == r for r in range(m + 1)])
    rows, observed = np.bincount(long.sum(axis=1), minlength=m + 1), long.sum(axis=0)

    def given(weights: ndarray) -> ndarray:
        return softmax(np.where(of_total, patterns @ weights, -np.inf), axis=1)

    def loss(weights: ndarray) -> tuple[float, ndarray]:
        """Negative log-likelihood given the numbers of right parts, and its gradient. A weak ridge keeps weights finite."""
        normed = logsumexp(np.where(of_total, patterns @ weights, -np.inf), axis=1)
        value = rows @ normed - observed @ weights + RIDGE * (weights @ weights)
        return float(value), rows @ given(weights) @ patterns - observed + 2 * RIDGE * weights

    fitted = minimize(loss, np.zeros(m), jac=True, method="BFGS", options={"gtol": 1e-8})
    return patterns, given(fitted.x)


def _check_flags(short: ndarray, long: ndarray) -> None:
    if long.ndim != 2 or short.shape != long.shape or not len(long) or long.shape[1] < 2:
        raise ValueError(
            f"Short {short.shape} and long {long.shape} flags: expected the same [pairs, facts], with 1 pair and 2 facts or more."
        )
