"""Training language models to reason efficiently (Arora, Zanette), arXiv:2502.04463.

Equation (c: 1 if right, else 0; L: length; mu, s: mean and standard deviation of the lengths of the *right* responses of the group; sigma:
the logistic function):

    r = c (1 - alpha sigma((L - mu) / s))

Deviations: if only one response is right, or all right ones have the same length, (L - mu) / s is taken as 0 and the reward is 1 - alpha/2.
The LASER paper (arXiv:2505.15612) compares with this reward; its code uses mu = 0 and s = 1 there, which gives 1 - alpha. We do not copy
that. The default alpha is that of this comparison, since the original paper tries several values. The paper does not say whether s divides
by n or n - 1: see ``ddof``.

Units and signs: lengths in tokens; higher is better. Wrong answers get 0 at any length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.special import expit

from toolkit.rewards import groups
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

PUBLISHED_ALPHA = 0.4  # from the comparison in the LASER paper, arXiv:2505.15612


def discount(batch: RewardBatch, alpha: Number, ddof: int) -> Float[ndarray, " n"]:
    """Return the length penalty of each row, at least 0: ``alpha sigma((L - mu) / s)`` (see the module) for right responses, 0 for wrong
    ones.

    Args:
        batch: Rollouts.
        alpha: Largest possible penalty.
        ddof: The standard deviation s of lengths divides by n - ddof: 0 or 1.
    """
    right = batch["correct"].astype(bool)
    return np.where(right, alpha * expit(groups.z_scores(batch["tokens"], batch.groups, right, ddof=ddof)), 0.0)


@dataclass(frozen=True)
class AroraZanette:
    """Right answers earn less the longer they are, relative to the right answers of their group.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 1, 0], tokens=[100, 200, 300, 50])
    >>> AroraZanette(alpha=0.4)(batch).values.round(3).tolist()
    [0.909, 0.8, 0.691, 0.0]

    Attributes:
        alpha: Largest possible length penalty, in [0, 1]: with more, a right answer could earn less than a wrong one.
        ddof: The standard deviation of lengths divides by n - ddof: 0 or 1.
    """

    alpha: Number = PUBLISHED_ALPHA
    ddof: int = 0

    name: ClassVar[str] = "arora_zanette"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens"})

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        return RewardValues.sum(correctness=batch["correct"], length=-discount(batch, self.alpha, self.ddof))


def check_alpha(alpha: Number) -> None:
    """Raise ValueError if alpha is outside [0, 1], since a right answer could then earn less than a wrong one."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: need 0 <= alpha <= 1, or a right answer may earn less than a wrong one.")
