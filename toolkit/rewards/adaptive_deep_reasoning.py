"""Adaptive deep reasoning: triggering deep thinking when needed, arXiv:2505.20101. The reward is partly ours.

The prompt requests a mode: long thinking in half of the rollouts of a problem, short thinking in the other half. The column ``mode`` holds
the mode of each rollout, ``"long"`` or ``"short"``. A problem counts as simple if the model mostly answers it right in the short mode, else
as hard. The short mode suits simple problems, and the long mode hard ones. A right response earns more in the mode that suits its problem.

Equations (p_s: accuracy of the problem's rollouts in the short mode; theta: threshold):

    simple problem, p_s >= theta      right response: 1.5 in the short mode, 1.0 in the long mode      (from the paper)
    hard problem, p_s < theta         right response: 1.5 in the long mode, 1.0 in the short mode      (ours: the reverse)
    any problem                       wrong response: 0

Deviations: we had no access to the full paper, only to its abstract and to parts of summaries by others. The rewards for hard problems and
the value of theta (``assumed_threshold``) are our guesses. The paper also has format checks and a soft penalty on long responses; they are
left out, because we found no details. A problem without a rollout in the short mode counts as hard.

Units and signs: higher is better. The long and the short rollouts of a problem must have the same ``problem_id``.
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
    """Reward for right responses, higher in the mode that suits the problem: short if the problem is simple, long if it is hard.

    The mode is the kind of thinking that the prompt requested: the column ``mode`` holds ``"short"`` or ``"long"``. Wrong responses get 0.

    In this example half of the responses in the short mode are right. With the default threshold of 0.5 the problem is therefore simple.

    >>> batch = RewardBatch.from_columns(correct=[1, 0, 1, 0], mode=["short", "short", "long", "long"])
    >>> AdaptiveDeepReasoning()(batch).values.tolist()
    [1.5, 0.0, 1.0, 0.0]

    Attributes:
        preferred: Reward of a right response in the suitable mode.
        other: Reward of a right response in the other mode.
        threshold: A problem is simple if at least this share, in [0, 1], of its responses in the short mode is right. Otherwise it is
            hard. A problem without responses in the short mode is hard too.
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
        # If no row of a group is in the short mode, the mean is NaN and the comparison False: the problem counts as hard.
        simple = groups.mean(c, batch.groups, short) >= self.threshold
        # simple == short is True in the suitable mode: short for a simple problem, long (not short) for a hard one.
        return RewardValues.sum(correctness=self.other * c, mode=np.where(simple == short, self.preferred - self.other, 0.0) * c)
