"""HAPO: training language models to reason concisely via history-aware policy optimisation, arXiv:2505.11225.

Equations (c: 1 if right, else 0; L: length; w: weight; h: the *history* of a problem, the length of the shortest right response to it in
earlier batches; l: length part of the reward; u: a cosine that is 1 at L = 0, 0 at L = h and -1 at L >= 2h):

    u = cos(min(pi, (pi/2) L / h))
    l = max(-0.7, u) if right, min(0, u) if wrong          l = 0 if no earlier response to the problem was right
    r = c + w l
    then h <- min(h, length of the shortest right response in the batch)

The linear form (``form="linear"``) has another l (t: tolerance; e = (L - (1+t) h) / h, the relative excess length):

    right    l = 1 - L/h if L < h, max(-0.7, -max(0, e)) otherwise
    wrong    l = max(-1, -max(0, e))

Deviations: the paper counts the tokens of the text without special tokens; here the end-of-sequence token counts too. An h of 0 tokens
counts as 1. The released code also updates h during evaluation, and takes h = 100000 for a problem without an h; we copy neither. It also
has a repetition penalty, off by default: to add it, combine HAPO with ``repetition.RepetitionPenalty`` in ``combine.WeightedSum``.

Units and signs: lengths in tokens; higher is better. With w <= 1 a right response (at least 1 - 0.7 w) beats a wrong one (at most 0).
By default (``memory="min"``) h never grows: one short response that is right by chance can set h for the rest of the run. With
``memory="mean"``, an option of the released code, h is the mean length of all right responses so far.

State: h of each problem. It is updated only if ``batch.split`` is ``"train"``, from the right responses of a batch after the batch was
scored.
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
    """Correctness plus a length part, which compares the length with that of the shortest right response to the problem so far.

    The length part is positive for a shorter right response, and negative for a longer response, right or wrong. In the linear form, a
    response gets a negative length part only if it is longer by more than the tolerance. ``length_reward`` has the formulas.

    >>> reward = HAPO()
    >>> reward(RewardBatch.from_columns(correct=[1, 0], tokens=[100, 50])).values.tolist()  # no history yet
    [1.0, 0.0]
    >>> reward(RewardBatch.from_columns(correct=[1, 1, 0], tokens=[50, 100, 150])).values.round(3).tolist()
    [1.707, 1.0, -0.707]

    Attributes:
        weight: Weight of the length part, in [0, 1] so that a right response beats a wrong one.
        form: Formula of the length part, ``"cosine"`` or ``"linear"``: see ``length_reward``.
        memory: Definition of h, the length to compare with: ``"min"``, the length of the shortest right response so far, or ``"mean"``,
            the mean length of all right responses so far (an option of the released code).
        clip: Lower limit of the length part of a right response; a negative number, -0.7 in the paper.
        tolerance: Used only by the linear form: a response longer than h by up to this share of h gets no penalty.
        history: Problem id (as text) -> ``(h in tokens, number of right responses so far)``.
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
            raise ValueError(f"weight={self.weight}: need 0 <= weight <= 1, or a right answer may earn less than a wrong one.")
        if self.form not in FORMS or self.memory not in MEMORIES:
            raise ValueError(f"form={self.form!r}, memory={self.memory!r}: choose one of {FORMS} and one of {MEMORIES}.")

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        right = batch["correct"].astype(bool)
        history = np.array([self.history.get(str(i), (np.nan, 0))[0] for i in batch.group_ids], float)[batch.groups]
        length = length_reward(batch["tokens"].astype(float), right, history, self)
        scored = RewardValues.sum(correctness=right, length=self.weight * length)
        if batch.split == "train":
            self._remember(batch, right)
        return scored

    def _remember(self, batch: RewardBatch, right: Bool[ndarray, " n"]) -> None:
        """Update the field ``history`` with the right responses of a batch.

        ``history`` holds for each problem a length h, the least or mean length of its right responses so far, and their number.
        """
        g, L = batch.groups, batch["tokens"]
        # Index of the first row of each group, in the order of group_ids.
        first = np.unique(g, return_index=True)[1]
        statistics = (groups.lowest(L, g, right), groups.mean(L, g, right), groups.count(g, right))
        least, mean, n = (values[first] for values in statistics)  # one value per group
        for problem, shortest, average, count in zip(map(str, batch.group_ids), least, mean, n.tolist(), strict=True):
            if not count:
                continue
            # inf for a problem without history, so that min(old, shortest) is the shortest of this batch.
            old, old_count = self.history.get(problem, (np.inf, 0))
            running_mean = average if not old_count else (old * old_count + average * count) / (old_count + count)
            value = min(old, shortest) if self.memory == "min" else running_mean
            self.history[problem] = float(value), old_count + count

    def state_dict(self) -> dict[str, Any]:
        """Return the field ``history`` as a dict that can be written as JSON."""
        return {"history": {problem: list(entry) for problem, entry in self.history.items()}}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore the field ``history`` from ``saved``, the result of ``state_dict``."""
        # JSON has stored the pairs as lists.
        self.history = {problem: (float(length), int(n)) for problem, (length, n) in saved["history"].items()}


def length_reward(
    L: Float[ndarray, " n"], right: Bool[ndarray, " n"], history: Float[ndarray, " n"], reward: HAPO
) -> Float[ndarray, " n"]:
    """Return the length part of HAPO's reward for each response, ``[n]``: a number in [-1, 1], not yet multiplied by the weight.

    The length part compares the length L with h, the length of the shortest right response to the problem so far (or the mean length, if
    ``reward.memory`` is ``"mean"``). There are two forms:

    - cosine: let u = cos(min(pi, (pi/2) L/h)). A right response gets max(clip, u), a wrong one min(0, u).
    - linear: let e = max(0, L - (1 + tolerance) h) / h. A right response gets 1 - L/h if L < h, else max(clip, -e). A wrong one gets
      max(-1, -e).

    Args:
        L: Length of each response, tokens.
        right: True for each right response.
        history: h of each response's problem, tokens; NaN if the problem has no h yet: the length part is then 0.
        reward: HAPO reward; its fields ``form``, ``clip`` and ``tolerance`` are used.
    """
    # Rows without history get a dummy h of 1 here and l = 0 in the last line.
    h = np.maximum(np.nan_to_num(history, nan=1.0), 1.0)
    if reward.form == "cosine":
        u = np.cos(np.minimum(np.pi, np.pi / 2 * L / h))
        length = np.where(right, np.maximum(reward.clip, u), np.minimum(0.0, u))
    else:
        # -max(0, e), so at most 0.
        excess = -np.maximum(0.0, L - (1 + reward.tolerance) * h) / h
        length = np.where(right, np.where(h > L, 1 - L / h, np.maximum(reward.clip, excess)), np.maximum(-1.0, excess))
    return np.where(np.isnan(history), 0.0, length)
