"""Statistics of groups of rows, vectorised over the groups. Each function returns one number per row, and rows stay in order.

``values`` holds one number per row, ``[n]``, and ``groups`` the group index of each row, ``[n]``. ``where`` is a mask of rows, ``[n]``:
only its True rows enter a statistic; ``None`` means all rows. If a group has no row in the mask, the result is NaN, unless the docstring
of the function says otherwise.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

Groups = Int[ndarray, " n"]
Mask = Bool[ndarray, " n"]
Values = Float[ndarray, " n"]


def count(groups: Groups, where: Mask | None = None) -> Int[ndarray, " n"]:
    """Return for each row the number of rows of its group that are in the mask ``where``.

    Args:
        groups: Group index of each row, ``[n]``.
        where: Mask of rows, ``[n]``; ``None`` for all rows.
    """
    weights = np.ones(len(groups)) if where is None else where.astype(float)
    return np.bincount(groups, weights).astype(np.int64)[groups]


def mean(values: ndarray, groups: Groups, where: Mask | None = None) -> Values:
    """Return for each row the mean of ``values`` over the rows of its group that are in the mask ``where``; NaN if there are none.

    >>> mean(np.array([1.0, 3.0, 10.0]), np.array([0, 0, 1])).tolist()
    [2.0, 2.0, 10.0]

    Args:
        values: One number per row, ``[n]``.
        groups: Group index of each row, ``[n]``.
        where: Mask of rows, ``[n]``; ``None`` for all rows.
    """
    mask = np.ones(len(groups), bool) if where is None else where
    # bincount sums its weights per group; [groups] then copies the result of each group to its rows.
    totals = np.bincount(groups, np.where(mask, values, 0.0))
    with np.errstate(invalid="ignore"):  # 0 / 0 = NaN in a group without rows in the mask
        return (totals / np.bincount(groups, mask.astype(float)))[groups]


def lowest(values: ndarray, groups: Groups, where: Mask | None = None) -> Values:
    """Return for each row the smallest of ``values`` among the rows of its group in the mask ``where``; infinity if there are none.

    Args:
        values: One number per row, ``[n]``.
        groups: Group index of each row, ``[n]``.
        where: Mask of rows, ``[n]``; ``None`` for all rows.
    """
    minima = np.full(int(groups.max()) + 1 if len(groups) else 0, np.inf)
    rows = slice(None) if where is None else where
    # minimum.at handles groups that occur several times; an assignment by index would keep one value per group only.
    np.minimum.at(minima, groups[rows], np.asarray(values, float)[rows])
    return minima[groups]


def highest(values: ndarray, groups: Groups, where: Mask | None = None) -> Values:
    """Return for each row the largest of ``values`` among the rows of its group in the mask ``where``; minus infinity if there are none.

    Args:
        values: One number per row, ``[n]``.
        groups: Group index of each row, ``[n]``.
        where: Mask of rows, ``[n]``; ``None`` for all rows.
    """
    return -lowest(-np.asarray(values, float), groups, where)


def z_scores(values: ndarray, groups: Groups, where: Mask, *, ddof: int = 0) -> Values:
    """Return ``(value - mean) / std`` of each row, with mean and standard deviation over the rows of its group in the mask ``where``.

    The result is 0 for rows outside the mask. It is 0 for all rows of a group that has only one row in the mask, or only equal values.

    Args:
        values: One number per row, ``[n]``.
        groups: Group index of each row, ``[n]``.
        where: Mask of rows, ``[n]``.
        ddof: 0 or 1: the standard deviation divides by n - ddof, where n is the number of rows of the group in the mask.
    """
    x = np.asarray(values, float)
    n = count(groups, where)
    centred = np.where(where, x - mean(x, groups, where), 0.0)
    squares = np.bincount(groups, np.square(centred))[groups]
    # Compared directly, since rounding can give equal values a tiny standard deviation instead of 0.
    varies = where & (n > 1) & (highest(x, groups, where) > lowest(x, groups, where))
    std = np.sqrt(squares / np.maximum(n - ddof, 1))
    return np.where(varies, centred / np.where(varies, std, 1.0), 0.0)
