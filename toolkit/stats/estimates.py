"""Percentile bootstrap over problems, and the statistics to which it is applied, such as a mean over problems.

Here a *statistic* is a function that is evaluated on resampled problems: see ``Statistic``. ``bootstrap`` turns it into an ``Estimate``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

RESAMPLES = 2000  # default number of bootstrap resamples
Statistic = Callable[[ndarray], ndarray]
"""A function from problem indices ``[times, n]`` to values ``[times]``, such as accuracies.

Each row of indices is one resample of the n problems; ``times`` is the number of resamples. The function returns one value per resample.
"""
Bounds = tuple[float, float]
"""Smallest and largest possible value of a quantity, such as ``(0, 1)`` for an accuracy."""
UNBOUNDED: Bounds = (-math.inf, math.inf)
NO_VARIANCE = "no variance"  # printed in place of an interval of width 0


@dataclass(frozen=True)
class Estimate:
    """An estimated quantity with its confidence interval (95 %, unless ``bootstrap`` was given another level).

    Attributes:
        mean: The estimate itself, whether it is a mean or another statistic.
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

        It is False for an interval of width 0. All resamples then gave the same value, so the interval does not measure the uncertainty.
        """
        return self.low < self.high and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.mean:.3g} ({NO_VARIANCE})"
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def resamples(n: int, *, seed: int = 0, times: int = RESAMPLES) -> ndarray:
    """Return ``times`` resamples of n problems: problem indices ``[times, n]``, drawn with replacement.

    The same seed gives the same resamples. Use one seed for all conditions, so that they are compared on the same resamples.

    >>> resamples(4, times=2).tolist()
    [[3, 2, 2, 1], [1, 0, 0, 0]]
    """
    return np.random.default_rng(seed).integers(0, n, (times, n))


def bootstrap(statistic: Statistic, n: int, *, seed: int = 0, times: int = RESAMPLES, level: float = 0.95) -> Estimate:
    """Return the value of a statistic on all n problems, with its percentile bootstrap interval (problems are resampled).

    Resamples on which the statistic is NaN are left out; without any other, the interval is NaN.

    Args:
        statistic: Function from problem indices ``[times, n]``, one resample per row, to values ``[times]``.
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
    values = statistic(resamples(n, seed=seed, times=times))
    ends = [(1 - level) / 2, (1 + level) / 2]
    low, high = (math.nan, math.nan) if np.isnan(values).all() else np.nanquantile(values, ends)
    return Estimate(centre, float(low), float(high))


def mean_of(values: Float[ndarray, "problems samples"]) -> Statistic:
    """Return a statistic (a function of resampled problems): the mean of ``values`` over samples, then over the drawn problems."""
    per_problem = np.asarray(values, dtype=float).mean(axis=1)
    return lambda index: per_problem[index].mean(axis=1)


def mean_where(values: Float[ndarray, "problems samples"], chosen: Bool[ndarray, "problems samples"]) -> Statistic:
    """Return a statistic (a function of resampled problems): the mean of the chosen values of the drawn problems, each with equal weight.

    It is NaN for a resample without a chosen value.

    Args:
        values: One value per problem and sample. A value that is not chosen has no influence, even if it is NaN.
        chosen: True for the values to average.

    >>> print(bootstrap(mean_where(np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[True, False], [True, True]])), 2))
    1 (no variance)
    """

    total, count = np.where(chosen, values, 0.0).sum(axis=1), chosen.sum(axis=1)

    def statistic(index: ndarray) -> ndarray:
        with np.errstate(invalid="ignore"):  # 0 / 0 = NaN
            return total[index].sum(axis=1) / count[index].sum(axis=1)

    return statistic


def over_problems(values: Sequence[float] | ndarray, problems: Sequence[str] | ndarray, *, seed: int = 0) -> Estimate:
    """Return the mean of values over the rows of each problem, then over problems, with a 95 % bootstrap interval over problems.

    Every problem has equal weight, however many rows it has.

    Args:
        values: One value per row, such as one per rollout.
        problems: Problem id of each row.
        seed: Random seed for the resamples.

    Raises:
        ValueError: there are no rows.

    >>> print(over_problems([1.0, 0.0, 1.0, 1.0], ["a", "a", "b", "c"]))
    0.833 [0.5, 1]
    """
    names, which = np.unique(np.asarray(problems, dtype=str), return_inverse=True)
    per_problem = np.bincount(which, np.asarray(values, dtype=float)) / np.bincount(which)
    return bootstrap(mean_of(per_problem[:, None]), len(names), seed=seed)


