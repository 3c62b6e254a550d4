"""The conciseness score that CRF (``crf``, arXiv:2511.09158) multiplies by, from a small reward model that is trained here.

Equation (x: pooled hidden states of a response, standardised; Bradley-Terry over pairs of right answers to one problem):

    P(i is more concise than j) = sigma(w (x_i - x_j))          w by penalised logistic regression (scikit-learn)
    k = 0.1 + 0.9 sigma((w x - m) / s)                          m, s: mean and deviation of w x over the training responses

Deviations: the paper fine-tunes a 3B language model on 65K responses that a 72B model judged. Here a linear head on states pooled
by the caller learns from lengths: of two right answers to one problem the one at most ``1 / ratio`` as long is the more concise
(``assumed_ratio``). It judges a response from what the model's states show of it, not from its length, and can be asked about any
response.

Units and signs: + is more concise. Only arrays come in and go out; pool states with ``collect.states``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from toolkit.rewards.batch import RewardBatch
from toolkit.rewards.crf import HIGHEST, LOWEST
from toolkit.stats import Number

assumed_ratio = 1.25  # a verbose answer is at least so many times as long: ours
assumed_strength = 0.01  # C of scikit-learn: ours

PairRows = Int[ndarray, "pairs 2"]
"""Row of the more concise response, row of the less concise one."""


class NoPairsError(ValueError):
    """No two right answers to one problem differ enough in length."""


def pairs_by_length(batch: RewardBatch, *, ratio: Number = assumed_ratio) -> PairRows:
    """All pairs of right answers to one problem, one at least ``ratio`` times as long. Raises NoPairsError without any."""
    if ratio <= 1:
        raise ValueError(f"ratio={ratio}: the longer answer of a pair has to be longer.")
    found = []
    right, L = np.flatnonzero(batch["correct"]), batch["tokens"]
    by_group = np.split(right[np.argsort(batch.groups[right], kind="stable")], np.cumsum(np.bincount(batch.groups[right]))[:-1])
    for rows in by_group:
        short, long = np.nonzero(L[rows][:, None] * ratio <= L[rows][None, :])
        found.append(np.stack([rows[short], rows[long]], axis=1))
    pairs = np.concatenate(found) if found else np.empty((0, 2), np.int64)
    if not len(pairs):
        raise NoPairsError(
            f"No two right answers to one problem differ by a factor {ratio:g} in length: sample more responses a problem or lower ratio."
        )
    return pairs


@dataclass(frozen=True)
class ConcisenessHead:
    """A linear head on pooled states; made by :func:`fit`.

    Attributes:
        weight: w, ``[d]``, on raw features.
        centre: m.
        spread: s.
    """

    weight: Float[ndarray, " d"]
    centre: float
    spread: float

    def logits(self, features: Float[ndarray, "n d"]) -> Float[ndarray, " n"]:
        """w x of each response: + is more concise; only differences mean anything."""
        return features @ self.weight

    def score(self, features: Float[ndarray, "n d"]) -> Float[ndarray, " n"]:
        """The column ``conciseness``: k of each response, in [0.1, 1]."""
        return LOWEST + (HIGHEST - LOWEST) * expit((self.logits(features) - self.centre) / self.spread)

    def pair_auc(self, features: Float[ndarray, "n d"], pairs: PairRows) -> float:
        """AUC of pairs: the share told in the right order, ties counting half; chance is 0.5."""
        z = self.logits(features)[pairs]
        return float(np.mean((z[:, 0] > z[:, 1]) + 0.5 * (z[:, 0] == z[:, 1])))

    def state_dict(self) -> dict[str, Any]:
        """The head as JSON; ``ConcisenessHead.from_state_dict`` reads it back."""
        return {"weight": self.weight.tolist(), "centre": self.centre, "spread": self.spread}

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> ConcisenessHead:
        """The head of :meth:`state_dict`."""
        return cls(np.array(saved["weight"], np.float64), float(saved["centre"]), float(saved["spread"]))


def fit(features: Float[ndarray, "n d"], pairs: PairRows, *, strength: float = assumed_strength) -> ConcisenessHead:
    """Train a head on pairs of responses.

    Args:
        features: Pooled states, one row a response.
        strength: Inverse of the penalty on w (C).

    Raises:
        NoPairsError: no pairs.
        ValueError: features that are not finite.
    """
    if not len(pairs):
        raise NoPairsError("No pairs to learn from.")
    x = np.asarray(features, np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"Row {int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])} of the features is not finite.")
    used = np.unique(pairs)
    scale = x[used].std(axis=0)
    difference = (x[pairs[:, 0]] - x[pairs[:, 1]]) / np.where(scale > 0, scale, 1.0)
    # Each pair is shown both ways round, or the classifier would see one class only.
    both, truth = np.concatenate([difference, -difference]), np.repeat([1, 0], len(pairs))
    model = LogisticRegression(C=strength, fit_intercept=False, max_iter=1000).fit(both, truth)
    weight = model.coef_[0] / np.where(scale > 0, scale, 1.0)
    z = x[used] @ weight
    return ConcisenessHead(weight, float(z.mean()), float(z.std()) or 1.0)
