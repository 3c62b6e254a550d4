"""Training language models to reason efficiently (Arora, Zanette), arXiv:2502.04463.

Equation (mu, s: mean and standard deviation of the lengths of the *right* responses of the group; sigma the logistic function):

    r = c (1 - alpha sigma((L - mu) / s))

Deviations: with one right response, or all of one length, z is 0, so it is paid 1 - alpha/2. Released code of a comparison
(LASER's) takes mean 0 and deviation 1 there, which pays 1 - alpha; not copied. Whether s divides by n or n - 1 is not stated:
``ddof``. The default alpha is that of LASER's comparison; the paper sweeps it.

Units and signs: tokens; + is paid. Wrong answers are paid 0 whatever their length.
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

PUBLISHED_ALPHA = 0.4  # LASER's (arXiv 2505.15612) comparison


def discount(batch: RewardBatch, alpha: Number, ddof: int) -> Float[ndarray, " n"]:
    """``alpha sigma(z)`` of right responses, 0 of wrong ones."""
    right = batch["correct"].astype(bool)
    return np.where(right, alpha * expit(groups.z_scores(batch["tokens"], batch.groups, right, ddof=ddof)), 0.0)


@dataclass(frozen=True)
class AroraZanette:
    """Right answers are paid less the longer they are for their group.

    Attributes:
        alpha: Most that length can cost, in (0, 1) so that right beats wrong.
        ddof: 0 divides squares by n, 1 by n - 1.
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
    """Raise ValueError outside [0, 1]: a right answer could then be paid less than a wrong one."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: need 0 <= alpha <= 1, or a right answer may be paid less than a wrong one.")
