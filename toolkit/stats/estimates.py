"""Statistics of outcomes per problem (such as a mean over problems), and their estimates with percentile bootstrap intervals.

A *statistic* is a function of resampled problems: see ``Statistic``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

RESAMPLES = 2000  # default number of bootstrap resamples
Statistic = Callable[[ndarray], ndarray]
"""A function from problem indices ``[times, n]``, one resample of the n problems per row, to one number per resample, ``[times]``."""
Bounds = tuple[float, float]
"""Smallest and largest possible value of a quantity."""
UNBOUNDED: Bounds = (-math.inf, math.inf)
NO_VARIANCE = "no variance"  # printed in place of an interval of width 0


@dataclass(frozen=True)
class Estimate:
    """An estimate with its confidence interval (95 %, unless ``bootstrap`` was given another level).

    Attributes:
        mean: The estimate: a mean, or another statistic of the problems.
        low: Lower end of the interval.
        high: Upper end of the interval.

    >>> estimate = Estimate(0.12, 0.03, 0.21)
    >>> print(estimate, estimate.excludes_zero)
    0.12 [0.03, 0.21] True
    """

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True if the interval does not contain zero.

        An interval of width 0 gives False: the values do not vary, so the interval carries no information.
        """
        return self.low < self.high and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.mean:.3g} ({NO_VARIANCE})"
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def resamples(n: int, *, seed: int = 0, times: int = RESAMPLES) -> ndarray:
    """Return ``times`` resamples of n problems: problem indices ``[times, n]``, drawn with replacement.

    Equal seeds give equal resamples: use the same seed for two conditions to compare them on the same resamples.

    >>> resamples(4, times=2).tolist()
    [[3, 2, 2, 1], [1, 0, 0, 0]]
    """
    return np.random.default_rng(seed).integers(0, n, (times, n))


def bootstrap(statistic: Statistic, n: int, *, seed: int = 0, times: int = RESAMPLES, level: float = 0.95) -> Estimate:
    """Return the value of a statistic on n problems, with its percentile interval over resampled problems.

    Args:
        statistic: Function from problem indices ``[times, n]`` to values ``[times]``.
        n: Number of problems.
        seed: Random seed for the resamples.
        times: Number of resamples.
        level: Confidence level of the interval, from 0 to 1.

    Raises:
        ValueError: n is 0.

    >>> correct = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])  # 4 problems, 2 samples each
    >>> print(bootstrap(mean_of(correct), 4))
    0.625 [0.25, 1]
    """
    if n == 0:
        raise ValueError("No problems to estimate from.")
    centre = float(statistic(np.arange(n)[None])[0])
    low, high = np.quantile(statistic(resamples(n, seed=seed, times=times)), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(centre, float(low), float(high))


def mean_of(values: Float[ndarray, "problems samples"]) -> Statistic:
    """Return a statistic (a function of resampled problems): the mean of ``values`` over samples, then over problems."""
    per_problem = np.asarray(values, dtype=float).mean(axis=1)
    return lambda index: per_problem[index].mean(axis=1)


def over_problems(values: Sequence[float] | ndarray, problems: Sequence[str] | ndarray, *, seed: int = 0) -> Estimate:
    """Return the mean of values over the rows of each problem, then over problems, with its 95 % bootstrap interval over problems.

    Args:
        values: One value per row.
        problems: Id of the problem of each row; problems may have different numbers of rows.
        seed: Random seed for the resamples.

    Raises:
        ValueError: there are no rows.

    >>> print(over_problems([1.0, 0.0, 1.0, 1.0], ["a", "a", "b", "c"]))
    0.833 [0.5, 1]
    """
    names, which = np.unique(np.asarray(problems, dtype=str), return_inverse=True)
    per_problem = np.bincount(which, np.asarray(values, dtype=float)) / np.bincount(which)
    return bootstrap(mean_of(per_problem[:, None]), len(names), seed=seed)


def difference(a: Statistic, b: Statistic) -> Statistic:
    """Return a statistic (a function of resampled problems): the paired difference, a minus b on the same problems.

    >>> base, edited = np.array([[1.0], [0.0], [0.0], [1.0]]), np.array([[1.0], [1.0], [0.0], [1.0]])
    >>> print(bootstrap(difference(mean_of(edited), mean_of(base)), 4))
    0.25 [0, 0.75]
    """
    return lambda index: a(index) - b(index)


def mean_of_smallest(values: Float[ndarray, "*rows n"], ranking: Float[ndarray, "*rows n"], keep: int) -> Float[ndarray, "*rows"]:
    """Return, along the last axis, the mean of those ``keep`` values that have the smallest entries in ``ranking``.

    If several values tie for the last place, the result is averaged over all orders of the tied values.

    Args:
        values: Numbers to average.
        ranking: Sort key of each value.
        keep: Number of values to average, from 1 to n.

    >>> values, ranking = np.array([[1.0, 0.0, 1.0]]), np.array([[10.0, 20.0, 20.0]])
    >>> mean_of_smallest(values, ranking, 2).tolist()  # the first value, and by chance one of the other two
    [0.75]
    """
    cut = np.partition(ranking, keep - 1, axis=-1)[..., keep - 1 : keep]
    below, tied = ranking < cut, ranking == cut
    # sure: number of values that are kept in any order; drawn: mean of the tied values, which fill the other places.
    sure, drawn = below.sum(axis=-1), np.where(tied, values, 0.0).sum(axis=-1) / tied.sum(axis=-1)
    return (np.where(below, values, 0.0).sum(axis=-1) + (keep - sure) * drawn) / keep


def shortest_accuracy(
    correct: Float[ndarray, "problems samples"], ranking: Float[ndarray, "problems samples"], share: float
) -> Statistic:
    """Return a statistic (a function of resampled problems): accuracy, from 0 to 1, on the share of responses with the shortest thinking.

    This is the metric of ThinkEdit (arXiv:2503.22048). For each sample index separately, the n problems are sorted by ``ranking``, and the
    first ``floor(share * n)`` of them, at least one, are selected. The statistic is the accuracy of the selected responses, averaged over
    the sample indices. If problems tie for the last place, the accuracy is averaged over all orders of the tied problems.

    Args:
        correct: 1 or 0 per response.
        ranking: Length in tokens of each response, by which to sort. The paper takes the think length of the graded response itself, so
            its selection depends on the response that is graded. To avoid this selection effect, pass the result of ``held_out_length``.
        share: Share of problems to select, in (0, 1].
    """

    def statistic(index: ndarray) -> ndarray:
        keep = max(1, int(share * index.shape[1]))
        columns = [mean_of_smallest(correct[index, s], ranking[index, s], keep) for s in range(correct.shape[1])]
        return np.mean(columns, axis=0)

    return statistic


def held_out_length(lengths: Float[ndarray, "problems samples"]) -> Float[ndarray, "problems samples"]:
    """Return, for each sample, the mean length of the *other* samples of its problem, ``[problems, samples]``.

    For ``shortest_accuracy``: sorting by this length selects problems on which a model tends to think briefly, without using the sample
    that is graded. To select the same problems for several models, use the lengths of one of them, such as the base model, for all.

    Raises:
        ValueError: fewer than two samples per problem.

    >>> held_out_length(np.array([[10.0, 20.0, 60.0]])).tolist()
    [[40.0, 35.0, 15.0]]
    """
    lengths = np.asarray(lengths, dtype=float)
    samples = lengths.shape[1]
    if samples < 2:
        raise ValueError("The selection-free shortest accuracy needs at least 2 samples per problem.")
    return (lengths.sum(axis=1, keepdims=True) - lengths) / (samples - 1)
