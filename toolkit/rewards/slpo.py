"""SLPO (shorter length preference optimization), the reward of the ORION paper, arXiv:2511.22891.

The paper: ORION: teaching language models to reason efficiently in the language of thought.

Equations (L: length; L_min, L_max: shortest and longest length among the right responses of the group, which holds the
responses to the same problem; alpha: largest bonus):

    r = 0                                              if wrong
    r = 1                                              if right and L_min = L_max
    r = 1 + alpha (L_max - L) / (L_max - L_min)        if right and L_min < L_max

Deviations: alpha was not found; the default, ``assumed_alpha``, is our guess. The paper implies that wrong responses get 0, but does not
say so.

Units and signs: lengths in tokens; higher is better. If only one response of a group is right, it gets 1, the same as
the *longest* right response of a group with several.
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
    """Correctness plus a bonus for right responses: ``alpha`` for the shortest right response of the group, falling to 0 for the longest.

    The group consists of the responses to the same problem. If all right responses of the group have the same length, or only one is right,
    the bonus is 0.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 1, 0], tokens=[100, 200, 300, 50])
    >>> SLPO(alpha=0.5)(batch).values.tolist()
    [1.5, 1.25, 1.0, 0.0]

    Attributes:
        alpha: Bonus of the shortest right response, at least 0.
    """

    alpha: Number = assumed_alpha

    name: ClassVar[str] = "slpo"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens"})

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"alpha={self.alpha}: need alpha >= 0, or the longest right answer would earn most.")

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        right = batch["correct"].astype(bool)
        L, g = batch["tokens"].astype(float), batch.groups
        low, high = groups.lowest(L, g, right), groups.highest(L, g, right)
        # False for wrong rows and where all right rows of the group have the same length; the bonus is 0 there.
        spread = right & (high > low)
        bonus = np.divide(high - L, high - low, out=np.zeros(len(L)), where=spread)
        return RewardValues.sum(correctness=right, length=self.alpha * bonus)
