"""Three simple rewards: correctness, correctness minus a naive length penalty, and format.

Equations (c: 1 if right, else 0; L: length; L_max, alpha: constants; well formed: an answer that is not empty follows
a closed think span):

    correctness       r = c
    length penalty    r = c - alpha L / L_max        for every response, right or wrong
    format            r = 1[well formed]

Correctness alone is the baseline without any length term. The naive penalty is the baseline with one. Short wrong responses earn more than
long wrong ones, and the penalty ignores the difficulty of a problem. If all responses to a problem are wrong, their rewards differ only by
length, so training on the problem only makes responses shorter.

Deviations: these rewards are from no paper. Units and signs: L in tokens; higher is better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

assumed_alpha = 1.0  # our choice: a response of length L_max loses as much as a right answer gains
assumed_longest = 4096  # tokens; our choice


@dataclass(frozen=True)
class Correctness:
    """Reward 1 for a right response and 0 for a wrong one.

    >>> Correctness()(RewardBatch.from_columns(correct=[1, 0])).values.tolist()
    [1.0, 0.0]
    """

    name: ClassVar[str] = "correctness"
    needs: ClassVar[frozenset[str]] = frozenset({"correct"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        return RewardValues.sum(correctness=batch["correct"])


@dataclass(frozen=True)
class Format:
    """Reward 1 for a well-formed response, 0 for any other.

    A response is well formed if an answer that is not empty follows a closed think span, or if it has such an answer and the model has no
    closing think tag. Combine this reward with others in ``combine.WeightedSum`` or ``combine.Gated``.

    >>> Format()(RewardBatch.from_columns(formatted=[True, False])).values.tolist()
    [1.0, 0.0]
    """

    name: ClassVar[str] = "format"
    needs: ClassVar[frozenset[str]] = frozenset({"formatted"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        return RewardValues.sum(format=batch["formatted"])


@dataclass(frozen=True)
class LengthPenalty:
    """The naive length penalty: correctness minus ``alpha`` times the length divided by ``longest``, for right and wrong responses.

    >>> batch = RewardBatch.from_columns(correct=[1, 0], tokens=[1024, 1024])
    >>> LengthPenalty(longest=4096)(batch).values.tolist()
    [0.75, -0.25]

    Attributes:
        alpha: Penalty for a response of length ``longest``.
        longest: L_max, tokens: the length at which the penalty is ``alpha``. A longer response loses more.
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
