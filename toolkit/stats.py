"""Statistics: paired bootstrap over problems, correlations, and the lengths of the shortest responses.

Arrays are ``[problems, samples]``; intervals are percentile intervals over resampled *problems* (the unit that
repeats), with every sample of a problem kept together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import stats as scipy_stats

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval (95 % unless said otherwise)."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
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


def difference(a: Callable[[ndarray], ndarray], b: Callable[[ndarray], ndarray]) -> Callable[[ndarray], ndarray]:
    """Statistic: a minus b on the same resampled problems (paired)."""
    return lambda index: a(index) - b(index)


def shortest_accuracy(
    correct: Float[ndarray, "problems samples"], ranking: Float[ndarray, "problems samples"], share: float
) -> Callable[[ndarray], ndarray]:
    """Statistic: accuracy of the shortest ``share`` of responses (ThinkEdit, arXiv 2503.22048).

    For each sample index separately the problems are sorted by ``ranking`` (tokens), the first ``floor(share * n)``
    are kept, and accuracy over them is averaged over the sample indices. At least one response is kept.

    ``ranking`` is the model's own think length as published; for the selection-free form see :func:`held_out_length`.
    """

    def statistic(index: ndarray) -> ndarray:
        keep = max(1, int(share * index.shape[1]))
        columns = []
        for s in range(correct.shape[1]):
            order = np.argsort(ranking[index, s], axis=1, kind="stable")[:, :keep]
            columns.append(np.take_along_axis(correct[index, s], order, axis=1).mean(axis=1))
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


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation."""
    return float(scipy_stats.spearmanr(x, y).statistic)


def looping(tokens: Sequence[int], *, longest_period: int = 64, repeats: int = 4) -> bool:
    """Whether a response ends in the same run of tokens at least ``repeats`` times (ours; at least 16 tokens in all)."""
    n = len(tokens)
    for period in range(1, min(longest_period, n // repeats) + 1):
        span = max(period * repeats, 16)
        if span <= n and all(tokens[i] == tokens[i - period] for i in range(n - span + period, n)):
            return True
    return False
