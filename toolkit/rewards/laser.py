"""LASER, LASER-D, LASER-DE: learn to reason efficiently with adaptive length-based reward shaping, arXiv:2505.15612.

Equations (L: length; R: 1 if right, -0.5 if wrong, -1 if malformed; alpha: the bonus; L_T: fixed target length; L_A: target length for the
problem's difficulty, adapted during training, see ``laser_targets``):

    LASER      r = R + alpha 1[right] 1[L <= L_T]
    LASER-D    r = R + alpha 1[right] 1[L <= L_A]
    LASER-DE   r = R + alpha (1[right] 1[L <= L_A] + 1[wrong] 1[L > L_A])      also rewards long wrong responses

A response is well formed if an answer that is not empty follows a closed think span; otherwise it is malformed. *Right* and *wrong* refer
to well-formed responses only: a malformed response has R = -1 and no bonus, whatever its answer.

Deviations: those listed in ``laser_targets``. In the paper the answer must be boxed; here any answer is enough, since the toolkit's tasks
do not ask for boxes. If a model has no closing think tag, no think span is expected (ours). LASER-DE gives no bonus to a wrong response
that repeats itself, as in the released code. That code detects such loops from 4-grams; we do not know its exact test. Here a response
loops if the share of distinct 4-grams among its 4-grams is below ``distinct``. The default threshold, ``assumed_distinct``, is our guess.

Units and signs: lengths in tokens; higher is better. With alpha <= 1.5 a right response never earns less than a wrong one.
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
assumed_distinct = 0.2  # least share of distinct 4-grams in a response that does not loop: ours


@dataclass(frozen=True)
class Outcome:
    """Reward R of a response for its outcome: right, wrong or malformed. Calling the object, ``outcome(batch)``, returns R of each row.

    Attributes:
        right: Reward of a well-formed right response.
        wrong: Reward of a well-formed wrong response.
        malformed: Reward of a response whose thinking was never closed or never opened, or whose answer is empty.
    """

    right: float = 1.0
    wrong: float = -0.5
    malformed: float = -1.0

    def __call__(self, batch: RewardBatch) -> Float[ndarray, " n"]:
        right, formed = batch["correct"].astype(bool), batch["formatted"].astype(bool)
        return np.where(formed, np.where(right, self.right, self.wrong), self.malformed)


PUBLISHED_OUTCOME = Outcome()


@dataclass(frozen=True)
class Laser:
    """Reward R of the outcome (right, wrong or malformed), plus a bonus for right responses of at most a fixed target length.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[4000, 5000, 4000], formatted=True)
    >>> Laser(target=4096)(batch).values.tolist()
    [1.5, 1.0, -0.5]

    Attributes:
        target: L_T, the target length, tokens.
        alpha: The bonus.
        outcome: Values of R for right, wrong and malformed responses.
    """

    target: Number = PUBLISHED_TARGET
    alpha: Number = PUBLISHED_ALPHA
    outcome: Outcome = PUBLISHED_OUTCOME

    name: ClassVar[str] = "laser"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens", "formatted"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        bonus = self.alpha * (_right(batch) & (batch["tokens"] <= self.target))
        return RewardValues.sum(outcome=self.outcome(batch), length=bonus)


@dataclass(eq=False)
class LaserD:
    """Reward R of the outcome (right, wrong or malformed), plus a bonus for right responses within a target length.

    There are three target lengths, for easy, medium and hard problems. They are set anew at intervals from the policy's responses to a
    *monitoring set*: training problems whose sampled responses measure the policy and are not trained on. ``TargetSettings.length`` has the
    rule. Before each batch of training rollouts, the trainer of ``toolkit.grpo`` calls ``monitoring``, which says whether new responses are
    due. If so, the trainer samples them and passes them to ``monitor``.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[3000, 5000, 4000], formatted=True)
    >>> LaserD()(batch).values.tolist()  # the initial target length is 4096
    [1.5, 1.0, -0.5]

    Attributes:
        alpha: The bonus.
        targets: Settings of the target lengths: first value, candidates, and how often they are set.
        outcome: Values of R for right, wrong and malformed responses.
        state: Current target lengths, and the data from which the next ones are computed.
    """

    alpha: Number = PUBLISHED_ALPHA
    targets: TargetSettings = field(default_factory=TargetSettings)
    outcome: Outcome = PUBLISHED_OUTCOME
    state: TargetState = field(init=False)

    name: ClassVar[str] = "laser_d"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens", "formatted"})
    state_by_problem: ClassVar[bool] = False  # the state has lengths per difficulty, and no problem ids

    def __post_init__(self) -> None:
        self.state = TargetState(self.targets)

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        within = batch["tokens"] <= self.limit(batch)
        scored = RewardValues.sum(outcome=self.outcome(batch), length=self.alpha * (_right(batch) & within))
        self.state.observe(batch)
        return scored

    def limit(self, batch: RewardBatch) -> Float[ndarray, " n"]:
        """Return the target length of each row, in tokens: the current target length for the difficulty of the row's problem.

        The difficulty depends on the share of right responses to the problem in this batch: see ``laser_targets.difficulty``. No target
        length is above the length of the longest response of the batch.
        """
        lengths = self.state.lengths_for(int(batch["tokens"].max(initial=0)))
        return np.array(lengths, float)[difficulty(batch, "reward")]

    def monitoring(self) -> tuple[int, int] | None:
        """Return ``(number of problems, responses per problem)`` of the monitoring set if new responses are due, else ``None``.

        A monitoring set consists of training problems whose sampled responses measure the policy and are not trained on.
        """
        return (self.targets.problems, self.targets.samples) if self.state.due else None

    def monitor(self, batch: RewardBatch) -> None:
        """Set the target lengths from the policy's responses to the monitoring set.

        Args:
            batch: Responses of the policy to the problems of the monitoring set, which ``monitoring`` describes.
        """
        self.state.monitor(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the field ``state`` as a dict that can be written as JSON.

        It holds the current target lengths, the data from which the next ones are computed, and counts of training batches.
        """
        return self.state.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore the field ``state`` from ``saved``, the result of ``state_dict``."""
        self.state.load_state_dict(saved)


@dataclass(eq=False)
class LaserDE(LaserD):
    """LASER-D plus a bonus of ``alpha`` for each wrong response longer than the target length, unless it is malformed or repeats itself.

    >>> tokens = tuple(range(5000))
    >>> batch = RewardBatch.from_columns(correct=[0, 0], tokens=[4000, 5000], formatted=True, token_ids=[tokens[:4000], tokens])
    >>> LaserDE()(batch).values.tolist()
    [-0.5, 0.0]

    Attributes:
        distinct: Threshold in [0, 1]. A response repeats itself (loops) if the share of distinct 4-grams among its 4-grams of tokens is
            below this threshold.
    """

    distinct: Number = assumed_distinct

    name: ClassVar[str] = "laser_de"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens", "formatted", "token_ids"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        # Before the call of LaserD, which updates the state and with it the limit.
        explores = ~_right(batch) & batch["formatted"].astype(bool) & (batch["tokens"] > self.limit(batch))
        scored = super().__call__(batch)
        bonus = self.alpha * self._free_of_loops(batch, explores)
        return RewardValues.sum(**scored.components, exploration=bonus)

    def _free_of_loops(self, batch: RewardBatch, rows: Bool[ndarray, " n"]) -> Bool[ndarray, " n"]:
        """Return a mask ``[n]``: True for the rows in the mask ``rows`` whose response does not repeat itself.

        A response repeats itself if its share of distinct 4-grams is below the field ``distinct``.

        Args:
            batch: Rollouts, with the column ``token_ids``.
            rows: Mask of the rows to test, ``[n]``; the result is False for all others.
        """
        free = rows.copy()
        free[rows] = distinct_share(batch["token_ids"][rows], LOOP_NGRAM) >= self.distinct
        return free


def _right(batch: RewardBatch) -> Bool[ndarray, " n"]:
    """Return a mask ``[n]``: True for responses that are right and well formed."""
    return batch["correct"].astype(bool) & batch["formatted"].astype(bool)
