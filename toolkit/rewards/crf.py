"""CRF, the conciseness reward function of the paper "Efficient reasoning via reward model", arXiv:2511.09158.

Equations (c: 1 if right, else 0; k: conciseness score of the response, in [0.1, 1]; alpha: a constant; s: a term that falls during
training; d: a term that depends on the difficulty of the problem; t: optimizer step; T: step at which s reaches 0):

    r = c (1 + alpha k (s + d))        d = exp(share of right responses to the problem)
    s(t) = max(0, 1 - t / T)

Deviations: alpha and the schedule of s were not found. We use ``assumed_alpha`` and a linear decay over ``assumed_steps`` steps. The
formula of d comes from a summary by others, and we could not confirm it. By this formula d is largest for *easy* problems. The score k
comes from a linear head on hidden states (``rewards.conciseness``); the paper fine-tunes a 3B model.

Units and signs: higher is better; wrong responses get 0 whatever k is. The reward has no state: t is the step of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from toolkit.rewards import groups
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

LOWEST, HIGHEST = 0.1, 1.0  # range of the conciseness score
assumed_alpha = 0.2  # ours
assumed_steps = 1000  # optimizer steps until s is 0: ours


@dataclass(frozen=True)
class CRF:
    """Reward for right responses, 1 plus a bonus that grows with the conciseness score of the response. Wrong responses get 0.

    The bonus is ``alpha k (s + d)``. Here k is the score, from the column ``conciseness``. The term s falls from 1 to 0 during training.
    The term d is ``exp(accuracy)``, where the accuracy is the share of right responses among the responses to the same problem.

    >>> batch = RewardBatch.from_columns(correct=[1, 0], conciseness=[1.0, 1.0])
    >>> CRF(alpha=0.2)(batch).values.round(2).tolist()
    [1.53, 0.0]

    Attributes:
        alpha: Factor of the bonus.
        steps: Number of optimizer steps in which s falls linearly from 1 to 0.
    """

    alpha: Number = assumed_alpha
    steps: int = assumed_steps

    name: ClassVar[str] = "crf"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "conciseness"})

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.steps < 1:
            raise ValueError(f"{self}: need alpha >= 0 and at least one step.")

    def annealing(self, step: int) -> float:
        """Return the term s of the bonus ``alpha k (s + d)``: 1 at step 0, falling linearly to 0 at step ``steps``, then 0.

        Args:
            step: Number of optimizer steps done so far.
        """
        return max(0.0, 1.0 - step / self.steps)

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        c, score = batch["correct"].astype(float), batch["conciseness"].astype(float)
        # Negated, so that NaN is outside too.
        outside = ~((score >= LOWEST) & (score <= HIGHEST))
        if outside.any():
            raise ValueError(f"The column 'conciseness' holds {score[outside][0]}: scores are between {LOWEST} and {HIGHEST}.")
        ease = np.exp(groups.mean(c, batch.groups))  # d
        return RewardValues.sum(correctness=c, conciseness=c * self.alpha * score * (self.annealing(batch.step) + ease))
