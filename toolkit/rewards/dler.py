"""DLER: doing length penalty right, and difficulty-aware DLER, arXiv:2510.15110.

Equations (rho the share of right answers of the group, at full length):

    DLER       r = c    if the response ended by itself within L_T tokens, else kept * c
    DA-DLER    the same, L_T = l_i for d_i <= rho < d_{i+1}: 2000 tokens from rho = 0.5, 4000 below

What makes it work is around the reward: advantages over the batch, clip-higher, dynamic sampling (``toolkit.grpo``), and merging
afterwards.

Deviations: the paper pays an unfinished response 0; its released script keeps 10 % of the score (``kept=0.1``). What happens at
rho = 0.5 exactly is unspecified; here it is the shorter length, as the formula has it.

Units and signs: tokens; + is paid. Truncated responses must stay in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy import ndarray

from toolkit.rewards import groups
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

PUBLISHED_TARGET = 4000
PUBLISHED_TIERS = ((0.0, 4000), (0.5, 2000))
SCRIPT_KEPT = 0.1  # of a truncated response's score, in the released script


@dataclass(frozen=True)
class DLER:
    """Correctness of responses that end within a length.

    Attributes:
        target: L_T, tokens.
        kept: Share of its score that another response keeps: 0 in the paper, ``SCRIPT_KEPT`` in the script.
    """

    target: Number = PUBLISHED_TARGET
    kept: Number = 0.0

    name: ClassVar[str] = "dler"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens", "finish"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        return _truncated(batch, np.full(len(batch), float(self.target)), self.kept)


@dataclass(frozen=True)
class DifficultyAwareDLER:
    """DLER with a shorter length where the group is mostly right.

    Attributes:
        tiers: ``(least share of right answers, length)``, ascending; the first starts at 0.
        kept: Share of its score that a truncated response keeps.
    """

    tiers: tuple[tuple[float, int | float], ...] = PUBLISHED_TIERS
    kept: Number = 0.0

    name: ClassVar[str] = "da_dler"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens", "finish"})

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.tiers]
        if not starts or starts[0] != 0 or starts != sorted(starts):
            raise ValueError(f"tiers={self.tiers}: they must ascend from a share of 0.")

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        ratio = groups.mean(batch["correct"], batch.groups)
        starts, lengths = (np.array(part, float) for part in zip(*self.tiers, strict=True))
        return _truncated(batch, lengths[np.searchsorted(starts, ratio, side="right") - 1], self.kept)


def _truncated(batch: RewardBatch, targets: ndarray, kept: Number) -> RewardValues:
    c = batch["correct"].astype(float)
    within = (batch["tokens"] <= targets) & (batch["finish"] == "stop")
    return RewardValues.sum(correctness=c, truncation=np.where(within, 0.0, (kept - 1.0) * c))
