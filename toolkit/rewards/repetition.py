"""Repetition: the share of different n-grams of a response, as a price and as a gate.

Equations (n-grams of tokens, d = different n-grams / n-grams, 1 for a response shorter than n):

    price    r = -most (1 - d)      "Demystifying long chain-of-thought reasoning", arXiv:2502.03373, C.2
    gate     r = inner * d          regularised relevance reward R^3, arXiv:2402.03469 (there trigrams of words); inner = c here

Every reward that changes length wants one: long responses are easily made by repeating.

Deviations: tokens, not words, in the gate, unless ``unit="words"`` (whitespace-separated, as published). The price equals TRL's
``get_repetition_penalty_reward``.

Units and signs: shares 0 to 1; + is paid. Cost: a Python set of the n-grams of each response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

PUBLISHED_N = 3


def distinct_share(sequences: Sequence[Sequence] | ndarray, n: int) -> Float[ndarray, " sequences"]:
    """Share of different n-grams of each sequence; 1 for one without n-grams."""
    if n < 1:
        raise ValueError(f"n={n}: an n-gram has at least 1 token.")
    return np.array([_distinct(s, n) for s in sequences], np.float64)


def _distinct(sequence: Sequence, n: int) -> float:
    total = len(sequence) - n + 1
    return len(set(zip(*(sequence[i:] for i in range(n)), strict=False))) / total if total > 0 else 1.0


@dataclass(frozen=True)
class RepetitionPenalty:
    """Costs up to ``most`` for a response of one repeated n-gram; nothing is paid for correctness.

    Attributes:
        n: Tokens of an n-gram.
        most: Price of a wholly repetitive response, positive.
    """

    n: int = PUBLISHED_N
    most: Number = 1.0

    name: ClassVar[str] = "repetition_penalty"
    needs: ClassVar[frozenset[str]] = frozenset({"token_ids"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        return RewardValues.sum(repetition=self.most * (distinct_share(batch["token_ids"], self.n) - 1.0))


@dataclass(frozen=True)
class Repetition:
    """Correctness times the share of different n-grams.

    Attributes:
        n: Tokens of an n-gram.
    """

    n: int = PUBLISHED_N

    name: ClassVar[str] = "repetition"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "token_ids"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        c = batch["correct"].astype(float)
        return RewardValues.sum(correctness=c, repetition=c * (distinct_share(batch["token_ids"], self.n) - 1.0))


@dataclass(frozen=True)
class Distinct:
    """The share of different n-grams, to gate any reward with: ``combine.Gated(inner, (Distinct(),))``.

    Attributes:
        n: Tokens or words of an n-gram.
        unit: ``"tokens"``, or ``"words"`` as published.
    """

    n: int = PUBLISHED_N
    unit: str = "tokens"

    name: ClassVar[str] = "distinct"

    def __post_init__(self) -> None:
        if self.unit not in ("tokens", "words"):
            raise ValueError(f"unit={self.unit!r}: choose tokens or words.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"token_ids" if self.unit == "tokens" else "text"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        sequences = batch["token_ids"] if self.unit == "tokens" else [text.split() for text in batch["text"]]
        return RewardValues.sum(distinct=distinct_share(sequences, self.n))
