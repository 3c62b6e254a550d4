"""Kimi k1.5: scaling reinforcement learning with LLMs, arXiv:2501.12599, length reward.

Equation (c: 1 if right, else 0; L: length; L_min, L_max: shortest and longest length of *all* responses of the group; w: weight):

    v = 1/2 - (L - L_min) / (L_max - L_min)          0 if L_max = L_min
    r = c + w v             for a right answer
        c + w min(0, v)     for a wrong one

Deviations: none. The paper raises the weight gradually at first: for that, put the reward in a ``combine.WeightedSum`` with a ``Schedule``.

Units and signs: lengths in tokens; higher is better. With w <= 1 the longest right answer (1 - w/2) never earns less than a wrong
one (at most 0).
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
    """Correctness plus a length part: from ``+weight / 2`` for the group's shortest response to ``-weight / 2`` for its longest.

    A wrong answer never gets a positive length part.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0, 0], tokens=[100, 300, 150, 500])
    >>> Kimi()(batch).values.tolist()
    [1.5, 1.0, 0.0, -0.5]

    Attributes:
        weight: w, weight of the length part; at most 1 if right answers are to beat wrong ones.
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
