"""SLPO, the reward of ORION: teaching language models to reason efficiently in the language of thought, arXiv:2511.22891.

Equations (P the right responses of the group, L_min and L_max over P):

    r = 0                                              wrong, or P empty
    r = 1                                              right, if |P| = 1 or L_min = L_max
    r = 1 + alpha (L_max - L) / (L_max - L_min)        right, otherwise

Deviations: alpha was not found (``assumed_alpha``); that wrong answers get 0 is implied, not printed.

Units and signs: tokens; + is paid. The only right response of a group is paid like the *longest* of several.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from toolkit.rewards import groups
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

assumed_alpha = 0.5  # ours


@dataclass(frozen=True)
class SLPO:
    """A bonus of up to ``alpha`` for the shortest right answer of the group.

    Attributes:
        alpha: Bonus of the shortest.
    """

    alpha: Number = assumed_alpha

    name: ClassVar[str] = "slpo"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens"})

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"alpha={self.alpha}: a negative bonus would pay the longest right answer most.")

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        right = batch["correct"].astype(bool)
        L, g = batch["tokens"].astype(float), batch.groups
        low, high = groups.lowest(L, g, right), groups.highest(L, g, right)
        spread = right & (high > low)
        bonus = np.divide(high - L, high - low, out=np.zeros(len(L)), where=spread)
        return RewardValues.sum(correctness=right, length=self.alpha * bonus)
