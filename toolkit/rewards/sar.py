"""SAR: self-aligned reward, towards effective and efficient reasoners, arXiv:2509.05489.

Equations (c: 1 if right, else 0; q: question, a: response; lp(a|q), lp(a): mean log-probability of the response's tokens with and
without the question; ppl = exp(-lp)):

    R_SA = clip((ppl(a) - ppl(a|q)) / ppl(a), -1, 1) = clip(1 - exp(lp(a) - lp(a|q)), -1, 1)
    r    = c + alpha R_SA

A response that is much more likely with the question than without it is specific to the question; filler is not.

Deviations: the released code adds 1e-9 to the denominator, which changes nothing since ppl >= 1; here the ratio is a single
exponential, so that it cannot overflow. An empty response has R_SA = 0 (ours). lp(a) is computed with an empty user message and the
same system prompt.

Units and signs: mean log-probabilities in nats per token; higher is better. R_SA does not depend on correctness, so a wrong answer that
is specific to the question is rewarded. Use advantages without division by the standard deviation (Dr. GRPO); otherwise tiny
differences within an all-wrong group are amplified.
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
    """Return R_SA, the self-aligned reward, of each response: in [-1, 1], positive if the question raises the likelihood of the response.

    Args:
        logprob: Mean log-probability of each response with the question, nats per token.
        logprob_without: The same without the question.
    """
    with np.errstate(over="ignore"):
        return np.clip(-np.expm1(logprob_without - logprob), -1.0, 1.0)


@dataclass(frozen=True)
class SAR:
    """Correctness plus ``alpha`` R_SA. R_SA, in [-1, 1], is higher the more the question raises the likelihood of the response.

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
