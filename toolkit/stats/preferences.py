"""The Bradley-Terry model: scores from pairs of which one is preferred, and how often scores agree with such pairs."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

PairRows = Int[ndarray, "pairs 2"]
"""Pairs as row indices: ``(row of the preferred one, row of the other)``."""


def bradley_terry(features: Float[ndarray, "n d"], pairs: PairRows, *, strength: float) -> Float[ndarray, " d"]:
    """Return the weights w of a linear Bradley-Terry model: ``P(i is preferred to j) = sigma(w (x_i - x_j))``, sigma the logistic function.

    w is fitted by penalised logistic regression (scikit-learn), without an intercept. Features are standardised for the fit; the weights
    are converted back, so that scores are ``features @ weights``.

    Args:
        features: Features x of each row.
        pairs: Row indices of pairs, the preferred one first.
        strength: Inverse of the L2 penalty, C of scikit-learn: a lower value gives smaller weights.

    Raises:
        ValueError: there are no pairs, or a feature is not finite.
    """
    from sklearn.linear_model import LogisticRegression

    if not len(pairs):
        raise ValueError("No pairs to fit to: give at least one.")
    x = np.asarray(features, np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"Row {int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])} of the features is not finite.")
    spread = x[np.unique(pairs)].std(axis=0)
    scale = np.where(spread > 0, spread, 1.0)  # constant features are divided by 1
    difference = (x[pairs[:, 0]] - x[pairs[:, 1]]) / scale
    # Each pair enters in both orders, since the classifier needs examples of both classes.
    both, truth = np.concatenate([difference, -difference]), np.repeat([1, 0], len(pairs))
    model = LogisticRegression(C=strength, fit_intercept=False, max_iter=1000).fit(both, truth)
    return model.coef_[0] / scale


def pair_agreement(scores: Float[ndarray, " n"], pairs: PairRows) -> Float[ndarray, " pairs"]:
    """Return 1 for each pair whose preferred row has the higher score, 0 if it has the lower one, and one half if they are equal.

    >>> pair_agreement(np.array([3.0, 1.0, 1.0]), np.array([[0, 1], [1, 0], [1, 2]])).tolist()
    [1.0, 0.0, 0.5]
    """
    preferred, other = scores[pairs[:, 0]], scores[pairs[:, 1]]
    return (preferred > other) + 0.5 * (preferred == other)