def over_weights(
    statistic: Callable[[ndarray], ndarray], problems: Sequence[str] | ndarray, *, seed: int = 0, times: int = RESAMPLES
) -> Estimate:
    """Return the value of a statistic of weighted rows, with its 95 % bootstrap interval over problems.

    A problem that a resample draws k times gives each of its rows the weight k.

    Args:
        statistic: Function from weights ``[times, rows]`` to values ``[times]``.
        problems: Problem id of each row.
        seed: Random seed for the resamples.
        times: Number of resamples.

    Raises:
        ValueError: there are no rows.

    >>> x = np.array([1.0, 2.0, 6.0])
    >>> print(over_weights(lambda w: w @ x / w.sum(axis=1), ["a", "b", "b"]))
    3 [1, 4]
    """
    names, which = np.unique(np.asarray(problems, dtype=str), return_inverse=True)

    def over(index: ndarray) -> ndarray:
        return statistic(np.array([np.bincount(row, minlength=len(names)) for row in index], dtype=float)[:, which])

    return bootstrap(over, len(names), seed=seed, times=times)


def difference(a: Statistic, b: Statistic) -> Statistic:
    """Return a statistic (a function of resampled problems): a minus b, both evaluated on the same resampled problems.

    >>> base, edited = np.array([[1.0], [0.0], [0.0], [1.0]]), np.array([[1.0], [1.0], [0.0], [1.0]])
    >>> print(bootstrap(difference(mean_of(edited), mean_of(base)), 4))
    0.25 [0, 0.75]
    """
    return lambda index: a(index) - b(index)


def mean_of_smallest(values: Float[ndarray, "*rows n"], ranking: Float[ndarray, "*rows n"], keep: int) -> Float[ndarray, "*rows"]:
    """Sort values by ``ranking`` along the last axis, and return the mean of the first ``keep`` of them.

    Values with equal keys have no definite order. If only some of them fit among the first ``keep``, the result is averaged over all their
    orders.

    Args:
        values: Numbers to average.
        ranking: Sort key of each value; the smallest keys come first.
        keep: Number of values to average, from 1 to n.

    >>> values, ranking = np.array([[1.0, 0.0, 1.0]]), np.array([[10.0, 20.0, 20.0]])
    >>> mean_of_smallest(values, ranking, 2).tolist()  # the first value, and by chance one of the other two
    [0.75]
    """
    cut = np.partition(ranking, keep - 1, axis=-1)[..., keep - 1 : keep]
    below, tied = ranking < cut, ranking == cut
    # cut: the sort key at place number keep. sure: how many values have a smaller key, and so are averaged in any order. The other
    # keep - sure places go to tied values; averaged over all orders, each of these places has the value drawn, the mean of the tied values.
    sure, drawn = below.sum(axis=-1), np.where(tied, values, 0.0).sum(axis=-1) / tied.sum(axis=-1)
    return (np.where(below, values, 0.0).sum(axis=-1) + (keep - sure) * drawn) / keep


def shortest_accuracy(
    correct: Float[ndarray, "problems samples"], ranking: Float[ndarray, "problems samples"], share: float
) -> Statistic:
    """Return a statistic (a function of resampled problems): the accuracy (0 to 1) of the responses with the shortest thinking.

    This is a metric of ThinkEdit (arXiv:2503.22048). It is computed for each sample index (column of ``correct``) and then averaged over
    them. A column has n responses, one per problem. They are sorted by ``ranking``, and the first ``floor(share * n)`` of them are
    selected, but at least one. The accuracy is that of the selected responses. Ties for the last place are averaged over all orders.

    Args:
        correct: 1 for a right response, 0 for a wrong one.
        ranking: Sort key of each response; the smallest keys are selected. ThinkEdit uses the think length of the response itself, in
            tokens. This biases the accuracy, because the same response is selected and graded. ``mean_of_others(lengths)`` avoids the
            bias: its keys are lengths of other responses.
        share: Share of the responses to select, in (0, 1].
    """

    def statistic(index: ndarray) -> ndarray:
        # The tolerance is for rounding errors: in floating point, 0.29 times 100 is a little less than 29.
        keep = max(1, math.floor(share * index.shape[1] + 1e-9))
        columns = [mean_of_smallest(correct[index, s], ranking[index, s], keep) for s in range(correct.shape[1])]
        return np.mean(columns, axis=0)

    return statistic


def mean_of_others(values: Float[ndarray, "problems samples"]) -> Float[ndarray, "problems samples"]:
    """Return, for each sample, the mean value of the *other* samples of its problem, ``[problems, samples]``.

    Pass the result for lengths to ``shortest_accuracy`` as ``ranking``, to select the problems on which a model tends to think briefly. The
    length of the graded sample itself then has no influence on the selection. To grade several models on the same problems, compute the
    ranking from one of them, such as the base model.

    Args:
        values: One value per problem and sample, such as a length in tokens, or 1 for a right response and 0 for a wrong one.

    Raises:
        ValueError: fewer than two samples per problem.

    >>> mean_of_others(np.array([[10.0, 20.0, 60.0]])).tolist()
    [[40.0, 35.0, 15.0]]
    """
    values = np.asarray(values, dtype=float)
    samples = values.shape[1]
    if samples < 2:
        raise ValueError(f"Selection by the other samples needs at least 2 samples per problem: there is {samples}.")
    return (values.sum(axis=1, keepdims=True) - values) / (samples - 1)
