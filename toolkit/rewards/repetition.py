"""Rewards against repetition, from the share of distinct n-grams in a response: a penalty, a product with correctness, and a factor.

Equations (d: number of different n-grams of a response divided by the number of all its n-grams, 1 for a response shorter than n; c: 1 if
right, else 0; most: largest possible penalty):

    RepetitionPenalty  r = -most (1 - d)      TRL's form of "Demystifying long chain-of-thought reasoning", arXiv:2502.03373, C.2
    Repetition         r = c d                after R^3 (see below), arXiv:2402.03469
    Distinct           r = d                  the factor alone, for other rewards

Combine one of these with any reward that favours long responses: repetition is an easy way to make a response long.

R^3, the regularised relevance reward, multiplies another reward by d. ``Repetition`` multiplies correctness by d.

Deviations: R^3 has 3-grams of words; here they are 3-grams of tokens. Only ``Distinct(unit="words")`` splits at white space, as published.
The penalty equals TRL's ``get_repetition_penalty_reward``, one number per response, with TRL's defaults; the paper charges the repeated
tokens.

Units and signs: d is a share from 0 to 1; higher is better. Memory: one Python set of n-grams per response.
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

PUBLISHED_N = 3  # of R^3


def distinct_share(sequences: Sequence[Sequence] | ndarray, n: int) -> Float[ndarray, " sequences"]:
    """Return the share of distinct n-grams among all n-grams of each sequence, in (0, 1]; 1 if a sequence is shorter than n.

    >>> distinct_share(["abcabcabc", "abcdefghi"], n=3).round(3).tolist()
    [0.429, 1.0]

    Args:
        sequences: Sequences of token ids, words or characters.
        n: Number of elements per n-gram.
    """
    if n < 1:
        raise ValueError(f"n={n}: need n >= 1.")
    return np.array([_distinct(s, n) for s in sequences], np.float64)


def _distinct(sequence: Sequence, n: int) -> float:
    total = len(sequence) - n + 1  # number of n-grams
    # zip over n copies, shifted by 0, 1, ..., n - 1 elements, yields the n-grams.
    return len(set(zip(*(sequence[i:] for i in range(n)), strict=False))) / total if total > 0 else 1.0


@dataclass(frozen=True)
class RepetitionPenalty:
    """Penalty for repeated n-grams, ``-most (1 - d)``, where d is the share of distinct n-grams. Correctness has no effect.

    >>> batch = RewardBatch.from_columns(token_ids=[(1, 2, 3, 1, 2, 3), (1, 2, 3, 4, 5, 6)])
    >>> RepetitionPenalty(n=3)(batch).values.tolist()
    [-0.25, 0.0]

    Attributes:
        n: Tokens per n-gram.
        most: Largest possible penalty, as a positive number.
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
    """Correctness times the share of distinct n-grams (of tokens).

    >>> batch = RewardBatch.from_columns(correct=[1, 0], token_ids=[(1, 2, 3, 1, 2, 3), (1, 2, 3, 4, 5, 6)])
    >>> Repetition(n=3)(batch).values.tolist()
    [0.75, 0.0]

    Attributes:
        n: Tokens per n-gram.
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
    """Share of distinct n-grams. Use it to multiply another reward: ``combine.Gated(other, (Distinct(),))``.

    >>> batch = RewardBatch.from_columns(text=["a b a b a b", "a b c d"])
    >>> Distinct(n=2, unit="words")(batch).values.tolist()
    [0.4, 1.0]

    Attributes:
        n: Number of tokens or words per n-gram.
        unit: ``"tokens"``, or ``"words"``, as published: the parts of the response's text between white space, thinking included.
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
