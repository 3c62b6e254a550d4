"""Beyond monolithic rewards (HARMO), arXiv:2510.05283. **We did not find the formula of its length penalty; ours replaces it.**

The paper says: r = R_correctness + R_len + R_fmt with equal weights, and advantages are not divided by the standard deviation. R_len
penalises responses that are *short* relative to the right responses of the group (the responses to the same problem), to keep the policy
from giving very short answers. R_len lies between -P_max (P_max is a constant) and 0. It is 0 if no response of the group is right. The
paper's R_len has a parameter tau, whose role we do not know.

Equations, with our R_len (L: length; m: mean length of the right responses of the group; R_correctness: 1 if right, else 0; R_fmt: 1 if
well formed, else 0; P_max: largest penalty; tau: relative shortfall (m - L) / m at which the penalty reaches 63 % of P_max):

    r     = R_correctness + R_len + R_fmt
    R_len = -P_max (1 - exp(-max(0, (m - L) / m) / tau))        0 if no response of the group is right

Deviations: the formula of R_len and the values of P_max and tau are ours. The paper also grades open-ended answers by a reward model and
by embedding similarity. Both are left out: here correctness comes from the grader of the task.

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
    """Correctness plus format, minus a penalty for responses shorter than the mean length of the group's right responses.

    The penalty is ``most (1 - exp(-max(0, 1 - L/m) / tau))``. L is the length of the response, and m the mean length of the right responses
    of its group (the responses to the same problem). If the group has no right response, the penalty is 0. The formula is ours: we did not
    find that of the paper (arXiv:2510.05283).

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[200, 400, 150], formatted=True)
    >>> BeyondMonolithic(most=0.5, tau=0.5)(batch).values.round(3).tolist()
    [1.757, 2.0, 0.684]

    Attributes:
        most: Upper limit of the penalty, P_max in the paper.
        tau: Relative shortfall 1 - L/m at which the penalty reaches 63 % (1 - 1/e) of ``most``.
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
        # m is NaN in a group without a right response. At least 1 token: the next line divides by m.
        m = np.maximum(np.nan_to_num(groups.mean(batch["tokens"], batch.groups, right)), 1.0)
        short = np.where(groups.count(batch.groups, right) > 0, np.maximum(0.0, 1.0 - batch["tokens"] / m), 0.0)
        # expm1(-x) is -(1 - exp(-x)).
        return RewardValues.sum(correctness=right, format=batch["formatted"], length=self.most * np.expm1(-short / self.tau))
