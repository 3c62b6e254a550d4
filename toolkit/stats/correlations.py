"""Correlation of rows that repeat within problems, with an interval over problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy import ndarray

from toolkit.stats.estimates import RESAMPLES, Estimate, resamples

BLOCK = 2**20  # numbers held at a time while correlations are resampled: 8 MB an array


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
    """Correlation of two columns of rows, with a 95 % interval over problems: a resampled problem brings all its rows.

    Args:
        groups: Problem of each row.
        kind: ``"pearson"`` or ``"spearman"`` (Pearson's of mid-ranks).
        within: Subtract each problem's means first, so that how hard a problem is drops out; problems with one row do too.

    NaN (undefined) if either side is constant; resamples for which it is are left out of the interval.

    Raises:
        ValueError: an unknown kind, columns of different length, or no problem with two rows to compare within.
    """
    if kind not in ("pearson", "spearman"):
        raise ValueError(f"kind={kind!r}: choose pearson or spearman.")
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    names, which = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if not len(a) == len(b) == len(which):
        raise ValueError(f"{len(a)} x, {len(b)} y and {len(which)} groups: need one of each a row.")
    if within:
        repeated = np.bincount(which)[which] > 1
        if not repeated.any():
            raise ValueError(f"None of the {len(names)} problems has two rows to compare within: sample more than once a problem.")
        names, which = np.unique(which[repeated], return_inverse=True)
        a, b = (_centred(values[repeated], which) for values in (a, b))
    if not len(names):
        raise ValueError("No rows to correlate.")
    columns = [_weighted_ranks(v) if kind == "spearman" else lambda weights, v=v: v[None] for v in (a, b)]

    def over(index: ndarray) -> ndarray:
        weights = np.array([np.bincount(row, minlength=len(names)) for row in index], dtype=float)[:, which]
        x_of, y_of = columns
        return _weighted_pearson(x_of(weights), y_of(weights), weights)

    index, block = resamples(len(names), seed=seed, times=times), max(1, BLOCK // len(a))
    centre = float(over(np.arange(len(names))[None])[0])
    draws = np.concatenate([over(index[i : i + block]) for i in range(0, times, block)])
    if math.isnan(centre) or np.isnan(draws).all():
        return Estimate(centre, math.nan, math.nan)
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return Estimate(centre, float(low), float(high))


def _centred(values: ndarray, which: ndarray) -> ndarray:
    """Values minus their group's mean, rounded so that equal ones stay equal: ranks and constants depend on it."""
    residual = values - (np.bincount(which, values) / np.bincount(which))[which]
    scale = np.abs(values).max()
    return np.round(residual / scale, 12) if scale > 0 else residual


def _weighted_ranks(values: ndarray) -> Callable[[ndarray], ndarray]:
    """Mid-ranks ``[times, rows]`` of rows that each count ``weights`` (``[times, rows]``) times, sorted once for all weights."""
    _, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))

    def ranks(weights: ndarray) -> ndarray:
        count = np.add.reduceat(weights[:, order], starts, axis=1)
        return (count.cumsum(axis=1) - (count - 1) / 2)[:, place]

    return ranks


def _weighted_pearson(a: ndarray, b: ndarray, weights: ndarray) -> ndarray:
    """One coefficient for each of the ``weights`` (``[times, rows]``); NaN where the rows that count are constant."""
    used, total = weights > 0, weights.sum(axis=1, keepdims=True)
    varies = [np.where(used, v, -np.inf).max(axis=1) > np.where(used, v, np.inf).min(axis=1) for v in (a, b)]
    da, db = (v - (weights * v).sum(axis=1, keepdims=True) / total for v in (a, b))
    spread = np.sqrt((weights * da * da).sum(axis=1) * (weights * db * db).sum(axis=1))
    return np.divide((weights * da * db).sum(axis=1), spread, out=np.full(len(weights), np.nan), where=varies[0] & varies[1])
