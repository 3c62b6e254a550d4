"""Training language models to reason efficiently (Arora, Zanette), arXiv:2502.04463.

Equation (c: 1 if right, else 0; L: length; group: all responses to the same problem; mu, s: mean and standard deviation of the lengths of
the *right* responses of the group; alpha: largest possible length penalty; sigma: the logistic function):

    r = c (1 - alpha sigma((L - mu) / s))

Deviations:
  - s is 0 if only one response of the group is right, or if all right ones have the same length. Here (L - mu) / s then counts as 0, and a
    right response earns 1 - alpha/2. The code of the LASER paper (arXiv:2505.15612), which also has this reward, sets mu = 0 and s = 1 if s
    is 0. There sigma(L) is almost 1, and a right response earns about 1 - alpha.
  - The original paper tries several values of alpha. The default is the one in the LASER paper.
  - The original paper does not say whether the standard deviation divides by n or by n - 1: see ``ddof``.

Units and signs: lengths in tokens; higher is better. Wrong responses get 0 at any length.
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
    """Return the length penalty of each row, a number in [0, alpha] that the reward subtracts: 0 for wrong responses.

    The penalty of a right response is ``alpha sigma((L - mu) / s)``, which rises with its length L. Here mu and s are the mean and the
    standard deviation of the lengths of the right responses of its group (the responses to the same problem), and sigma is the logistic
    function. If s is 0, the penalty is alpha/2.

    Args:
        batch: Rollouts.
        alpha: Largest possible penalty.
        ddof: 0 or 1: the standard deviation s divides by n - ddof, where n is the number of right responses of the group.
    """
    right = batch["correct"].astype(bool)
    return np.where(right, alpha * expit(groups.z_scores(batch["tokens"], batch.groups, right, ddof=ddof)), 0.0)


@dataclass(frozen=True)
class AroraZanette:
    """Reward for right responses that falls with their length, relative to the lengths of all right responses of the group.

    The group consists of the responses to the same problem. A right response gets 1 minus a penalty between 0 and ``alpha``; ``discount``
    has the formula. Wrong responses get 0.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 1, 0], tokens=[100, 200, 300, 50])
    >>> AroraZanette(alpha=0.4)(batch).values.round(3).tolist()
    [0.909, 0.8, 0.691, 0.0]

    Attributes:
        alpha: Largest possible length penalty, in [0, 1]: if alpha were above 1, a right response could earn less than a wrong one.
        ddof: 0 or 1: the standard deviation of lengths divides by n - ddof, where n is the number of right responses of the group.
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
    """Raise ValueError if alpha, the largest possible length penalty, is outside [0, 1].

    If alpha were above 1, a right response could earn less than a wrong one.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: need 0 <= alpha <= 1, or a right answer may earn less than a wrong one.")
