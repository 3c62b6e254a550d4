"""LongWriter-Zero: mastering ultra-long text generation via reinforcement learning, arXiv:2506.18841, length reward.

Equation (len: length; [low, high]: target range of lengths for the prompt; L_max: length from which the reward is 0):

    r = len / low                                   if len < low
        1                                           if low <= len <= high
        max(0, (L_max - len) / (L_max - high))      if len > high

The paper has two more rewards, for writing quality and for format, and averages the *advantages* of the three: see
``combine.MeanOfAdvantages``.

Deviations: as printed, the reward is negative beyond L_max; here its minimum is 0 (ours). L_max is probably the paper's output limit of
14000 tokens, but we could not confirm it (``assumed_longest``). In the paper a model predicts the range; here it is a column or a
parameter.

Units and signs: ``unit`` selects the length. It is the number of words (runs of letters, digits and underscores) of the answer, as
published, or the number of tokens of the response. Higher is better. The reward falls for responses that are too short, so it does
not favour brevity. The columns of the range are ``low_words`` and ``high_words``, which the task ``target_length`` writes, or
``low_tokens`` and ``high_tokens``. A range may have no upper end (infinity).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from toolkit import stats
from toolkit.rewards.batch import UNITS, RewardBatch, RewardValues
from toolkit.stats import Number

assumed_longest = 14000  # tokens


@dataclass(frozen=True)
class LongWriter:
    """Reward 1 for a length within the target range, and less for shorter or longer responses.

    >>> batch = RewardBatch.from_columns(tokens=[50, 150, 300])
    >>> LongWriter(low=100, high=200, longest=400)(batch).values.tolist()
    [0.5, 1.0, 0.5]

    Attributes:
        low: Lower end of the range, for all rows; ``None`` reads it from the column ``low_tokens`` or ``low_words``.
        high: Upper end of the range, for all rows; ``None`` reads it from the column ``high_tokens`` or ``high_words``.
        longest: L_max, the length from which the reward is 0; above ``high``.
        unit: Unit of all these lengths: ``"tokens"`` of the response, or ``"words"`` of its answer.
    """

    low: Number | None = None
    high: Number | None = None
    longest: Number = assumed_longest
    unit: str = "tokens"

    name: ClassVar[str] = "longwriter"

    @property
    def needs(self) -> frozenset[str]:
        columns = {f"low_{self.unit}": self.low, f"high_{self.unit}": self.high}
        return frozenset({name for name, fixed in columns.items() if fixed is None} | {length_column(self.unit)})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        low = batch[f"low_{self.unit}"].astype(float) if self.low is None else np.full(len(batch), float(self.low))
        high = batch[f"high_{self.unit}"].astype(float) if self.high is None else np.full(len(batch), float(self.high))
        bad = ~((low >= 0) & (low <= high) & ((high < self.longest) | np.isinf(high)))
        if bad.any():
            raise ValueError(
                f"A target range of {low[bad][0]:g} to {high[bad][0]:g}: need 0 <= low <= high < longest = {self.longest}, or no upper end."
            )
        n = response_lengths(batch, self.unit)
        below = np.divide(n, low, out=np.ones(len(n)), where=low > 0)
        above = np.maximum(0.0, (self.longest - n) / (self.longest - high))
        return RewardValues.sum(length=np.where(n < low, below, np.where(n <= high, 1.0, above)))


def length_column(unit: str) -> str:
    """Return the name of the column from which lengths are computed: ``tokens``, or ``answer_text`` if the unit is words.

    Raises:
        ValueError: The unit is neither ``"tokens"`` nor ``"words"``.
    """
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r}: choose one of {', '.join(UNITS)}.")
    return "tokens" if unit == "tokens" else "answer_text"


def response_lengths(batch: RewardBatch, unit: str) -> Float[ndarray, " n"]:
    """Return the length of each row: tokens of the response, or words of its answer, without its thinking (``unit="words"``)."""
    return (
        batch["tokens"].astype(float) if unit == "tokens" else np.array([stats.words(t) for t in batch["answer_text"]], np.float64)
    )
