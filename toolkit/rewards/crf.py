"""CRF, the conciseness reward function of the paper "Efficient reasoning via reward model", arXiv:2511.09158.

Equations (c: 1 if right, else 0; k: conciseness score of the response, in [0.1, 1]; alpha: a constant; s: a term that falls during
training; d: a term that depends on the difficulty of the problem; t: optimizer step; T: step at which s reaches 0):

    r = c (1 + alpha k (s + d))        d = exp(share of right responses to the problem)
    s(t) = max(0, 1 - t / T)

The paper prefers this product to the sum ``c + alpha k (s + d)``, by an argument about variance that we did not find. The formulas give the
following variances (ours; p: share of right responses; k independent of c, with mean m and variance v; A = alpha (s + d)). ``spread`` computes
them:

    given the outcome:   mean of Var(r | c) = p A^2 v for the product, A^2 v for the sum      smaller by the factor p, always
    in all:              Var(r) = p (1-p) (1 + A m)^2 + p A^2 v  against  p (1-p) + A^2 v     larger, unless p (2 m + A m^2) < A v

So the product removes noise of the score from wrong responses, and pays more for the difference between right and wrong.

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


def spread(share: Number, size: Number, mean: Number, variance: Number) -> dict[str, tuple[float, float]]:
    """Return the variance of the reward of a response as ``{part: (product, sum)}``, for a score k that is independent of correctness.

    ``"outcome"`` is the variance of the mean reward given correctness, ``"score"`` the mean variance given correctness, ``"all"`` their sum.

    >>> {name: (round(a, 3), round(b, 3)) for name, (a, b) in spread(0.5, 0.2, 0.55, 0.0675).items()}
    {'outcome': (0.308, 0.25), 'score': (0.001, 0.003), 'all': (0.309, 0.253)}

    Args:
        share: p, the share of right responses.
        size: A, the factor ``alpha (s + d)`` of the score.
        mean: m, the mean of k.
        variance: v, the variance of k.
    """
    p, A, m, v = map(float, (share, size, mean, variance))
    outcome = p * (1 - p) * (1 + A * m) ** 2, p * (1 - p)
    score = p * A**2 * v, A**2 * v
    return {"outcome": outcome, "score": score, "all": (outcome[0] + score[0], outcome[1] + score[1])}
