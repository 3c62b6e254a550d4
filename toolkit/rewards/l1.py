"""L1: controlling how long a reasoning model thinks with reinforcement learning, arXiv:2503.04697.

Equations (c: 1 if right, else 0; L: length; B: the budget stated in the prompt; alpha: change of the reward per token; delta: L1-Max
reward of a right response of length B):

    L1-Exact    r = c - alpha |L - B|
    L1-Max      r = c clip(alpha (B - L) + delta, 0, 1)

Deviations: the LASER paper (arXiv:2505.15612) prints L1-Max with (L - B), which would reward going *over* the budget; we use the sign of
the L1 paper. The default alphas are those printed in the LASER paper (0.0003 for L1-Exact, 0.01 for L1-Max). The budget of a row comes
from the column ``budget``; a fixed ``budget`` can replace the column, for example if rollouts are scored without training.

Units and signs: lengths in tokens; higher is better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy import ndarray

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

PUBLISHED_EXACT_ALPHA, PUBLISHED_MAX_ALPHA, PUBLISHED_DELTA = 0.0003, 0.01, 0.5


@dataclass(frozen=True)
class L1Exact:
    """Correctness minus ``alpha`` per token above or below the budget, for right and wrong responses.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[1000, 500, 1500], budget=1000)
    >>> L1Exact(alpha=0.0003)(batch).values.tolist()
    [1.0, 0.85, -0.15]

    Attributes:
        alpha: Penalty per token of difference from the budget.
        budget: One budget for all rows, tokens; ``None`` reads the column ``budget``, the budget stated in each prompt.
    """

    alpha: Number = PUBLISHED_EXACT_ALPHA
    budget: Number | None = None

    name: ClassVar[str] = "l1_exact"

    @property
    def needs(self) -> frozenset[str]:
        return budget_columns(self.budget)

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        return RewardValues.sum(
            correctness=batch["correct"], length=-self.alpha * np.abs(batch["tokens"] - row_budgets(batch, self.budget))
        )


@dataclass(frozen=True)
class L1Max:
    """Reward for right responses that falls linearly with length: ``delta`` at the budget, up to 1 below it, down to 0 above it.

    A right response gets ``alpha (budget - length) + delta``, limited to the range from 0 to 1. Wrong responses get 0.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 1, 0], tokens=[100, 980, 1000, 100], budget=1000)
    >>> L1Max(alpha=0.01, delta=0.5)(batch).values.round(2).tolist()
    [1.0, 0.7, 0.5, 0.0]

    Attributes:
        alpha: Decrease of the reward per additional token, where the reward is between 0 and 1.
        delta: Reward of a right response at the budget.
        budget: One budget for all rows, tokens; ``None`` reads the column ``budget``, the budget stated in each prompt.
    """

    alpha: Number = PUBLISHED_MAX_ALPHA
    delta: Number = PUBLISHED_DELTA
    budget: Number | None = None

    name: ClassVar[str] = "l1_max"

    @property
    def needs(self) -> frozenset[str]:
        return budget_columns(self.budget)

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        c = batch["correct"].astype(float)
        share = np.clip(self.alpha * (row_budgets(batch, self.budget) - batch["tokens"]) + self.delta, 0.0, 1.0)
        return RewardValues.sum(correctness=c, length=c * (share - 1.0))


def budget_columns(budget: Number | None) -> frozenset[str]:
    """Return the names of the columns that a reward with a budget needs: ``correct``, ``tokens``, and possibly ``budget``.

    Args:
        budget: One budget for all rows, tokens. If it is ``None``, the reward needs the column ``budget``.
    """
    return frozenset({"correct", "tokens"} | ({"budget"} if budget is None else set()))


def row_budgets(batch: RewardBatch, budget: Number | None) -> ndarray:
    """Return the budget of each row, in tokens.

    Args:
        batch: Rollouts.
        budget: One budget for all rows, tokens; ``None`` reads the column ``budget``.

    Raises:
        ValueError: A budget is not positive.
    """
    tokens = batch["budget"].astype(float) if budget is None else np.full(len(batch), float(budget))
    if not (tokens > 0).all():
        raise ValueError(f"A budget of {tokens[~(tokens > 0)][0]} tokens: budgets must be positive.")
    return tokens
