"""Two rewards: truncation, which is correctness up to a length limit, and ThinkPrune, whose limit shrinks in stages, arXiv:2504.01296.

Equation (c: 1 if right, else 0; L: length; L_T: length limit; rho: reward of a longer response, right or wrong, 0 by default):

    r = c    if L <= L_T
        rho  if L > L_T

ThinkPrune lowers L_T in stages: 4096, 3072, 2048 tokens. The formula with rho is from the LASER paper (arXiv:2505.15612).

Deviations: the number of steps per stage was not found; the default, ``assumed_stage_steps``, is our guess. The last stage lasts until the
end of training.

Units and signs: lengths in tokens; higher is better. Do not mask truncated responses in the loss (keep TRL's
``mask_truncated_completions=False``): the penalty would then have no effect on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

PUBLISHED_STAGES = (4096, 3072, 2048)
assumed_stage_steps = 100  # optimizer steps per stage: ours


@dataclass(frozen=True)
class Truncation:
    """Correctness for responses up to a length limit, and the constant reward ``beyond`` for longer ones.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[4096, 5000, 100])
    >>> Truncation(target=4096)(batch).values.tolist()
    [1.0, 0.0, 0.0]

    Attributes:
        target: L_T, the length limit, tokens; a response of exactly this length is within the limit.
        beyond: rho, the reward of a longer response, right or wrong.
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
    """Correctness up to a length limit, and the constant reward ``beyond`` for longer responses. The limit shrinks in stages in training.

    >>> batch = RewardBatch.from_columns(correct=[1, 1], tokens=[3000, 4000], step=100)
    >>> ThinkPrune(stages=(4096, 3072, 2048), every=100)(batch).values.tolist()
    [1.0, 0.0]

    Attributes:
        stages: Length limit of each stage, tokens, in order; the last stage lasts until the end of training.
        every: Optimizer steps per stage.
        beyond: rho, the reward of a response longer than the limit, right or wrong.
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
        """Return the length limit at a point of the training, in tokens.

        Args:
            step: Number of optimizer steps done so far. A new stage of ``stages`` begins every ``every`` steps.
        """
        return self.stages[min(step // self.every, len(self.stages) - 1)]

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        return Truncation(self.target(batch.step), self.beyond)(batch)
