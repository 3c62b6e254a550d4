"""A linear head that scores the conciseness of responses, and its training.

The score k is an input of the conciseness reward function (CRF, module ``crf``, arXiv:2511.09158).

Equations (x: features of a response, a mean of its hidden states; w: weights of the features; i, j: two right responses to one problem;
sigma: the logistic function):

    P(i is more concise than j) = sigma(w (x_i - x_j))          a Bradley-Terry model; w by penalised logistic regression (scikit-learn)
    k = 0.1 + 0.9 sigma((w x - m) / s)                          m, s: mean and standard deviation of w x over the training responses

Deviations: the paper fine-tunes a 3B language model on 65K responses that a 72B model scored. Here a linear head is trained on averaged
hidden states, which the caller provides. In training runs these come from ``grpo.judge.mean_states``: the residual stream after the last
block, averaged over the positions that predict the response's tokens. The features x are standardised for the fit only; w is then converted
back to the scale of x. The training labels come from lengths: of two right responses to the same problem, the shorter counts as more
concise if the longer has at least ``ratio`` times its length. The default ratio, ``assumed_ratio``, is our guess. To score a response, the
head needs only its features, not its length or grade.

Units and signs: higher is more concise; k is in [0.1, 1]. Inputs and outputs are arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.special import expit

from toolkit import stats
from toolkit.rewards.batch import RewardBatch
from toolkit.rewards.crf import HIGHEST, LOWEST
from toolkit.stats import Number, PairRows

assumed_ratio = 1.25  # a verbose answer is at least this many times as long: ours
assumed_strength = 0.01  # C of scikit-learn, the inverse of the penalty: ours


class NoPairsError(ValueError):
    """There are no pairs to train on: no two right responses to one problem differ enough in length."""


def pairs_by_length(batch: RewardBatch, *, ratio: Number = assumed_ratio) -> PairRows:
    """Return all pairs of right responses to the same problem in which one is at least ``ratio`` times as long as the other.

    Each row of the result holds two row indices of the batch: ``(row of the shorter response, row of the longer one)``. The length is the
    column ``tokens``.

    >>> pairs_by_length(RewardBatch.from_columns(correct=[1, 1, 1, 0], tokens=[100, 110, 300, 900])).tolist()
    [[0, 2], [1, 2]]

    Args:
        batch: Rollouts, with the columns ``correct`` and ``tokens``.
        ratio: Least ratio of the two lengths, above 1.

    Raises:
        NoPairsError: There is no such pair.
        ValueError: ``ratio`` is not above 1.
    """
    if ratio <= 1:
        raise ValueError(f"ratio={ratio}: need ratio > 1, or a pair would not differ in length.")
    parts = []  # one array of pairs per group
    right, L = np.flatnonzero(batch["correct"]), batch["tokens"]
    # One array of row numbers per group, of its right answers only.
    by_group = np.split(right[np.argsort(batch.groups[right], kind="stable")], np.cumsum(np.bincount(batch.groups[right]))[:-1])
    for rows in by_group:
        # Index pairs into rows: the shorter and the longer answer.
        short, long = np.nonzero(L[rows][:, None] * ratio <= L[rows][None, :])
        parts.append(np.stack([rows[short], rows[long]], axis=1))
    pairs = np.concatenate(parts) if parts else np.empty((0, 2), np.int64)
    if not len(pairs):
        raise NoPairsError(
            f"No two right answers to one problem differ by a factor of {ratio:g} in length: sample more responses per problem, or lower ratio."
        )
    return pairs


@dataclass(frozen=True)
class ConcisenessHead:
    """A linear head that scores the conciseness of responses from their features. ``fit`` trains it.

    The features of a response are the residual stream after the last block, averaged over the positions that predict the response's tokens:
    ``grpo.judge.mean_states`` computes them. Other features work too, but ``fit`` and ``score`` must get features of the same kind.

    The score of a response with features x is ``0.1 + 0.9 sigma((w x - m) / s)``, where sigma is the logistic function.

    Attributes:
        weight: w, the weights of the features, ``[d]``. Features need no standardisation before they are multiplied by w.
        centre: m, the mean of w x (weights times features) over the training responses.
        spread: s, the standard deviation of w x over the training responses.
    """

    weight: Float[ndarray, " d"]
    centre: float
    spread: float

    def logits(self, features: Float[ndarray, "n d"]) -> Float[ndarray, " n"]:
        """Return the unscaled score ``w x`` of each response: its features x times the weights w. Higher is more concise.

        The zero of this scale is arbitrary, so only differences between responses have meaning.

        Args:
            features: Features of each response, ``[n, d]``: the residual stream after the last block, averaged over the positions that
                predict the response's tokens. ``grpo.judge.mean_states`` computes them.
        """
        return features @ self.weight

    def score(self, features: Float[ndarray, "n d"]) -> Float[ndarray, " n"]:
        """Return the conciseness score of each response, in [0.1, 1]; higher is more concise.

        The reward ``crf.CRF`` reads this score from the column ``conciseness``.

        Args:
            features: Features of each response, ``[n, d]``: the residual stream after the last block, averaged over the positions that
                predict the response's tokens. ``grpo.judge.mean_states`` computes them.
        """
        return LOWEST + (HIGHEST - LOWEST) * expit((self.logits(features) - self.centre) / self.spread)

    def pair_auc(self, features: Float[ndarray, "n d"], pairs: PairRows) -> float:
        """Return the share of pairs, from 0 to 1, in which the more concise response has the higher score.

        A pair with two equal scores counts as one half. Random scores give 0.5.

        Args:
            features: Features of each response, ``[n, d]``: the residual stream after the last block, averaged over the positions that
                predict the response's tokens. ``grpo.judge.mean_states`` computes them.
            pairs: Pairs ``(row of the more concise response, row of the less concise one)``, from ``pairs_by_length``. They are row
                indices of ``features``.
        """
        return float(stats.pair_agreement(self.logits(features), pairs).mean())

    def state_dict(self) -> dict[str, Any]:
        """Return the head's fields, ``weight``, ``centre`` and ``spread``, as a dict that can be written as JSON."""
        return {"weight": self.weight.tolist(), "centre": self.centre, "spread": self.spread}

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> ConcisenessHead:
        """Make a head from ``saved``, the result of ``state_dict``."""
        return cls(np.array(saved["weight"], np.float64), float(saved["centre"]), float(saved["spread"]))


def fit(features: Float[ndarray, "n d"], pairs: PairRows, *, strength: float = assumed_strength) -> ConcisenessHead:
    """Train a ``ConcisenessHead`` on pairs of responses, and return it.

    Args:
        features: Features of each response, ``[n, d]``: the residual stream after the last block, averaged over the positions that
            predict the response's tokens. ``grpo.judge.mean_states`` computes them.
        pairs: Pairs ``(row of the more concise response, row of the less concise one)``, from ``pairs_by_length``. They are row indices of
            ``features``.
        strength: Inverse of the strength of the L2 penalty, C in scikit-learn's logistic regression: a lower value gives smaller weights.

    Raises:
        NoPairsError: There are no pairs.
        ValueError: A feature is not finite.
    """
    if not len(pairs):
        raise NoPairsError("No pairs to train on: give at least one, from pairs_by_length.")
    weight = stats.bradley_terry(features, pairs, strength=strength)
    z = np.asarray(features, np.float64)[np.unique(pairs)] @ weight
    # A spread of 0 (all logits equal) becomes 1: score divides by it.
    return ConcisenessHead(weight, float(z.mean()), float(z.std()) or 1.0)
