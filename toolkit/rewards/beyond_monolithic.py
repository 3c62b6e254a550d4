"""Beyond monolithic rewards (HARMO), arXiv:2510.05283. **Our stand-in** for its length penalty, whose formula was not found.

The paper says: r = R_correctness + R_len + R_fmt with equal weights, and advantages are not divided by the standard deviation. R_len
penalises responses that are *short* relative to the right ones (against brevity hacking). It is 0 if no response of the group is right, its
size is at most P_max, and it has a parameter tau.

Equations of the stand-in (L: length; m: mean length of the right responses of the group; R_correctness: 1 if right, else 0; R_fmt: 1 if
well formed, else 0):

    r     = R_correctness + R_len + R_fmt
    R_len = -P_max (1 - exp(-max(0, (m - L) / m) / tau))        0 if no response of the group is right

Deviations: the formula of R_len and the values of P_max and tau are ours. The paper's reward model for open answers and its embedding
similarity are left out: correctness comes from the grader.

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
    """Correctness plus format, minus a penalty for being shorter than the group's right answers (our stand-in: see the module).

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[200, 400, 150], formatted=True)
    >>> BeyondMonolithic(most=0.5, tau=0.5)(batch).values.round(3).tolist()
    [1.757, 2.0, 0.684]

    Attributes:
        most: P_max, the largest penalty.
        tau: Scale of the penalty, as a share of m, the mean length of the right answers: a response of length ``(1 - tau) m`` loses 63 %
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
