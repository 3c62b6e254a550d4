"""Beyond monolithic rewards (HARMO), arXiv:2510.05283: **our stand-in** for its length penalty, whose formula was not found.

What is known: r = R_correctness + R_len + R_fmt with equal weights, advantages without division by the deviation; R_len needs a
right response in the group, costs being *short* relative to the right ones (against brevity hacking), is capped by P_max and has
a tau.

Equation of the stand-in (m: mean length of the right responses of the group):

    R_len = -P_max (1 - exp(-max(0, (m - L) / m) / tau))        0 without a right response

Deviations: R_len is ours, as are P_max and tau. A reward model for open answers and an embedding similarity are left out: here
correctness is the verifier's.

Units and signs: tokens; + is paid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from toolkit.rewards import groups
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

assumed_most = 0.5  # P_max: ours
assumed_tau = 0.5  # ours


@dataclass(frozen=True)
class BeyondMonolithic:
    """Our stand-in: correctness and format, less a penalty for being shorter than right answers are.

    Attributes:
        most: P_max.
        tau: Share of the mean right length over which the penalty grows.
    """

    most: Number = assumed_most
    tau: Number = assumed_tau

    name: ClassVar[str] = "beyond_monolithic"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens", "formatted"})

    def __post_init__(self) -> None:
        if self.most < 0 or self.tau <= 0:
            raise ValueError(f"{self}: need most >= 0 and tau > 0.")

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        right = batch["correct"].astype(bool)
        m = np.maximum(np.nan_to_num(groups.mean(batch["tokens"], batch.groups, right)), 1.0)
        short = np.where(groups.count(batch.groups, right) > 0, np.maximum(0.0, 1.0 - batch["tokens"] / m), 0.0)
        return RewardValues.sum(correctness=right, format=batch["formatted"], length=self.most * np.expm1(-short / self.tau))
