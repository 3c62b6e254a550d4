"""DLER: doing length penalty right, and difficulty-aware DLER, arXiv:2510.15110.

Equations (c: 1 if right, else 0; L_T: length limit; kept: reward of a right response that is longer than L_T or was cut off, 0 in the
paper; rho: share of right responses, of any length, among the responses to the problem, its group):

    DLER       r = c    if the response ended by itself within L_T tokens, else kept * c
    DA-DLER    the same, with a limit that depends on rho: L_T = 4000 if rho < 0.5, L_T = 2000 if rho >= 0.5

The rest of the method is outside the reward. Advantages normalised over the batch, a higher upper clipping bound (clip-higher) and dynamic
sampling are settings of ``toolkit.grpo``. The paper also merges the trained weights into the base model after
training: see ``toolkit.merging``.

Deviations: in the paper a response beyond the limit gets 0; the released script keeps 10 % of its reward (``kept=0.1``). The paper does
not say which limit holds at exactly rho = 0.5; here it is 2000.

Units and signs: lengths in tokens; higher is better. Do not mask truncated responses in the loss: the penalty would then have no effect
on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy import ndarray

from toolkit.rewards import groups
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

PUBLISHED_TARGET = 4000  # tokens
PUBLISHED_TIERS = ((0.0, 4000), (0.5, 2000))  # (lowest accuracy of the group, length limit in tokens)
SCRIPT_KEPT = 0.1  # reward of a right response that is truncated: released script


@dataclass(frozen=True)
class DLER:
    """Reward 1 for a right response that ends by itself within a length limit, ``kept`` for any other right response, 0 for wrong ones.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[3000, 5000, 3000], finish="stop")
    >>> DLER(target=4000)(batch).values.tolist()
    [1.0, 0.0, 0.0]

    Attributes:
        target: L_T, the length limit, tokens; a response of exactly this length is within the limit.
        kept: Reward of a right response that is longer than the limit or was cut off: 0 in the paper, 0.1 (``SCRIPT_KEPT``) in the
            released script.
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
    """DLER with a lower length limit for problems that the policy mostly answers right.

    A right response gets 1 if it ends by itself within the limit of its problem, else ``kept``. A wrong response gets 0.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[1500, 3000, 1500], finish="stop")
    >>> DifficultyAwareDLER()(batch).values.tolist()
    [1.0, 0.0, 0.0]

    Attributes:
        tiers: Pairs ``(least accuracy, length limit in tokens)``, in ascending order of accuracy; the first accuracy is 0. The accuracy of
            a problem is the share of right responses to it in the batch. Its limit is that of the last pair whose least accuracy it
            reaches. Default: 4000 tokens, or 2000 for an accuracy of at least 0.5.
        kept: Reward of a right response that is longer than the limit or was cut off.
    """

    tiers: tuple[tuple[float, int | float], ...] = PUBLISHED_TIERS
    kept: Number = 0.0

    name: ClassVar[str] = "da_dler"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens", "finish"})

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.tiers]
        if not starts or starts[0] != 0 or starts != sorted(starts):
            raise ValueError(f"tiers={self.tiers}: give (least accuracy, length) pairs that ascend from an accuracy of 0.")

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        accuracy = groups.mean(batch["correct"], batch.groups)
        # side="right": an accuracy equal to the start of a tier belongs to that tier.
        starts, lengths = (np.array(part, float) for part in zip(*self.tiers, strict=True))
        return _truncated(batch, lengths[np.searchsorted(starts, accuracy, side="right") - 1], self.kept)


def _truncated(batch: RewardBatch, targets: ndarray, kept: Number) -> RewardValues:
    c = batch["correct"].astype(float)
    # finish is "stop" if the response ended by itself, with an end-of-sequence token.
    within = (batch["tokens"] <= targets) & (batch["finish"] == "stop")
    return RewardValues.sum(correctness=c, truncation=np.where(within, 0.0, (kept - 1.0) * c))
