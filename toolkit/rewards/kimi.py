"""Kimi k1.5: scaling reinforcement learning with LLMs, arXiv:2501.12599, length reward.

Equation (c: 1 if right, else 0; L: length; L_min, L_max: shortest and longest length of *all* responses to the same problem; v:
length score, from 1/2 for the shortest to -1/2 for the longest; w: weight):

    v = 1/2 - (L - L_min) / (L_max - L_min)          0 if L_max = L_min
    r = c + w v             for a right response
        c + w min(0, v)     for a wrong one

Deviations: the paper raises w gradually at the beginning of training, and w of ``Kimi`` is constant. Its default, ``assumed_weight``, is
ours; two other implementations have 0.4. Use the weighted sum below to raise w from 0 to 1 over 100 steps. ``Kimi`` includes c, so the
weight of ``Correctness`` falls from 1 to 0, and c keeps the total weight 1.

    WeightedSum(((Schedule(1, 0, first=0, last=100), Correctness()), (Schedule(0, 1, first=0, last=100), Kimi())))

Units and signs: lengths in tokens; higher is better. With w < 2 every right response (at least 1 - w/2) earns more than a wrong one (at
most 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from toolkit.rewards import groups
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

assumed_weight = 1.0


@dataclass(frozen=True)
class Kimi:
    """Correctness plus a length part: from ``+weight / 2`` for the group's shortest response to ``-weight / 2`` for its longest.

    In between, the length part is linear in the length. A wrong response never gets a positive length part. The group consists of the
    responses to the same problem.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0, 0], tokens=[100, 300, 150, 500])
    >>> Kimi()(batch).values.tolist()
    [1.5, 1.0, 0.0, -0.5]

    Attributes:
        weight: w, the weight of the length part. Below 2, every right response earns more than every wrong one.
    """

    weight: Number = assumed_weight

    name: ClassVar[str] = "kimi"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        L, g = batch["tokens"].astype(float), batch.groups
        low, high = groups.lowest(L, g), groups.highest(L, g)
        # If all lengths of a group are equal, v is 0; the inner where only avoids a division by zero.
        v = np.where(high > low, 0.5 - (L - low) / np.where(high > low, high - low, 1.0), 0.0)
        v = np.where(batch["correct"].astype(bool), v, np.minimum(0.0, v))
        return RewardValues.sum(correctness=batch["correct"], length=self.weight * v)
