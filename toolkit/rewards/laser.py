"""LASER, LASER-D, LASER-DE: learn to reason efficiently with adaptive length-based reward shaping, arXiv:2505.15612.

Equations (R: 1 right, -0.5 wrong, -1 malformed):

    LASER      r = R + alpha 1[c] 1[L <= L_T]
    LASER-D    r = R + alpha 1[c] 1[L <= L_A]                              L_A by difficulty, adapted (``laser_targets``)
    LASER-DE   r = R + alpha (1[c] 1[L <= L_A] + 1[wrong] 1[L > L_A])      and a wrong answer is paid for going on

Deviations: those of ``laser_targets``. As in the released code, LASER-DE pays only well-formed wrong answers (R = -0.5) free of loops. That detector counts
4-grams in a way we could not read; here a response loops if fewer than ``distinct`` of its 4-grams differ (``assumed_distinct``).

Units and signs: tokens; + is paid. Right is never paid less than wrong while alpha <= 1.5.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.rewards.laser_targets import TargetSettings, TargetState, difficulty
from toolkit.rewards.repetition import distinct_share
from toolkit.stats import Number

PUBLISHED_ALPHA = 0.5
PUBLISHED_TARGET = 4096  # tokens; also 8192
LOOP_NGRAM = 4
assumed_distinct = 0.2  # least share of different 4-grams of a response that does not loop: ours


@dataclass(frozen=True)
class Outcome:
    """R: what right, wrong and malformed responses are paid."""

    right: float = 1.0
    wrong: float = -0.5
    malformed: float = -1.0

    def __call__(self, batch: RewardBatch) -> Float[ndarray, " n"]:
        right, formed = batch["correct"].astype(bool), batch["formatted"].astype(bool)
        return np.where(formed, np.where(right, self.right, self.wrong), self.malformed)


PUBLISHED_OUTCOME = Outcome()


@dataclass(frozen=True)
class Laser:
    """A bonus for right answers within a length.

    Attributes:
        target: L_T, tokens.
        alpha: The bonus.
    """

    target: Number = PUBLISHED_TARGET
    alpha: Number = PUBLISHED_ALPHA
    outcome: Outcome = PUBLISHED_OUTCOME

    name: ClassVar[str] = "laser"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens", "formatted"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        paid = self.alpha * (_right(batch) & (batch["tokens"] <= self.target))
        return RewardValues.sum(outcome=self.outcome(batch), length=paid)


@dataclass(eq=False)
class LaserD:
    """A bonus for right answers within the length of their difficulty; the lengths follow the policy as it is trained.

    Stateful: see :class:`~toolkit.rewards.laser_targets.TargetState`. The trainer of ``toolkit.grpo`` asks :meth:`monitoring` before
    each generation and shows the responses to :meth:`monitor`.

    Attributes:
        alpha: The bonus.
        targets: How lengths are set.
        state: The lengths now, and what was seen since they were set.
    """

    alpha: Number = PUBLISHED_ALPHA
    targets: TargetSettings = field(default_factory=TargetSettings)
    outcome: Outcome = PUBLISHED_OUTCOME
    state: TargetState = field(init=False)

    name: ClassVar[str] = "laser_d"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens", "formatted"})

    def __post_init__(self) -> None:
        self.state = TargetState(self.targets)

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        within = batch["tokens"] <= self.limit(batch)
        scored = RewardValues.sum(outcome=self.outcome(batch), length=self.alpha * (_right(batch) & within))
        self.state.observe(batch)
        return scored

    def limit(self, batch: RewardBatch) -> Float[ndarray, " n"]:
        """L_A of each row, tokens: that of its group's difficulty among the rollouts of the batch."""
        lengths = self.state.lengths_for(int(batch["tokens"].max(initial=0)))
        return np.array(lengths, float)[difficulty(batch, "reward")]

    def monitoring(self) -> tuple[int, int] | None:
        """Problems of the monitoring set and samples of each, where new responses to it are due."""
        return (self.targets.problems, self.targets.samples) if self.state.due else None

    def monitor(self, batch: RewardBatch) -> None:
        """Set the lengths from responses to the monitoring set."""
        self.state.monitor(batch)

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON."""
        return self.state.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.state.load_state_dict(saved)


@dataclass(eq=False)
class LaserDE(LaserD):
    """LASER-D that also pays wrong answers for going on beyond the length, unless they are malformed or loop.

    Attributes:
        distinct: Least share of different 4-grams of a response that does not loop.
    """

    distinct: Number = assumed_distinct

    name: ClassVar[str] = "laser_de"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens", "formatted", "token_ids"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        explores = ~_right(batch) & batch["formatted"].astype(bool) & (batch["tokens"] > self.limit(batch))
        scored = super().__call__(batch)
        bonus = self.alpha * self._free_of_loops(batch, explores)
        return RewardValues.sum(**scored.components, exploration=bonus)

    def _free_of_loops(self, batch: RewardBatch, rows: Bool[ndarray, " n"]) -> Bool[ndarray, " n"]:
        """Those of the rows that do not loop: only they are looked at."""
        found = rows.copy()
        found[rows] = distinct_share(batch["token_ids"][rows], LOOP_NGRAM) >= self.distinct
        return found


def _right(batch: RewardBatch) -> Bool[ndarray, " n"]:
    return batch["correct"].astype(bool) & batch["formatted"].astype(bool)
