"""Scores of predictions and of ranks, and corrected p-values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import stats as scipy_stats


def spearman(x: Sequence[float] | ndarray, y: Sequence[float] | ndarray) -> float:
    """Spearman's rank correlation; NaN (undefined) if either side is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(scipy_stats.spearmanr(x, y).statistic)


def auc(truth: ndarray, score: ndarray) -> float:
    """Chance that a true case scores above a false one, ties counting half; NaN (undefined) if one kind is missing."""
    truth = np.asarray(truth, bool)
    pos, neg = truth.sum(), (~truth).sum()
    if not pos or not neg:
        return math.nan
    ranks = scipy_stats.rankdata(score)
    return float((ranks[truth].sum() - pos * (pos + 1) / 2) / (pos * neg))


def balanced_accuracy(truth: ndarray, predicted: ndarray) -> float:
    """Mean of the shares of true and of false cases told right: chance is 0.5 whatever the balance. NaN if one is missing."""
    truth, predicted = np.asarray(truth, bool), np.asarray(predicted, bool)
    if truth.all() or not truth.any():
        return math.nan
    return float((predicted[truth].mean() + (~predicted[~truth]).mean()) / 2)


def r_squared(truth: ndarray, predicted: ndarray) -> float:
    """Share of variance explained, 1 - SSE / SST; negative where the mean would do better, NaN if the truth is constant."""
    spread = np.square(truth - np.mean(truth)).sum()
    return float(1 - np.square(truth - predicted).sum() / spread) if spread > 0 else math.nan


def holm(p: Float[ndarray, " tests"]) -> Float[ndarray, " tests"]:
    """Holm's correction: p-values that keep the chance of any false alarm over all the tests below the level they are read at.

    A p of NaN was not judged: it stays NaN and is no test.
    """
    judged = np.flatnonzero(~np.isnan(p))
    order = judged[np.argsort(p[judged], kind="stable")]
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * (len(order) - np.arange(len(order)))))
    return corrected


def permutation_p(as_extreme: ndarray) -> float:
    """p-value of a permutation test, from whether each drawn permutation is as extreme as what was observed: ``(b + 1) / (m + 1)``.

    The observed order counts as one of the permutations, so the p-value is never 0.
    """
    return float((np.sum(as_extreme) + 1) / (len(as_extreme) + 1))
