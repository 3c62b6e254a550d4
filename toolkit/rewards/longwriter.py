"""LongWriter-Zero: mastering ultra-long text generation via reinforcement learning, arXiv:2506.18841, length reward.

Equation (len: length; [low, high]: target range of lengths for the prompt; L_max: the reward is 0 at this length and above):

    r = len / low                                   if len < low
        1                                           if low <= len <= high
        max(0, (L_max - len) / (L_max - high))      if len > high

The paper has two more rewards, for writing quality and for format, and averages the *advantages* of the three: see
``longwriter_zero``.

Deviations: as printed, the reward is negative beyond L_max; here its minimum is 0 (ours). L_max is probably the paper's output limit of
14000 tokens, but we could not confirm it; this value is the default, ``assumed_longest``. In the paper a model predicts the target range.
Here the range comes from columns or parameters.

Units and signs: ``unit="words"`` measures the answer in words (runs of letters, digits and underscores), as published. ``unit="tokens"``
measures the whole response in tokens. Higher is better. The reward falls for responses that are too short, so it does not favour brevity.
The columns of the range are ``low_words`` and ``high_words``, which the task ``target_length`` sets, or ``low_tokens`` and
``high_tokens``. A range may have no upper end: ``high`` is infinity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from toolkit import stats
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.rewards.columns import UNITS
from toolkit.stats import Number

assumed_longest = 14000  # L_max in tokens: probably the output limit of the paper


@dataclass(frozen=True)
class LongWriter:
    """Reward 1 for a length within the target range, and less for shorter or longer responses.

    Below the range, the reward is the length divided by ``low``. Above the range, it falls linearly from 1 at ``high`` to 0 at ``longest``.

    >>> batch = RewardBatch.from_columns(tokens=[50, 150, 300])
    >>> LongWriter(low=100, high=200, longest=400)(batch).values.tolist()
    [0.5, 1.0, 0.5]

    Attributes:
        low: Lower end of the target range, for all rows; ``None`` reads it from the column ``low_tokens`` or ``low_words``.
        high: Upper end of the target range, for all rows; ``None`` reads it from the column ``high_tokens`` or ``high_words``.
        longest: L_max, greater than ``high``: responses of this length or longer get 0. It has no effect if the range has no upper end.
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
        # Below the range: n / low. Not computed where low is 0, since no length is less than 0.
        below = np.divide(n, low, out=np.ones(len(n)), where=low > 0)
        # Where high is infinite, this is 0 and not used: no length is above the range.
        above = np.maximum(0.0, (self.longest - n) / (self.longest - high))
        return RewardValues.sum(length=np.where(n < low, below, np.where(n <= high, 1.0, above)))


def length_column(unit: str) -> str:
    """Return the name of the column that lengths are computed from: ``tokens`` if the unit is tokens, ``answer_text`` if it is words.

    Raises:
        ValueError: The unit is neither ``"tokens"`` nor ``"words"``.
    """
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r}: choose one of {', '.join(UNITS)}.")
    return "tokens" if unit == "tokens" else "answer_text"


def response_lengths(batch: RewardBatch, unit: str) -> Float[ndarray, " n"]:
    """Return the length of each response, ``[n]``, in tokens or in words.

    Args:
        batch: Rollouts.
        unit: ``"tokens"`` counts the tokens of the response; ``"words"`` counts the words of its answer, without the thinking.
    """
    return (
        batch["tokens"].astype(float) if unit == "tokens" else np.array([stats.words(t) for t in batch["answer_text"]], np.float64)
    )
