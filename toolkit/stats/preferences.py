"""The Bradley-Terry model: scores from pairs of which one is preferred, and how often scores agree with such pairs."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import optimize, special

PairRows = Int[ndarray, "pairs 2"]
"""Pairs as row indices: ``(row of the preferred one, row of the other)``."""


def bradley_terry(
    features: Float[ndarray, "n d"], pairs: PairRows, *, strength: float, margins: Float[ndarray, " pairs"] | None = None
) -> Float[ndarray, " d"]:
    """Return the weights w of a linear Bradley-Terry model: ``P(i is preferred to j) = sigma(w (x_i - x_j))``, sigma the logistic function.

    w minimises ``-2 strength sum log sigma(w (x_i - x_j) - m) + |w|^2 / 2`` over pairs, without an intercept. Features are standardised for
    the fit; the weights are converted back, so that scores are ``features @ weights``. The factor 2 counts each pair in both orders.

    Args:
        features: Features x of each row.
        pairs: Row indices of pairs, the preferred one first.
        strength: Inverse of the L2 penalty: a lower value gives smaller weights.
        margins: m of each pair, by how much more the preferred one has to score; larger for clearer preferences (Llama 2,
            arXiv:2307.09288, eq. 2). Default: 0.

    Raises:
        ValueError: there are no pairs, not one margin per pair, or a feature is not finite.
    """
    if not len(pairs):
        raise ValueError("No pairs to fit to: give at least one.")
    m = np.zeros(len(pairs)) if margins is None else np.asarray(margins, np.float64)
    if m.shape != (len(pairs),) or not np.isfinite(m).all():
        raise ValueError(f"Margins of shape {m.shape} for {len(pairs)} pairs: give one finite number per pair.")
    x = np.asarray(features, np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"Row {int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])} of the features is not finite.")
    spread = x[np.unique(pairs)].std(axis=0)
    scale = np.where(spread > 0, spread, 1.0)  # constant features are divided by 1
    difference = (x[pairs[:, 0]] - x[pairs[:, 1]]) / scale

    def loss(w: ndarray) -> tuple[float, ndarray]:
        z = difference @ w - m
        value = -2 * strength * special.log_expit(z).sum() + w @ w / 2
        return float(value), w - 2 * strength * special.expit(-z) @ difference

    options = {"maxiter": 1000, "gtol": 1e-5}
    return optimize.minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options=options).x / scale


def pair_agreement(scores: Float[ndarray, " n"], pairs: PairRows) -> Float[ndarray, " pairs"]:
    """Return 1 for each pair whose preferred row has the higher score, 0 if it has the lower one, and one half if they are equal.

    >>> pair_agreement(np.array([3.0, 1.0, 1.0]), np.array([[0, 1], [1, 0], [1, 2]])).tolist()
    [1.0, 0.0, 0.5]
    """
    preferred, other = scores[pairs[:, 0]], scores[pairs[:, 1]]
    return (preferred > other) + 0.5 * (preferred == other)
