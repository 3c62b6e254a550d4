"""Kimi k1.5: scaling reinforcement learning with LLMs, arXiv:2501.12599, length reward.

Equation (least and greatest length over *all* responses of the group):

    v = 1/2 - (L - L_min) / (L_max - L_min)          0 if L_max = L_min
    r = c + w v             for a right answer
        c + w min(0, v)     for a wrong one

Deviations: none. The paper warms the weight up; put the reward in a sum with a schedule (``combine.WeightedSum``) for that.

Units and signs: tokens; + is paid. With w <= 1 the longest right answer (1 - w/2) is never paid less than a wrong one (at most 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from toolkit.rewards import groups
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number


@dataclass(frozen=True)
class Kimi:
    """Length within the range of the group; wrong answers can only lose by it.

    Attributes:
        weight: w of the length part.
    """

    weight: Number = 1.0

    name: ClassVar[str] = "kimi"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        L, g = batch["tokens"].astype(float), batch.groups
        low, high = groups.lowest(L, g), groups.highest(L, g)
        v = np.where(high > low, 0.5 - (L - low) / np.where(high > low, high - low, 1.0), 0.0)
        v = np.where(batch["correct"].astype(bool), v, np.minimum(0.0, v))
        return RewardValues.sum(correctness=batch["correct"], length=self.weight * v)
