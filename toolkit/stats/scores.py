"""Scores of predictions (AUC, balanced accuracy, R^2), Spearman's rank correlation, and p-values (Holm's correction, permutation test)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import stats as scipy_stats


def spearman(x: Sequence[float] | ndarray, y: Sequence[float] | ndarray) -> float:
    """Return Spearman's rank correlation of x and y; NaN (undefined) if x or y is constant.

    >>> spearman([1.0, 2.0, 3.0], [10.0, 30.0, 20.0])
    0.5
    """
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(scipy_stats.spearmanr(x, y).statistic)


def auc(truth: ndarray, score: ndarray) -> float:
    """Return the AUC, the area under the ROC curve: the probability that a True case has a higher score than a False case.

    A pair with equal scores counts half. The AUC is NaN (undefined) if all cases are True or all are False.

    Args:
        truth: Label of each case, True or False.
        score: Score of each case. A good score is higher for True cases.

    >>> auc(np.array([True, True, False, False]), np.array([0.9, 0.4, 0.4, 0.1]))
    0.875
    """
    truth = np.asarray(truth, bool)
    pos, neg = truth.sum(), (~truth).sum()
    if not pos or not neg:
        return math.nan
    # The rank sum of the True cases, minus its smallest possible value, is the number of pairs that the True case wins (Mann-Whitney U).
    ranks = scipy_stats.rankdata(score)
    return float((ranks[truth].sum() - pos * (pos + 1) / 2) / (pos * neg))


def balanced_accuracy(truth: ndarray, predicted: ndarray) -> float:
    """Return the balanced accuracy: the mean of the accuracy on True cases and the accuracy on False cases.

    Predicting the same label for all cases gives 0.5. The result is NaN (undefined) if all cases are True or all are False.

    Args:
        truth: Label of each case, True or False.
        predicted: Predicted label of each case, True or False.

    >>> balanced_accuracy(np.array([True, True, True, False]), np.array([True, True, True, True]))
    0.5
    """
    truth, predicted = np.asarray(truth, bool), np.asarray(predicted, bool)
    if truth.all() or not truth.any():
        return math.nan
    return float((predicted[truth].mean() + (~predicted[~truth]).mean()) / 2)


def r_squared(truth: ndarray, predicted: ndarray) -> float:
    """Return R^2, the share of the variance of ``truth`` that the predictions explain.

    ``R^2 = 1 - sum((truth - predicted)^2) / sum((truth - mean(truth))^2)``. It is negative if the predictions are worse than the constant
    ``mean(truth)``, and NaN if ``truth`` is constant.

    >>> r_squared(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 2.0]))
    0.5
    """
    spread = np.square(truth - np.mean(truth)).sum()
    return float(1 - np.square(truth - predicted).sum() / spread) if spread > 0 else math.nan


def holm(p: Float[ndarray, " tests"]) -> Float[ndarray, " tests"]:
    """Return the p-values of several tests, corrected for their number by Holm's method, in the order of ``p``.

    Call a test significant if its corrected p-value is at most 0.05. Then the chance of any false positive among all tests is at most 0.05.
    The same holds for other levels. A NaN in ``p`` stays NaN and does not count as a test.

    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    judged = np.flatnonzero(~np.isnan(p))
    order = judged[np.argsort(p[judged], kind="stable")]
    # Of m tests, the smallest p-value is multiplied by m, the next by m - 1, ... The running maximum keeps their order.
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * (len(order) - np.arange(len(order)))))
    return corrected


def permutation_p(as_extreme: ndarray) -> float:
    """Return the p-value of a permutation test: ``(b + 1) / (m + 1)`` if b of m random permutations are at least as extreme as the data.

    The added 1 in numerator and denominator stands for the observed data, which count as one more permutation. So the p-value is never 0.

    Args:
        as_extreme: One entry per permutation: True if its statistic is at least as extreme as the observed one.

    >>> permutation_p(np.array([True] + [False] * 98))
    0.02
    """
    return float((np.sum(as_extreme) + 1) / (len(as_extreme) + 1))
