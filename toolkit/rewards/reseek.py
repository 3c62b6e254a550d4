"""ReSeek, arXiv:2510.00568: a reward for judging search results, added to that for the answer.

After each result the model judges it: useful, or not. Equations (u: usefulness of the result given the needed documents, from 0 to 1; v: the
model's judgement; t: turn, from 1; T: number of turns; c: 1 if the answer is right, else 0; gamma: factor per turn):

    ideal judgement  useful if u > 0.7
    j                +0.3 if v agrees with the ideal;  -0.6 if v calls a useless result useful;  -0.3 if v calls a useful one useless
    r_t              j of the judgement in turn t (if there is one), plus c in the last turn
    R                sum over t of gamma^(t - 1) r_t

With these numbers, calling every result useful loses on average if fewer than two thirds of the results are useful.

Deviations: the paper takes u from a reranker that compares the result with the gold answer. Here ``usefulness`` is an argument, and its
default is 1 if the result holds a gold document (ours). A turn is a text that the model wrote between results, not a single action, and a
result without a judgement gets 0; both are ours. gamma was not found (``assumed_gamma``).

Units and signs: higher is better. Memory and time: one pass over the text of each response.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.rewards.turns import Protocol, assumed_usefulness, assumed_verdict, verdicts
from toolkit.stats import Number

PUBLISHED_HIT, PUBLISHED_FALSE_ACCEPT, PUBLISHED_FALSE_REJECT = 0.3, -0.6, -0.3
PUBLISHED_THRESHOLD = 0.7
assumed_gamma = 1.0


def verdict_reward(
    verdict: bool | None,
    useful: bool,
    *,
    hit: Number = PUBLISHED_HIT,
    false_accept: Number = PUBLISHED_FALSE_ACCEPT,
    false_reject: Number = PUBLISHED_FALSE_REJECT,
) -> float:
    """Return the reward of one judgement of a result.

    >>> [verdict_reward(v, useful) for v in (True, False) for useful in (True, False)], verdict_reward(None, True)
    ([0.3, -0.6, -0.3, 0.3], 0.0)

    Args:
        verdict: True if the model calls the result useful, False if not, ``None`` if it gives no judgement.
        useful: True if the result is useful.
        hit: Reward of a right judgement.
        false_accept: Reward of calling a useless result useful.
        false_reject: Reward of calling a useful result useless.
    """
    if verdict is None:
        return 0.0
    return float(hit if verdict == useful else false_accept if verdict else false_reject)


@dataclass(frozen=True)
class ReSeek:
    """Reward for each judgement of a result, plus correctness, each times ``gamma`` per turn before it.

    >>> text = "<search>Zor</search><result>Tal is in Zor</result>relevant. Tal"
    >>> batch = RewardBatch.from_columns(text=[text], calls=[1], correct=[1], gold_documents=[("Tal is in Zor",)])
    >>> ReSeek()(batch).values.tolist(), ReSeek().steps(batch)[0].tolist()
    ([1.3], [0.0, 1.3])

    Attributes:
        gamma: Factor per turn, in (0, 1].
        hit: Reward of a right judgement.
        false_accept: Reward of calling a useless result useful.
        false_reject: Reward of calling a useful result useless.
        threshold: A result is useful if its usefulness is above this number.
        usefulness: Function from the text of a result and the gold documents to a number from 0 to 1.
        pattern: Pattern of a judgement, see ``turns.verdicts``.
        protocol: Marks of calls and results.
    """

    gamma: Number = assumed_gamma
    hit: Number = PUBLISHED_HIT
    false_accept: Number = PUBLISHED_FALSE_ACCEPT
    false_reject: Number = PUBLISHED_FALSE_REJECT
    threshold: Number = PUBLISHED_THRESHOLD
    usefulness: Callable[[str, Sequence[str]], float] = assumed_usefulness
    pattern: re.Pattern[str] = assumed_verdict
    protocol: Protocol = field(default_factory=Protocol)

    name: ClassVar[str] = "reseek"
    needs: ClassVar[frozenset[str]] = frozenset({"text", "calls", "correct", "gold_documents"})

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}: need 0 < gamma <= 1.")

    def judgements(self, batch: RewardBatch) -> list[Float[ndarray, " _"]]:
        """Return for each response the reward of the judgement in each turn; 0 in the first, which follows no result."""
        batch.check(self)
        rewards = []
        for turns, documents in zip(self.protocol.of_batch(batch), batch["gold_documents"], strict=True):
            useful = [self.usefulness(turn.result or "", documents) > self.threshold for turn in turns[:-1]]
            pairs = zip(verdicts(turns, self.pattern), useful, strict=True)
            prices = {"hit": self.hit, "false_accept": self.false_accept, "false_reject": self.false_reject}
            rewards.append(np.array([0.0, *(verdict_reward(v, u, **prices) for v, u in pairs)]))
        return rewards

    def steps(self, batch: RewardBatch) -> list[Float[ndarray, " _"]]:
        """Return the reward r_t of each turn of each response."""
        steps = self.judgements(batch)
        for rewards, correct in zip(steps, batch["correct"], strict=True):
            rewards[-1] += float(correct)
        return steps

    def __call__(self, batch: RewardBatch) -> RewardValues:
        judged = self.judgements(batch)
        discounts = [float(self.gamma) ** np.arange(len(j)) for j in judged]
        return RewardValues.sum(
            correctness=np.array([d[-1] * float(c) for d, c in zip(discounts, batch["correct"], strict=True)]),
            judgement=np.array([d @ j for d, j in zip(discounts, judged, strict=True)]),
        )
