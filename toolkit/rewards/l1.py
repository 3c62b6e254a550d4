"""L1: controlling how long a reasoning model thinks with reinforcement learning, arXiv:2503.04697.

Equations (B: the budget that the prompt stated, tokens):

    L1-Exact    r = c - alpha |L - B|
    L1-Max      r = c clip(alpha (B - L) + delta, 0, 1)

Deviations: LASER's table (arXiv:2505.15612) prints L1-Max with (L - B), which pays going *over* the budget; the sign of the L1
paper is used. Its alphas are the defaults (0.0003 exact, 0.01 max). A fixed ``budget`` can stand in for the column, to ask
offline.

Units and signs: tokens; + is paid.
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
    """Loses ``alpha`` for each token off the budget, either way, right or wrong.

    Attributes:
        budget: Tokens; ``None`` reads the column ``budget``, what each prompt stated.
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
    """A right answer is paid by how far it stays below the budget, ``delta`` at the budget, nothing far above it.

    Attributes:
        budget: Tokens; ``None`` reads the column ``budget``, what each prompt stated.
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
        left = np.clip(self.alpha * (row_budgets(batch, self.budget) - batch["tokens"]) + self.delta, 0.0, 1.0)
        return RewardValues.sum(correctness=c, length=c * (left - 1.0))


def budget_columns(budget: Number | None) -> frozenset[str]:
    """Columns of a reward that follows a budget, which may be fixed."""
    return frozenset({"correct", "tokens"} | ({"budget"} if budget is None else set()))


def row_budgets(batch: RewardBatch, budget: Number | None) -> ndarray:
    """Each row's budget, tokens. Raises ValueError for one that is not positive."""
    found = batch["budget"].astype(float) if budget is None else np.full(len(batch), float(budget))
    if not (found > 0).all():
        raise ValueError(f"A budget of {found[~(found > 0)][0]} tokens: budgets must be positive.")
    return found
