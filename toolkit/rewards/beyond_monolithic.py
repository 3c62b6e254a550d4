"""Beyond monolithic rewards (HARMO), arXiv:2510.05283. **Our stand-in** for its length penalty, whose formula was not found.

From the paper we know: r = R_correctness + R_len + R_fmt with equal weights; advantages are not divided by the standard deviation. R_len
needs a right response in the group, penalises responses that are *short* relative to the right ones (against brevity hacking), is capped at
P_max, and has a parameter tau.

Equation of the stand-in (L: length; m: mean length of the right responses of the group):

    R_len = -P_max (1 - exp(-max(0, (m - L) / m) / tau))        0 if no response of the group is right

Deviations: R_len, P_max and tau are ours. The paper's reward model for open answers and its embedding similarity are left out:
correctness comes from the verifier.

Units and signs: lengths in tokens; higher is better.
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
    """Our stand-in: correctness plus format, minus a penalty for being shorter than the right answers.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[200, 400, 150], formatted=True)
    >>> BeyondMonolithic(most=0.5, tau=0.5)(batch).values.round(3).tolist()
    [1.757, 2.0, 0.684]

    Attributes:
        most: P_max, the largest penalty.
        tau: Scale of the penalty, as a share of the mean length of the right answers: a response that is shorter by this share loses 63 %
            of ``most``.
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
