"""Adaptive deep reasoning: triggering deep thinking when needed, arXiv:2505.20101. The reward is partly ours.

Equations (the prompt requests a mode: long thinking in half of a group and short thinking in the other half; p_s: accuracy of the short
half):

    simple problem, p_s >= theta      right and short 1.5, right and long 1.0      (the values are the paper's)
    hard problem                      right and long 1.5, right and short 1.0      (ours: the mirror image)
    wrong                             0

Deviations: we could read only the abstract and the beginning of secondary summaries. We did not find the values for hard problems,
the threshold theta (``assumed_threshold``), the format checks, and the soft length penalty on long chains; the last two are left out. A
problem without a short rollout in the batch counts as hard.

Units and signs: higher is better. Rows of one problem have one problem_id, whatever their mode.
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
    """Right answers earn more in the mode that suits their problem: short if the problem is simple, long if it is hard.

    >>> batch = RewardBatch.from_columns(correct=[1, 0, 1, 0], mode=["short", "short", "long", "long"])
    >>> AdaptiveDeepReasoning()(batch).values.tolist()
    [1.5, 0.0, 1.0, 0.0]

    Attributes:
        preferred: Reward of a right answer in the suitable mode.
        other: Reward of a right answer in the other mode.
        threshold: theta: a problem is simple if at least this share of its responses in the short mode is right.
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
            raise ValueError(f"The column 'mode' holds {batch['mode'][~(short | long)][0]!r}: use 'long' or 'short'.")
        c = batch["correct"].astype(float)
        simple = groups.mean(c, batch.groups, short) >= self.threshold
        return RewardValues.sum(correctness=self.other * c, mode=np.where(simple == short, self.preferred - self.other, 0.0) * c)
