"""Soft overlong punishment: DAPO, an open-source LLM reinforcement learning system at scale, arXiv:2503.14476, equation 13.

Equation (c: 1 if right, else 0; L: length; L_max: length limit; p: length term, which falls from 0 to -1 over the last L_cache tokens
before the limit):

    p = 0                                  if L <= L_max - L_cache
        (L_max - L_cache - L) / L_cache    if L_max - L_cache < L <= L_max
        -1                                 if L > L_max
    r = c + p

The component ``overlong`` of the reward is p; it equals TRL's ``get_soft_overlong_punishment``. It penalises responses that are too long,
and never rewards short ones.

Deviations: in DAPO a right response earns 1 and a wrong one -1, a difference of 2. Here they earn 1 and 0, a difference of 1. Correctness
therefore has half of DAPO's weight relative to p. With ``correctness=2`` the difference is 2 and the advantages are those of DAPO.

Units and signs: lengths in tokens; higher is better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

PUBLISHED_LONGEST, PUBLISHED_CACHE = 20480, 4096


@dataclass(frozen=True)
class Overlong:
    """Correctness minus a penalty that grows from 0 to 1 over the last ``cache`` tokens before the length limit ``longest``.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[10000, 18432, 30000])
    >>> Overlong()(batch).values.tolist()
    [1.0, 0.5, -1.0]

    Attributes:
        longest: L_max, the length limit, tokens. Longer responses have the penalty 1.
        cache: L_cache, the number of tokens before the limit over which the penalty grows linearly from 0 to 1. With 0 there is no such
            slope: only a response longer than the limit is penalised.
        correctness: Reward of a right response before the penalty is subtracted; a wrong response gets 0.
    """

    longest: Number = PUBLISHED_LONGEST
    cache: Number = PUBLISHED_CACHE
    correctness: Number = 1.0

    name: ClassVar[str] = "overlong"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens"})

    def __post_init__(self) -> None:
        if not 0 <= self.cache <= self.longest or self.longest <= 0:
            raise ValueError(f"{self}: need 0 <= cache <= longest and longest > 0.")

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        L = batch["tokens"].astype(float)
        # p between L_max - L_cache and L_max; without the clip it would be positive for shorter responses.
        ramp = np.clip((self.longest - self.cache - L) / self.cache, -1.0, 0.0) if self.cache else 0.0
        return RewardValues.sum(correctness=self.correctness * batch["correct"], overlong=np.where(self.longest < L, -1.0, ramp))
