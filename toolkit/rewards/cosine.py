"""Cosine reward: Demystifying long chain-of-thought reasoning in LLMs, arXiv:2502.03373, appendix C.1.

Equation (L: length; L_max: a constant; x = min(1, L / L_max); v_short, v_long: rewards at length 0 and at length L_max):

    r = v_long + (v_short - v_long) (1 + cos(pi x)) / 2

with (v_short, v_long) = (1, 0.5) for a right response and (-1, -0.5) for a wrong one. A right response earns more if it is short. A wrong
one earns more if it is long, which encourages the model to keep searching. The reward equals TRL's ``get_cosine_scaled_reward``.

Deviations: the four values are TRL's defaults. A response longer than L_max gets the reward of length L_max, as in TRL; the released code
of the paper has a separate reward for such a response.

Units and signs: lengths in tokens; higher is better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

assumed_longest = 4096  # tokens: ours; TRL has no default


@dataclass(frozen=True)
class Cosine:
    """Reward that follows a cosine of the length: it falls with length for right responses, and rises with length for wrong ones.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[0, 2048, 4096])
    >>> Cosine(longest=4096)(batch).values.tolist()
    [1.0, 0.75, -0.5]

    Attributes:
        longest: L_max, tokens; longer responses get the reward of this length.
        right: Pair ``(v_short, v_long)`` for right responses: the reward at length 0, and the reward at length L_max.
        wrong: The same pair for wrong responses.
    """

    longest: Number = assumed_longest
    right: tuple[float, float] = (1.0, 0.5)
    wrong: tuple[float, float] = (-1.0, -0.5)

    name: ClassVar[str] = "cosine"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens"})

    def __post_init__(self) -> None:
        if self.longest <= 0:
            raise ValueError(f"longest={self.longest}: the longest length must be positive.")

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        right = batch["correct"].astype(bool)
        short, long = (np.where(right, *pair) for pair in zip(self.right, self.wrong, strict=True))
        # rise falls from 1 at length 0 to 0 at L_max, so r = short + (long - short) (1 - rise).
        rise = (1 + np.cos(np.pi * np.minimum(batch["tokens"] / self.longest, 1.0))) / 2
        return RewardValues.sum(correctness=short, length=(long - short) * (1 - rise))
