"""GR3: group relative reward rescaling, arXiv:2603.10535.

Equations (R: reward without regard to length, here c, 1 if right and else 0; L: length; Lbar: mean length of all responses to the problem,
its group; alpha: strength):

    r = R / (1 + alpha L / Lbar)

Length multiplies the reward, so a policy cannot trade correctness for shortness: a wrong response earns 0 at any length.

Deviations: the paper calibrates alpha such that a response with the highest reward and the average length keeps an advantage of at least 0.
We did not find its rule: ``alpha`` is fixed, and ``average_margin`` computes that advantage. If no response of a group has a token, L / Lbar is
taken as 1 (ours).

Units and signs: lengths in tokens; higher is better. A negative R would make shorter responses worse, so the formula needs rewards of at
least 0; a constant added to R changes the method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from toolkit.rewards import groups
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

PUBLISHED_ALPHA = 0.33


def factors(batch: RewardBatch, alpha: Number) -> Float[ndarray, " n"]:
    """Return ``1 / (1 + alpha L / Lbar)`` of each response, ``[n]``: the share of its reward that it keeps.

    >>> factors(RewardBatch.from_columns(tokens=[100, 300]), alpha=1.0).round(3).tolist()
    [0.667, 0.4]
    """
    tokens = batch["tokens"].astype(float)
    average = groups.mean(tokens, batch.groups)
    ratio = np.where(average > 0, tokens / np.where(average > 0, average, 1.0), 1.0)
    return 1 / (1 + alpha * ratio)


def average_margin(batch: RewardBatch, alpha: Number) -> Float[ndarray, " groups"]:
    """Return, for each group, the advantage of a right response of average length: ``1 / (1 + alpha)`` minus the mean reward.

    Negative values mean that such a response is discouraged: alpha is too large for this group. The advantage is not divided by a standard
    deviation. The groups are in the order of ``batch.group_ids``.
    """
    mean_reward = groups.mean(batch["correct"] * factors(batch, alpha), batch.groups)
    per_group = np.zeros(len(batch.group_ids))
    per_group[batch.groups] = mean_reward
    return 1 / (1 + alpha) - per_group


@dataclass(frozen=True)
class GR3:
    """Correctness, divided by 1 plus ``alpha`` times the length relative to the mean length of the responses to the problem.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[100, 300, 200])
    >>> GR3(alpha=1.0)(batch).values.round(3).tolist()
    [0.667, 0.4, 0.0]

    Attributes:
        alpha: Strength, at least 0; 0 is correctness alone.
    """

    alpha: Number = PUBLISHED_ALPHA

    name: ClassVar[str] = "gr3"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens"})

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"alpha={self.alpha}: a negative strength would pay for length.")

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        c = batch["correct"].astype(float)
        return RewardValues.sum(correctness=c, length=c * (factors(batch, self.alpha) - 1))
