"""Correlation of two columns of a table (such as one row per rollout), with a bootstrap interval that resamples problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy import ndarray

from toolkit.stats.estimates import RESAMPLES, Estimate, resamples

BLOCK = 2**20  # numbers per array in one block of resamples: 8 MB


def correlation(
    x: Sequence[float] | ndarray,
    y: Sequence[float] | ndarray,
    groups: Sequence[str] | ndarray,
    *,
    kind: str = "pearson",
    within: bool = False,
    times: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Return the correlation of two columns of a table, with a 95 % bootstrap interval that resamples problems.

    A resample draws problems with replacement, and takes all rows of each drawn problem. If either column is constant, the correlation and
    both ends of the interval are NaN (undefined). If a column is constant only in some resamples, the interval ignores these resamples.

    Args:
        x: First column, one number per row.
        y: Second column, one number per row.
        groups: Problem id of each row.
        kind: ``"pearson"`` or ``"spearman"`` (Pearson's correlation of the ranks, where ties get their mean rank).
        within: True for the correlation within problems. Each problem's mean is first subtracted from both columns. This removes
            differences between problems, such as difficulty. Problems with a single row are left out.
        times: Number of resamples.
        seed: Random seed for the resamples.

    Raises:
        ValueError: an unknown kind, columns of different length, or, with ``within``, no problem with two rows.

    >>> print(correlation([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 9.0], ["a", "a", "b", "b"]))
    0.994 [0.994, 1]
    """
    if kind not in ("pearson", "spearman"):
        raise ValueError(f"kind={kind!r}: choose pearson or spearman.")
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    names, which = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if not len(a) == len(b) == len(which):
        raise ValueError(f"{len(a)} x, {len(b)} y and {len(which)} groups: need one of each per row.")
    if within:
        repeated = np.bincount(which)[which] > 1
        if not repeated.any():
            raise ValueError(
                f"None of the {len(names)} problems has two rows, which within=True needs: draw more than one sample per problem."
            )
        names, which = np.unique(which[repeated], return_inverse=True)
        a, b = (_centred(values[repeated], which) for values in (a, b))
    if not len(names):
        raise ValueError("No rows to correlate.")
    # For each column, a function from row weights to the numbers to correlate. Ranks differ between resamples; values do not, so one row
    # stands for all resamples. (v=v binds the column of this round of the loop.)
    columns = [_weighted_ranks(v) if kind == "spearman" else lambda weights, v=v: v[None] for v in (a, b)]

    def over(index: ndarray) -> ndarray:
        # A resample is never copied: a problem drawn k times gives each of its rows the weight k. One row of weights per resample.
        weights = np.array([np.bincount(row, minlength=len(names)) for row in index], dtype=float)[:, which]
        x_of, y_of = columns
        return _weighted_pearson(x_of(weights), y_of(weights), weights)

    # In the estimate (centre) every problem counts once. Resamples are processed in blocks to limit the memory of arrays [resamples, rows].
    index, block = resamples(len(names), seed=seed, times=times), max(1, BLOCK // len(a))
    centre = float(over(np.arange(len(names))[None])[0])
    draws = np.concatenate([over(index[i : i + block]) for i in range(0, times, block)])
    if math.isnan(centre) or np.isnan(draws).all():
        return Estimate(centre, math.nan, math.nan)
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return Estimate(centre, float(low), float(high))


def _centred(values: ndarray, which: ndarray) -> ndarray:
    """Return each value minus the mean of its group, divided by the largest absolute value in ``values`` and rounded to 12 decimals.

    Floating-point error can make equal differences unequal. Rounding makes them equal again, which ranks and the check for constant columns
    need. The error is proportional to the largest value, so the differences are divided by that value before rounding. Dividing all of them
    by one number does not change correlations.

    Args:
        values: One number per row.
        which: Group number of each row, from 0.
    """
    residual = values - (np.bincount(which, values) / np.bincount(which))[which]
    scale = np.abs(values).max()
    return np.round(residual / scale, 12) if scale > 0 else residual


def _weighted_ranks(values: ndarray) -> Callable[[ndarray], ndarray]:
    """Return a function that ranks ``values`` in each resample. It takes row weights ``[times, rows]`` and returns ranks of the same shape.

    ``times`` is the number of resamples. The weight of a row is the number of times the resample drew it. A row of weight k counts as k
    rows with equal values, and equal values get their mean rank. The values are sorted only once, when the function is made.
    """
    # place: index of each row's value among the sorted distinct values. order: rows sorted by value. starts: where in order a new value
    # begins; prepend=-1 makes position 0 a start.
    _, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))

    def ranks(weights: ndarray) -> ndarray:
        # count: how often each distinct value occurs in each resample. If c equal values end at rank e, their mean rank is e - (c - 1) / 2.
        count = np.add.reduceat(weights[:, order], starts, axis=1)
        return (count.cumsum(axis=1) - (count - 1) / 2)[:, place]

    return ranks


def _weighted_pearson(a: ndarray, b: ndarray, weights: ndarray) -> ndarray:
    """Return Pearson's weighted correlation of a and b in each resample, ``[times]``.

    The result is NaN if a or b is constant over the rows of positive weight.

    Args:
        a: First column, ``[times, rows]``, or ``[1, rows]`` if it is the same for all resamples.
        b: Second column, of the same shape.
        weights: Weights of the rows in each resample, ``[times, rows]``.
    """
    # varies: whether the largest and the smallest drawn value differ. The variance of a constant column is no test: rounding can make it
    # nonzero.
    used, total = weights > 0, weights.sum(axis=1, keepdims=True)
    varies = [np.where(used, v, -np.inf).max(axis=1) > np.where(used, v, np.inf).min(axis=1) for v in (a, b)]
    da, db = (v - (weights * v).sum(axis=1, keepdims=True) / total for v in (a, b))
    spread = np.sqrt((weights * da * da).sum(axis=1) * (weights * db * db).sum(axis=1))
    return np.divide((weights * da * db).sum(axis=1), spread, out=np.full(len(weights), np.nan), where=varies[0] & varies[1])
