"""Beyond monolithic rewards (HARMO), arXiv:2510.05283. **We did not find the formula of its length penalty; ours replaces it.**

The paper says: r = R_hybrid + R_len + R_fmt with equal weights, and advantages are not divided by the standard deviation. R_hybrid joins two
sources: a rule that says with a confidence whether an answer is right, and a trained reward model. R_fmt is one of several aspects (whether
the response does as instructed). R_len
penalises responses that are *short* relative to the right responses of the group (the responses to the same problem), to keep the policy
from giving very short answers. R_len lies between -P_max (P_max is a constant) and 0. It is 0 if no response of the group is right. The
paper's R_len has a parameter tau, whose role we do not know.

Equations, with our R_len and R_hybrid (L: length; m: mean length of the right responses of the group; c: 1 if right by the rule, else 0;
q: confidence of the rule, from 0 to 1; u: score of the reward model; u_0, s: mean and standard deviation of u over the batch; sigma: the
logistic function; a_k, w_k: aspects and their weights; P_max: largest penalty; tau: relative shortfall (m - L) / m at which the penalty
reaches 63 % of P_max):

    r     = R_hybrid + R_len + sum_k w_k a_k          by default one aspect, R_fmt: 1 if well formed, else 0
    R_hybrid = q c + (1 - q) sigma((u - u_0) / s)     with q = 1 everywhere: correctness
    R_len = -P_max (1 - exp(-max(0, (m - L) / m) / tau))        0 if no response of the group is right

Deviations: the formulas of R_len and R_hybrid and the values of P_max and tau are ours. In the paper, a rule decides where an answer can be
verified, and a reward model of 7 billion parameters or the similarity of embeddings elsewhere; that is q of 1 or 0. The reward model here is
any function that fills the column ``model_score``, such as a head of ``toolkit.judging``. Embeddings are left out. For R_len, a response
counts as right if R_hybrid is above one half.

Units and signs: lengths in tokens; higher is better.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.special import expit

from toolkit.rewards import groups
from toolkit.rewards.batch import Reward, RewardBatch, RewardValues
from toolkit.rewards.combine import Combined, check_names
from toolkit.rewards.correctness import Correctness, Format
from toolkit.stats import Number

assumed_most = 0.5  # P_max: ours
assumed_tau = 0.5  # ours


def hybrid(
    correct: ndarray, confidence: Float[ndarray, " n"], scores: Float[ndarray, " n"]
) -> tuple[Float[ndarray, " n"], Float[ndarray, " n"]]:
    """Return the parts of R_hybrid of each response that come from the rule and from the reward model; R_hybrid is their sum.

    >>> rule, model = hybrid(np.array([1, 1]), np.array([1.0, 0.0]), np.array([0.0, 2.0]))
    >>> rule.tolist(), model.round(2).tolist()
    ([1.0, 0.0], [0.0, 0.73])

    Args:
        correct: 1 if the rule finds the answer right, else 0.
        confidence: q, from 0 to 1.
        scores: u. They are standardised over the responses given; if all are equal, each counts 1/2.

    Raises:
        ValueError: a confidence is outside [0, 1], or a score is not finite.
    """
    q, u = np.asarray(confidence, float), np.asarray(scores, float)
    # Negated, so that NaN is outside too.
    if (outside := ~((q >= 0) & (q <= 1))).any():
        raise ValueError(f"A confidence of {q[outside][0]}: the column 'rule_confidence' is between 0 and 1.")
    if not np.isfinite(u).all():
        raise ValueError(f"A score of {u[~np.isfinite(u)][0]}: the column 'model_score' must be finite.")
    z = (u - u.mean()) / u.std() if len(u) and np.ptp(u) else np.zeros_like(u)  # equal scores: their std may not be exactly 0
    return q * np.asarray(correct, float), (1.0 - q) * expit(z)


@dataclass(frozen=True)
class Hybrid:
    """Correctness by rule where the rule is sure, the score of a reward model where it is not: R_hybrid of each response.

    It reads the columns ``correct``, ``rule_confidence`` and ``model_score``.
    """

    name: ClassVar[str] = "hybrid"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "rule_confidence", "model_score"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        rule, model = hybrid(batch["correct"], batch["rule_confidence"], batch["model_score"])
        return RewardValues.sum(rule=rule, model=model)


@dataclass(frozen=True)
class BeyondMonolithic(Combined):
    """Correctness plus aspects, minus a penalty for responses shorter than the mean length of the group's right responses.

    The penalty is ``most (1 - exp(-max(0, 1 - L/m) / tau))``. L is the length of the response, and m the mean length of the right responses
    of its group (the responses to the same problem). If the group has no right response, the penalty is 0. The formula is ours: we did not
    find that of the paper (arXiv:2510.05283).

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[200, 400, 150], formatted=True)
    >>> BeyondMonolithic(most=0.5, tau=0.5)(batch).values.round(3).tolist()
    [1.757, 2.0, 0.684]

    Attributes:
        most: Upper limit of the penalty, P_max in the paper.
        tau: Relative shortfall 1 - L/m at which the penalty reaches 63 % (1 - 1/e) of ``most``.
        assumed_correctness: Reward with values from 0 to 1 for being right: ``Correctness()``, or ``Hybrid()`` for a rule and a model. A
            response counts as right in m if this reward is above one half.
        aspects: Pairs ``(weight, reward)`` that are added, with names that differ.
    """

    most: Number = assumed_most
    tau: Number = assumed_tau
    assumed_correctness: Reward = field(default_factory=Correctness)
    aspects: tuple[tuple[Number, Reward], ...] = ((1.0, Format()),)

    name: ClassVar[str] = "beyond_monolithic"

    def __post_init__(self) -> None:
        if self.most < 0 or self.tau <= 0:
            raise ValueError(f"{self}: need most >= 0 and tau > 0.")
        check_names(self.rewards)

    @property
    def rewards(self) -> tuple[Reward, ...]:
        return (self.assumed_correctness, *(reward for _, reward in self.aspects))

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"tokens"}

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        correctness = self.assumed_correctness(batch).values
        right = correctness > 0.5
        # m is NaN in a group without a right response. At least 1 token: the next line divides by m.
        m = np.maximum(np.nan_to_num(groups.mean(batch["tokens"], batch.groups, right)), 1.0)
        short = np.where(groups.count(batch.groups, right) > 0, np.maximum(0.0, 1.0 - batch["tokens"] / m), 0.0)
        aspects = {reward.name: weight * reward(batch).values for weight, reward in self.aspects}
        # expm1(-x) is -(1 - exp(-x)).
        return RewardValues.sum(correctness=correctness, **aspects, length=self.most * np.expm1(-short / self.tau))
