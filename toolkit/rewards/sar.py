"""SAR: self-aligned reward, towards effective and efficient reasoners, arXiv:2509.05489.

Equations (q the question, a the response; ppl = exp(-mean log-probability of the response's tokens)):

    R_SA = clip((ppl(a) - ppl(a|q)) / ppl(a), -1, 1) = clip(1 - exp(lp(a) - lp(a|q)), -1, 1)
    r    = c + alpha R_SA

A response that is much likelier with the question than without it says something about the question; filler does not.

Deviations: the released code adds 1e-9 to the denominator, which changes nothing since ppl >= 1; here the ratio is one
exponential, so that it cannot overflow. An empty response has R_SA = 0 (ours). lp(a) is taken with an empty user message, the
system prompt kept.

Units and signs: mean log-probabilities in nats a token; + is paid. Not gated by correctness: a wrong but question-specific answer
is paid. Advantages without division by the deviation (Dr. GRPO), or tiny differences within an all-wrong group would be blown up.
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
    """R_SA from the mean log-probabilities of responses with and without the question."""
    with np.errstate(over="ignore"):
        return np.clip(-np.expm1(logprob_without - logprob), -1.0, 1.0)


@dataclass(frozen=True)
class SAR:
    """Correctness plus how much the question explains the response.

    Attributes:
        alpha: Weight of that part.
    """

    alpha: Number = PUBLISHED_ALPHA

    name: ClassVar[str] = "sar"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens", "logprob", "logprob_without"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        aligned = np.where(batch["tokens"] > 0, alignment(batch["logprob"], batch["logprob_without"]), 0.0)
        return RewardValues.sum(correctness=batch["correct"], alignment=self.alpha * aligned)
