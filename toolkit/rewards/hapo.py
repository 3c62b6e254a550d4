"""HAPO: training language models to reason concisely via history-aware policy optimisation, arXiv:2505.11225.

Equations (h: least length of any right response to this problem so far, none at first):

    l = 0                                   without history
    u = cos(min(pi, (pi/2) L / h))          l = max(-0.7, u) if right, min(0, u) if wrong
    r = c + w l
    then h <- min(h, least length of a right response of the batch)

The linear form (tolerance t): right 1 - L/h below h, 0 up to (1+t)h, then max(-0.7, -(L - (1+t)h)/h); wrong 0 up to (1+t)h, then
max(-1, -(L - (1+t)h)/h).

Deviations: the paper counts the text's tokens again without special tokens, here end-of-sequence counts. A history of 0 tokens is
taken as 1. The released code also updates in evaluation, and writes "none" as 100000; not copied. Its repetition penalty (off by
default there) is ``repetition.RepetitionPenalty`` in a sum.

Units and signs: tokens; + is paid. With w <= 1 right beats wrong: at least 1 - 0.7 w against at most 0. h never grows back: one
lucky short guess pins it. Stateful: one number a problem, changed only in training, from the batch it is given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from toolkit.rewards import groups
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

PUBLISHED_WEIGHT, PUBLISHED_CLIP, PUBLISHED_TOLERANCE = 1.0, -0.7, 0.1
FORMS, MEMORIES = ("cosine", "linear"), ("min", "mean")


@dataclass(eq=False)
class HAPO:
    """Right answers are paid by their length against the shortest right answer to the same problem so far.

    Attributes:
        weight: w, in [0, 1] so that right beats wrong.
        form: ``"cosine"`` or ``"linear"``.
        memory: ``"min"``, or ``"mean"``: the running mean of right lengths, an alternative in the code.
        clip: Least l of a right answer.
        tolerance: t of the linear form.
        history: Problem id (as text) -> ``(length, number of right responses)``.
    """

    weight: Number = PUBLISHED_WEIGHT
    form: str = "cosine"
    memory: str = "min"
    clip: float = PUBLISHED_CLIP
    tolerance: Number = PUBLISHED_TOLERANCE
    history: dict[str, tuple[float, int]] = field(default_factory=dict, init=False)

    name: ClassVar[str] = "hapo"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens"})

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight={self.weight}: need 0 <= weight <= 1, or a right answer may be paid less than a wrong one.")
        if self.form not in FORMS or self.memory not in MEMORIES:
            raise ValueError(f"form={self.form!r}, memory={self.memory!r}: choose one of {FORMS} and one of {MEMORIES}.")

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        right = batch["correct"].astype(bool)
        known = np.array([self.history.get(str(i), (np.nan, 0))[0] for i in batch.group_ids], float)[batch.groups]
        length = length_reward(batch["tokens"].astype(float), right, known, self)
        scored = RewardValues.sum(correctness=right, length=self.weight * length)
        if batch.split == "train":
            self._remember(batch, right)
        return scored

    def _remember(self, batch: RewardBatch, right: Bool[ndarray, " n"]) -> None:
        g, L = batch.groups, batch["tokens"]
        first = np.unique(g, return_index=True)[1]
        least, mean, n = (f[first] for f in (groups.lowest(L, g, right), groups.mean(L, g, right), groups.count(g, right)))
        for problem, shortest, average, times in zip(map(str, batch.group_ids), least, mean, n.tolist(), strict=True):
            if not times:
                continue
            old, before = self.history.get(problem, (np.inf, 0))
            together = average if not before else (old * before + average * times) / (before + times)
            value = min(old, shortest) if self.memory == "min" else together
            self.history[problem] = float(value), before + times

    def state_dict(self) -> dict[str, Any]:
        """The history as JSON."""
        return {"history": {problem: list(entry) for problem, entry in self.history.items()}}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.history = {problem: (float(length), int(n)) for problem, (length, n) in saved["history"].items()}


def length_reward(
    L: Float[ndarray, " n"], right: Bool[ndarray, " n"], history: Float[ndarray, " n"], form: HAPO
) -> Float[ndarray, " n"]:
    """l of each response; 0 where the history is NaN (none)."""
    h = np.maximum(np.nan_to_num(history, nan=1.0), 1.0)
    if form.form == "cosine":
        u = np.cos(np.minimum(np.pi, np.pi / 2 * L / h))
        found = np.where(right, np.maximum(form.clip, u), np.minimum(0.0, u))
    else:
        over = -np.maximum(0.0, L - (1 + form.tolerance) * h) / h
        found = np.where(right, np.where(h > L, 1 - L / h, np.maximum(form.clip, over)), np.maximum(-1.0, over))
    return np.where(np.isnan(history), 0.0, found)
