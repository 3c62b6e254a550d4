"""Adaptive deep reasoning: triggering deep thinking when needed, arXiv:2505.20101. Reward: our stand-in where the paper is unknown.

Equations (half of a group is asked for long thinking, half for short; p_s: share of right answers of the short half):

    simple problem, p_s >= theta      right and short 1.5, right and long 1.0      (the values are the paper's)
    hard problem                      right and long 1.5, right and short 1.0      (ours: the mirror image)
    wrong                             0

Deviations: only the abstract and openings of digests could be read. Values for hard problems, the threshold
(``assumed_threshold``), the format checks and the soft length penalty on long chains were not found; the last two are left out. A
problem without a short rollout in the batch is taken as hard.

Units and signs: + is paid. The rows of both modes of a problem share its id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from toolkit.rewards import groups
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

PUBLISHED_PREFERRED, PUBLISHED_OTHER = 1.5, 1.0
assumed_threshold = 0.5  # theta: ours


@dataclass(frozen=True)
class AdaptiveDeepReasoning:
    """Right answers are paid more in the mode their problem calls for.

    Attributes:
        preferred: A right answer in that mode.
        other: A right answer in the other.
        threshold: theta, share of right short answers from which a problem is simple.
    """

    preferred: Number = PUBLISHED_PREFERRED
    other: Number = PUBLISHED_OTHER
    threshold: Number = assumed_threshold

    name: ClassVar[str] = "adaptive_deep_reasoning"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "mode"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        short, long = batch["mode"] == "short", batch["mode"] == "long"
        if not (short | long).all():
            raise ValueError(f"A mode of {batch['mode'][~(short | long)][0]!r}: modes are 'long' and 'short'.")
        c = batch["correct"].astype(float)
        simple = groups.mean(c, batch.groups, short) >= self.threshold
        return RewardValues.sum(correctness=self.other * c, mode=np.where(simple == short, self.preferred - self.other, 0.0) * c)
