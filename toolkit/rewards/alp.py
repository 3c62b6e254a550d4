"""ALP, adaptive length penalty: just enough thinking, arXiv:2506.05256.

Equations (c: 1 if right, else 0; N: length; p: share of right responses among the K responses to the problem, its group; beta: price):

    r = c - beta N max(p, 1/K)

A token costs more on problems that the policy solves more often. Wrong responses pay too.

Deviations: notes on the paper disagree whether N is a number of tokens or is divided by a largest length. ``assumed_unit`` chooses; its
default, tokens, is ours. With ``"fraction"``, N is divided by ``longest``.

Units and signs: lengths in tokens; higher is better. With the published price, a response of 8000 tokens pays 0.0008. The price then matters
only where all rewards of the group would be equal without it, and GRPO divides it by their tiny standard deviation. Without that division
(``scale_rewards="none"``, the advantage ``dr_grpo``), it has almost no effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from toolkit.rewards import groups
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

PUBLISHED_BETA = 1e-7


@dataclass(frozen=True)
class ALP:
    """Correctness, minus a price per token that rises with the share of right responses to the problem.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0, 0], tokens=[100, 200, 100, 200])
    >>> ALP(beta=0.001)(batch).values.round(3).tolist()
    [0.95, 0.9, -0.05, -0.1]

    Attributes:
        beta: Price, at least 0.
        assumed_unit: ``"tokens"``, or ``"fraction"`` of the length ``longest``.
        longest: Length by which lengths are divided if ``assumed_unit`` is ``"fraction"``, tokens.
    """

    beta: Number = PUBLISHED_BETA
    assumed_unit: str = "tokens"
    longest: Number | None = None

    name: ClassVar[str] = "alp"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens"})

    def __post_init__(self) -> None:
        if self.assumed_unit not in ("tokens", "fraction"):
            raise ValueError(f"assumed_unit={self.assumed_unit!r}: choose tokens or fraction.")
        if (self.longest is not None) != (self.assumed_unit == "fraction") or (self.longest is not None and self.longest <= 0):
            raise ValueError(
                f"longest={self.longest!r}: give a positive length with assumed_unit='fraction', and none with 'tokens'."
            )
        if self.beta < 0:
            raise ValueError(f"beta={self.beta}: a negative price would pay for length.")

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        c, g = batch["correct"].astype(float), batch.groups
        rate = np.maximum(groups.mean(c, g), 1 / np.maximum(groups.count(g), 1))
        return RewardValues.sum(correctness=c, length=-self.beta * rate * batch["tokens"] / (self.longest or 1))
