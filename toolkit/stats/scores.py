"""Scores of predictions (AUC, balanced accuracy, R^2), Spearman's rank correlation, corrected p-values and permutation p-values."""

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
    """Return the area under the ROC curve: the share of pairs of a True and a False case in which the True case has the higher score.

    Ties count half. NaN (undefined) if all cases are True or all are False.

    Args:
        truth: True or False for each case.
        score: Score of each case, expected to be higher for True cases.

    >>> auc(np.array([True, True, False, False]), np.array([0.9, 0.4, 0.4, 0.1]))
    0.875
    """
    truth = np.asarray(truth, bool)
    pos, neg = truth.sum(), (~truth).sum()
    if not pos or not neg:
        return math.nan
    ranks = scipy_stats.rankdata(score)
    return float((ranks[truth].sum() - pos * (pos + 1) / 2) / (pos * neg))


def balanced_accuracy(truth: ndarray, predicted: ndarray) -> float:
    """Return balanced accuracy: the mean of the accuracy on True cases and the accuracy on False cases. A constant prediction gets 0.5.

    NaN (undefined) if all cases are True or all are False.

    Args:
        truth: True or False for each case.
        predicted: Prediction for each case, True or False.

    >>> balanced_accuracy(np.array([True, True, True, False]), np.array([True, True, True, True]))
    0.5
    """
    truth, predicted = np.asarray(truth, bool), np.asarray(predicted, bool)
    if truth.all() or not truth.any():
        return math.nan
    return float((predicted[truth].mean() + (~predicted[~truth]).mean()) / 2)


def r_squared(truth: ndarray, predicted: ndarray) -> float:
    """Return R^2, the share of the variance of ``truth`` that the predictions explain.

    R^2 is 1 minus the squared error of the predictions divided by the squared error of predicting the mean. R^2 is negative if predicting
    the mean would be better, and NaN if ``truth`` is constant.

    >>> r_squared(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 2.0]))
    0.5
    """
    spread = np.square(truth - np.mean(truth)).sum()
    return float(1 - np.square(truth - predicted).sum() / spread) if spread > 0 else math.nan


def holm(p: Float[ndarray, " tests"]) -> Float[ndarray, " tests"]:
    """Return p-values corrected by Holm's method for the number of tests, in the order of ``p``.

    If tests are called significant when their corrected p-value is at most 0.05, the chance of one or more false positives is at most 0.05;
    the same holds for any other level. A NaN in ``p`` stays NaN and does not count as a test.

    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    judged = np.flatnonzero(~np.isnan(p))
    order = judged[np.argsort(p[judged], kind="stable")]
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * (len(order) - np.arange(len(order)))))
    return corrected


def permutation_p(as_extreme: ndarray) -> float:
    """Return the p-value of a permutation test: ``(b + 1) / (m + 1)`` if b of m drawn permutations are at least as extreme as the data.

    The observed data count as one more permutation, so the p-value is never 0.

    Args:
        as_extreme: One entry per drawn permutation: True if its statistic is at least as extreme as that of the observed data.

    >>> permutation_p(np.array([True] + [False] * 98))
    0.02
    """
    return float((np.sum(as_extreme) + 1) / (len(as_extreme) + 1))
