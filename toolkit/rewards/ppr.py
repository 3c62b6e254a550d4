"""PPR (principle process reward) with ReNorm, arXiv:2509.25598: a process reward plus correctness, minus 1.

Equation (r_p in [0, 1]: process score, the quality of a step or response; r_o: outcome, 1 if the answer is right, else 0):

    r = r_p + r_o - 1

``PPR`` applies it to each step, a turn of a response with tool calls; ``ReNorm`` applies it to a whole response. The reward of a response
is, for ``PPR``, the mean over its steps. The recipe ``ppr`` trains with one advantage per step (``grpo.advantages.grpo_steps``).

r is between 0 and 1 if the answer is right, and between -1 and 0 if it is wrong.

Deviations: we had no access to the formula in the paper, and took it from the published peer reviews. The paper's r_p comes from a trained
model of 8 billion parameters that judges principles; here it is an argument. Its default, ``assumed_principles``, is the share of a few
rules that a step follows (ours). The paper trains with PPO and a critic; we have no critic. The mean over steps is ours.
With ``grpo_steps`` the advantage of a step sums over all later steps, so steps of good responses with many turns get large advantages.

Units and signs: higher is better. The constant -1 has no effect on advantages if a mean is subtracted from rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from toolkit.rewards.batch import Reward, RewardBatch, RewardValues
from toolkit.rewards.combine import Combined
from toolkit.rewards.turns import Protocol, Turn, words

FAILED = ("error (", "nothing found")  # beginnings of results without content: those of ``toolkit.tools``


def renorm(process: ndarray, outcome: ndarray) -> Float[ndarray, " steps"]:
    """Return the reward ``process + outcome - 1`` of each step (or response).

    >>> renorm(np.array([0.25, 0.75]), np.array([1, 0])).tolist()
    [0.25, -0.25]

    Args:
        process: Process score of each step, in [0, 1].
        outcome: 1 for a step of a response with a right answer, else 0.

    Raises:
        ValueError: A score is outside [0, 1].
    """
    p, o = np.asarray(process, float), np.asarray(outcome, float)
    for name, values in (("process", p), ("outcome", o)):
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"A {name} score of {values[~((values >= 0) & (values <= 1))][0]}: scores are between 0 and 1.")
    return p + o - 1.0


@dataclass(frozen=True)
class ReNorm(Combined):
    """Process reward plus correctness minus 1: from 0 to 1 for right responses, from -1 to 0 for wrong ones.

    >>> from toolkit.rewards.longwriter import LongWriter
    >>> batch = RewardBatch.from_columns(correct=[1, 0], tokens=[50, 50])
    >>> ReNorm(LongWriter(low=100, high=200, longest=400))(batch).values.tolist()
    [0.5, -0.5]

    Attributes:
        process: The process reward: any reward with values in [0, 1].
    """

    process: Reward

    @property
    def rewards(self) -> tuple[Reward, ...]:
        return (self.process,)

    @property
    def name(self) -> str:
        return f"renorm({self.process.name})"

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"correct"}

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        c = batch["correct"].astype(float)
        total = renorm(self.process(batch).values, c)
        # Two components that add up to the total: r_p, and r_o - 1.
        return RewardValues.sum(process=total - (c - 1.0), outcome=c - 1.0)


def assumed_principles(turns: Sequence[Turn]) -> list[float]:
    """Return a process score in [0, 1] for each turn: the share of rules that it follows (ours).

    A turn with an answered call follows two rules if its call differs from all earlier ones and its result has content. The last turn
    follows one rule if it ends without a call, so with an answer.

    >>> assumed_principles(Protocol().turns("<search>a</search><result>b</result><search>A</search><result>b</result>b", 2))
    [1.0, 0.5, 1.0]

    Args:
        turns: Turns of a response.
    """
    calls = [(turn.tool, tuple(words(turn.argument))) for turn in turns]
    content = [bool(turn.result) and not str(turn.result).startswith(FAILED) for turn in turns[:-1]]
    return [*((float(calls[t] not in calls[:t]) + float(ok)) / 2 for t, ok in enumerate(content)), float(turns[-1].tool is None)]


@dataclass(frozen=True)
class PPR:
    """Mean over the steps of a response of process score plus correctness minus 1.

    >>> text = "<search>a</search><result>b</result><search>a</search><result>b</result>b"
    >>> batch = RewardBatch.from_columns(text=[text] * 2, calls=2, correct=[1, 0])
    >>> PPR().steps(batch)[1].tolist(), PPR()(batch).values.round(3).tolist()
    ([0.0, -0.5, 0.0], [0.833, -0.167])

    Attributes:
        principles: Function from the turns of a response to a process score in [0, 1] for each turn.
        protocol: Marks of calls and results.
    """

    principles: Callable[[Sequence[Turn]], Sequence[float]] = assumed_principles
    protocol: Protocol = field(default_factory=Protocol)

    name: ClassVar[str] = "ppr"
    needs: ClassVar[frozenset[str]] = frozenset({"text", "calls", "correct"})

    def steps(self, batch: RewardBatch) -> list[Float[ndarray, " _"]]:
        """Return the reward of each turn of each response."""
        batch.check(self)
        scores = [np.asarray(self.principles(turns), float) for turns in self.protocol.of_batch(batch)]
        return [renorm(s, np.full(len(s), float(c))) for s, c in zip(scores, batch["correct"], strict=True)]

    def __call__(self, batch: RewardBatch) -> RewardValues:
        total = np.array([steps.mean() for steps in self.steps(batch)])
        outcome = batch["correct"].astype(float) - 1.0
        return RewardValues.sum(process=total - outcome, outcome=outcome)
