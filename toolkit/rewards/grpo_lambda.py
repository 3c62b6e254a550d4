"""GRPO-lambda: stable reinforcement learning for efficient reasoning, arXiv:2505.18086.

Equations (groups k of a batch, a_k the share of right answers of group k):

    efficiency groups: the ceil(lambda K) groups of highest a_k, at least one
    efficiency group   r = c (1 - alpha sigma((L - mu_k) / s_k))        mu_k, s_k over its right responses
    accuracy group     r = c

Length is priced only where the model is already right; the price moves from group to group as it learns.

Deviations: alpha was not found in a primary source (``assumed_alpha`` is that of a third party's code). Groups of equal accuracy
are ordered by a hash of step and problem id, so that neither the order of rows nor the same problems are favoured; the order is
not stated. A third party's code prices wrong responses of a top group too, and fails on one without a right response; not copied.

Units and signs: tokens; + is paid. The ranking is over the whole batch: several processes must see all of it.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from toolkit.rewards.arora_zanette import check_alpha, discount
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

PUBLISHED_SHARE = 0.2  # lambda: given as the example
assumed_alpha = 0.6  # a third party's code


@dataclass(frozen=True)
class GRPOLambda:
    """Length is priced in the most accurate groups only.

    Attributes:
        share: lambda, the share of groups that are priced.
        alpha: Most that length can cost there.
        ddof: 0 divides squares by n, 1 by n - 1 (not stated).
    """

    share: Number = PUBLISHED_SHARE
    alpha: Number = assumed_alpha
    ddof: int = 0

    name: ClassVar[str] = "grpo_lambda"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens"})

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: need 0 < share <= 1.")

    def priced(self, batch: RewardBatch) -> Bool[ndarray, " n"]:
        """Whether each row is in an efficiency group."""
        g = batch.groups
        if not len(g):
            return np.zeros(0, bool)
        accuracy = np.bincount(g, batch["correct"].astype(float)) / np.bincount(g)
        ties = np.array([zlib.crc32(f"{batch.step}|{problem}".encode()) for problem in batch.group_ids])
        top = np.lexsort((batch.group_ids.astype(str), ties, -accuracy))[: max(1, math.ceil(self.share * len(accuracy) - 1e-9))]
        return np.isin(g, top)

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        return RewardValues.sum(
            correctness=batch["correct"], length=np.where(self.priced(batch), -discount(batch, self.alpha, self.ddof), 0.0)
        )
