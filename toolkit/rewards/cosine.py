"""Cosine reward: Demystifying long chain-of-thought reasoning in LLMs, arXiv:2502.03373, appendix C.1.

Equation (x = min(1, L / L_max)):

    r = v_long + (v_short - v_long) (1 + cos(pi x)) / 2

with (v_short, v_long) = (1, 0.5) for a right answer and (-1, -0.5) for a wrong one: a right answer is paid more for being short,
a wrong one is paid more for being long, which leaves room to go on looking. Equal to TRL's ``get_cosine_scaled_reward``.

Deviations: none. Beyond L_max the value of L_max stays, since a cosine would climb again.

Units and signs: tokens; + is paid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

assumed_longest = 4096  # tokens: ours, TRL asks for it


@dataclass(frozen=True)
class Cosine:
    """Cosine from the value of an empty response to that of a response of full length.

    Attributes:
        longest: L_max, tokens.
        right: Values of a right answer, ``(shortest, longest)``.
        wrong: Values of a wrong answer, ``(shortest, longest)``.
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
        rise = (1 + np.cos(np.pi * np.minimum(batch["tokens"] / self.longest, 1.0))) / 2
        return RewardValues.sum(correctness=short, length=(long - short) * (1 - rise))
