"""Correctness, the outcome that every other reward is measured against; the naive length penalty it is often given; format (ours).

Equations:

    correctness       r = c
    length penalty    r = c - alpha L / L_max        for every response, right or wrong
    format            r = 1[well formed]

The naive penalty is here to be compared with: it pays a wrong answer for being short too and does not know how hard a problem is,
so where a model gets everything wrong the only push is towards shorter wrong answers.

Deviations: none, there is no paper. Units and signs: L in tokens; + is paid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

assumed_alpha = 1.0  # a response of full length loses as much as a right answer gains: ours
assumed_longest = 4096  # tokens: ours


@dataclass(frozen=True)
class Correctness:
    """1 for a right answer, 0 for a wrong one."""

    name: ClassVar[str] = "correctness"
    needs: ClassVar[frozenset[str]] = frozenset({"correct"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        return RewardValues.sum(correctness=batch["correct"])


@dataclass(frozen=True)
class Format:
    """1 for a well-formed response, 0 for another; a part for sums and gates."""

    name: ClassVar[str] = "format"
    needs: ClassVar[frozenset[str]] = frozenset({"formatted"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        return RewardValues.sum(format=batch["formatted"])


@dataclass(frozen=True)
class LengthPenalty:
    """The naive penalty: ``c - alpha L / L_max``.

    Attributes:
        alpha: Price of a response of length ``longest``.
        longest: L_max, tokens.
    """

    alpha: Number = assumed_alpha
    longest: Number = assumed_longest

    name: ClassVar[str] = "length_penalty"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens"})

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.longest <= 0:
            raise ValueError(f"{self}: need alpha >= 0 and longest > 0.")

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        return RewardValues.sum(correctness=batch["correct"], length=-self.alpha * batch["tokens"] / self.longest)
