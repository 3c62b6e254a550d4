"""Estimates with percentile intervals over resampled problems, and the statistics they are of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

RESAMPLES = 2000
Statistic = Callable[[ndarray], ndarray]
"""Problem indices ``[times, n]`` -> values ``[times]``."""
Bounds = tuple[float, float]
"""Least and greatest possible value."""
UNBOUNDED: Bounds = (-math.inf, math.inf)


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval (95 % unless said otherwise)."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero. An interval without width, of values that do not vary, says nothing."""
        return self.low < self.high and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.mean:.3g} (no variance)"
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def resamples(n: int, *, seed: int = 0, times: int = RESAMPLES) -> ndarray:
    """Indices ``[times, n]`` of problems drawn with replacement; the same for the same seed, so that pairs stay pairs."""
    return np.random.default_rng(seed).integers(0, n, (times, n))


def bootstrap(
    statistic: Callable[[ndarray], ndarray], n: int, *, seed: int = 0, times: int = RESAMPLES, level: float = 0.95
) -> Estimate:
    """Percentile interval of ``statistic`` under resampling of n problems.

    Args:
        statistic: ``[rows, n]`` problem indices -> ``[rows]`` values.
    """
    if n == 0:
        raise ValueError("No problems to estimate from.")
    centre = float(statistic(np.arange(n)[None])[0])
    low, high = np.quantile(statistic(resamples(n, seed=seed, times=times)), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(centre, float(low), float(high))


def mean_of(values: Float[ndarray, "problems samples"]) -> Callable[[ndarray], ndarray]:
    """Statistic: the mean over resampled problems of the per-problem mean."""
    per_problem = np.asarray(values, dtype=float).mean(axis=1)
    return lambda index: per_problem[index].mean(axis=1)


def over_problems(values: Sequence[float] | ndarray, problems: Sequence[str] | ndarray, *, seed: int = 0) -> Estimate:
    """Mean over problems of each problem's mean, from one value and one problem a row. ValueError without rows."""
    names, which = np.unique(np.asarray(problems, dtype=str), return_inverse=True)
    per_problem = np.bincount(which, np.asarray(values, dtype=float)) / np.bincount(which)
    return bootstrap(mean_of(per_problem[:, None]), len(names), seed=seed)


def difference(a: Callable[[ndarray], ndarray], b: Callable[[ndarray], ndarray]) -> Callable[[ndarray], ndarray]:
    """Statistic: a minus b on the same resampled problems (paired)."""
    return lambda index: a(index) - b(index)


def mean_of_smallest(values: Float[ndarray, "*rows n"], ranking: Float[ndarray, "*rows n"], keep: int) -> Float[ndarray, "*rows"]:
    """Mean of the ``keep`` values that rank lowest, expected over the order of those that tie at the cut.

    Args:
        ranking: What orders the values, along the last axis; equal ones are told apart by nothing.
        keep: How many, from 1 to n.
    """
    cut = np.partition(ranking, keep - 1, axis=-1)[..., keep - 1 : keep]
    below, tied = ranking < cut, ranking == cut
    sure, drawn = below.sum(axis=-1), np.where(tied, values, 0.0).sum(axis=-1) / tied.sum(axis=-1)
    return (np.where(below, values, 0.0).sum(axis=-1) + (keep - sure) * drawn) / keep


def shortest_accuracy(
    correct: Float[ndarray, "problems samples"], ranking: Float[ndarray, "problems samples"], share: float
) -> Callable[[ndarray], ndarray]:
    """Statistic: accuracy of the shortest ``share`` of responses (ThinkEdit, arXiv 2503.22048).

    For each sample index separately the problems are sorted by ``ranking`` (tokens), the first ``floor(share * n)``
    are kept, and accuracy over them is averaged over the sample indices. At least one response is kept. Where lengths tie at the
    cut, the expectation over their order is taken (:func:`mean_of_smallest`), so the order of problems does not matter.

    ``ranking`` is the model's own think length as published; for the selection-free form see :func:`held_out_length`.
    """

    def statistic(index: ndarray) -> ndarray:
        keep = max(1, int(share * index.shape[1]))
        columns = [mean_of_smallest(correct[index, s], ranking[index, s], keep) for s in range(correct.shape[1])]
        return np.mean(columns, axis=0)

    return statistic


def held_out_length(lengths: Float[ndarray, "problems samples"]) -> Float[ndarray, "problems samples"]:
    """For sample s, the problem's mean length over its *other* samples.

    Ranking by it picks the problems a model tends to think briefly about, without looking at the sample that is then
    judged; ranking every model by the base model's picks the same problems for all.
    """
    lengths = np.asarray(lengths, dtype=float)
    samples = lengths.shape[1]
    if samples < 2:
        raise ValueError("The selection-free shortest accuracy needs at least 2 samples a problem.")
    return (lengths.sum(axis=1, keepdims=True) - lengths) / (samples - 1)
