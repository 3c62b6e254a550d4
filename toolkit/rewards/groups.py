"""Statistics of groups, vectorised: each row gets the number of its own group, over the rows ``where`` a mask says.

A group without such rows gets the value stated (NaN unless said otherwise); no function loops over rows or groups.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

Groups = Int[ndarray, " n"]
Mask = Bool[ndarray, " n"]
Values = Float[ndarray, " n"]


def count(groups: Groups, where: Mask | None = None) -> Int[ndarray, " n"]:
    """Rows of each row's group, or those of them in a mask."""
    weights = np.ones(len(groups)) if where is None else where.astype(float)
    return np.bincount(groups, weights).astype(np.int64)[groups]


def mean(values: ndarray, groups: Groups, where: Mask | None = None) -> Values:
    """Mean over the group's rows in the mask."""
    kept = np.ones(len(groups), bool) if where is None else where
    totals = np.bincount(groups, np.where(kept, values, 0.0))
    with np.errstate(invalid="ignore"):
        return (totals / np.bincount(groups, kept.astype(float)))[groups]


def lowest(values: ndarray, groups: Groups, where: Mask | None = None) -> Values:
    """Least value over the group's rows in the mask; infinity without any."""
    found = np.full(int(groups.max()) + 1 if len(groups) else 0, np.inf)
    kept = slice(None) if where is None else where
    np.minimum.at(found, groups[kept], np.asarray(values, float)[kept])
    return found[groups]


def highest(values: ndarray, groups: Groups, where: Mask | None = None) -> Values:
    """Greatest value over the group's rows in the mask; minus infinity without any."""
    return -lowest(-np.asarray(values, float), groups, where)


def z_scores(values: ndarray, groups: Groups, where: Mask, *, ddof: int = 0) -> Values:
    """``(value - mean) / std`` over the group's rows in the mask; 0 outside it, and where there is one row or all are equal.

    Args:
        ddof: 0 divides the squares by n, 1 by n - 1.
    """
    x = np.asarray(values, float)
    n = count(groups, where)
    centred = np.where(where, x - mean(x, groups, where), 0.0)
    squares = np.bincount(groups, np.square(centred))[groups]
    varies = where & (n > 1) & (highest(x, groups, where) > lowest(x, groups, where))
    std = np.sqrt(squares / np.maximum(n - ddof, 1))
    return np.where(varies, centred / np.where(varies, std, 1.0), 0.0)
