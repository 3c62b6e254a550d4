"""SAR: self-aligned reward, towards effective and efficient reasoners, arXiv:2509.05489.

Equations (c: 1 if right, else 0; q: question; a: response; lp(a|q), lp(a): mean log-probability of the response's tokens with and
without the question in the prompt; ppl: perplexity, exp(-lp); R_SA: self-aligned reward; alpha: its weight):

    R_SA = clip((ppl(a) - ppl(a|q)) / ppl(a), -1, 1) = clip(1 - exp(lp(a) - lp(a|q)), -1, 1)
    r    = c + alpha R_SA

R_SA is high if the response is much more likely with the question than without it: its content is then specific to the question. Filler
text is about as likely without the question, and lowers R_SA.

Deviations: the released code adds 1e-9 to the denominator, which makes no difference since ppl >= 1. We compute R_SA by the second form of
the equation, in which no perplexity can overflow. An empty response has R_SA = 0 (ours). lp(a) is computed with an empty user message and
the same system prompt. The paper trains with GRPO and also with PPO and a critic. Only GRPO is built: PPO is not needed to test the reward,
which is the same in both and does not read the critic.

Units and signs: mean log-probabilities are in nats per token. A higher reward is better. R_SA is in [-1, 1]. It does not depend on
correctness: a wrong response can earn it too. Use advantages that are not divided by the standard deviation (as in Dr. GRPO). In a group
without a right response, the division would turn tiny differences of R_SA into large advantages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

PUBLISHED_ALPHA = 0.2


def alignment(logprob: ndarray, logprob_without: ndarray) -> Float[ndarray, " n"]:
    """Return the self-aligned reward R_SA of each response, ``clip(1 - exp(logprob_without - logprob), -1, 1)``.

    It is positive if the response is more likely with the question in the prompt than without it, and negative if it is less likely.

    Args:
        logprob: Mean log-probability of each response with the question, nats per token.
        logprob_without: Mean log-probability of each response without the question, nats per token.
    """
    with np.errstate(over="ignore"):  # exp can overflow to infinity, which the clip turns into -1
        return np.clip(-np.expm1(logprob_without - logprob), -1.0, 1.0)


@dataclass(frozen=True)
class SAR:
    """Correctness plus ``alpha`` times R_SA, the self-aligned reward.

    R_SA is in [-1, 1]. It is positive if the response is more likely with the question in the prompt than without it; ``alignment`` has the
    formula.

    >>> batch = RewardBatch.from_columns(correct=[1, 0], tokens=[10, 10], logprob=[-0.5, -0.5], logprob_without=[-1.5, -0.5])
    >>> SAR(alpha=0.2)(batch).values.round(3).tolist()
    [1.126, 0.0]

    Attributes:
        alpha: Weight of R_SA.
    """

    alpha: Number = PUBLISHED_ALPHA

    name: ClassVar[str] = "sar"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens", "logprob", "logprob_without"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        aligned = np.where(batch["tokens"] > 0, alignment(batch["logprob"], batch["logprob_without"]), 0.0)
        return RewardValues.sum(correctness=batch["correct"], alignment=self.alpha * aligned)
