"""Truncation, and ThinkPrune: pruning long chain-of-thought by training under a shrinking limit, arXiv:2504.01296.

Equation (c correct, L length, L_T the limit):

    r = c    if L <= L_T
        rho  otherwise

ThinkPrune lowers the limit in stages, 4096, 3072, 2048 tokens. The formula as in LASER's table of rewards (arXiv:2505.15612).

Deviations: how many steps a stage lasts was not found (``assumed_stage_steps``); the last stage goes on for ever.

Units and signs: tokens; + is paid. A truncated response has to stay in the loss, or the penalised samples are the ones left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

PUBLISHED_STAGES = (4096, 3072, 2048)
assumed_stage_steps = 100  # optimizer steps a stage lasts: ours


@dataclass(frozen=True)
class Truncation:
    """Correctness within a limit, ``beyond`` (rho) outside it.

    Attributes:
        target: L_T, tokens; a response of exactly this length is within it.
        beyond: What a longer response is paid, right or wrong.
    """

    target: Number = PUBLISHED_STAGES[0]
    beyond: Number = 0.0

    name: ClassVar[str] = "truncation"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens"})

    def __post_init__(self) -> None:
        if self.target <= 0:
            raise ValueError(f"target={self.target}: the limit must be positive.")

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        c = batch["correct"].astype(float)
        return RewardValues.sum(correctness=c, truncation=np.where(batch["tokens"] > self.target, self.beyond - c, 0.0))


@dataclass(frozen=True)
class ThinkPrune:
    """Truncation whose limit falls in stages.

    Attributes:
        stages: Limits, tokens, in the order they hold.
        every: Optimizer steps a stage lasts.
        beyond: What a longer response is paid.
    """

    stages: tuple[Number, ...] = PUBLISHED_STAGES
    every: int = assumed_stage_steps
    beyond: Number = 0.0

    name: ClassVar[str] = "think_prune"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens"})

    def __post_init__(self) -> None:
        if not self.stages or self.every < 1:
            raise ValueError(f"{self}: need at least one stage of at least one step.")

    def target(self, step: int) -> Number:
        """The limit at a step, tokens."""
        return self.stages[min(step // self.every, len(self.stages) - 1)]

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        return Truncation(self.target(batch.step), self.beyond)(batch)
