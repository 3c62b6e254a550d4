"""MASH: modelling abstention via selective help-seeking, arXiv:2510.01152. The cost of a response is its number of calls, or its length.

Equations (c: 1 if right, else 0; m: cost of the response; n: least cost of a right response to the problem, in this batch or an earlier
one; lambda: factor per block above n, the field ``decay``; C: a constant, the field ``cap``; F: cost factor, from 0 to 1, where 1 means
no loss of reward):

    r = c F(m)        F has one of these forms, named by ``kind``:
    exp          lambda^(m - n)
    linear       max(0, 1 - m / (C + 1))
    otc          cos(pi m / (2m + C)) if n = 0;   sin(pi m / (m + n)) if n > 0
    otc_strict   1 if n = 0 and m = 0;   0 if n = 0 and m > 0;   as otc if n > 0

``otc`` is the formula of OTC (Optimal Tool Calls, arXiv:2504.14870). ``exp``, and ``otc`` if n > 0, compare the cost with that of the
cheapest right response so far. On a problem whose right responses are all long, n is large, and a long response may lose little.
``linear``, and ``otc`` if n = 0, depend on the cost alone. In the linear form, C is the largest cost with a reward.

Abstention is read off searching: after training, the tool is taken away, and a response that asks for it abstains. ``abstention`` scores
this: F1 of abstaining on questions that cannot be answered, and F1 of not abstaining on the others.

Deviations: the paper's cost is the number of searches (``cost="calls"``). By default ours is the number of whole blocks of ``block`` tokens
in the response, for models without tools. The default block, ``assumed_block``, is our choice. The released
code has a branch for m < n that cannot be reached; we leave it out. The paper also multiplies by the format, c F(m) times 1 or 0: use
``combine.Gated`` with ``Format``.

Units and signs: costs in calls or in blocks of tokens; a higher reward is better; a wrong response gets 0 at any cost.

State: n of each problem. It is updated only if ``batch.split`` is ``"train"``, from the right responses of the batch.
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

PUBLISHED_DECAY = 0.7  # lambda: the default of the released code; 0.5 on NQ, 0.8 on HotpotQA and 2Wiki
PUBLISHED_CAP = 5  # C
assumed_block = 64  # tokens per unit of cost: ours
COSTS = ("tokens", "calls")
KINDS = ("exp", "linear", "otc", "otc_strict")


def penalty(
    m: ndarray, n: ndarray, kind: str, *, decay: Number = PUBLISHED_DECAY, cap: Number = PUBLISHED_CAP
) -> Float[ndarray, " rows"]:
    """Return the cost factor, from 0 to 1, by which the reward of a right response is multiplied. It falls with the cost of the response.

    The parameter ``kind`` selects a formula. In these, m is the cost, and n the least cost of a right response to the problem so far:

    - exp: decay^(m - n)
    - linear: max(0, 1 - m / (cap + 1))
    - otc: sin(pi m / (m + n)) if n > 0; cos(pi m / (2m + cap)) if n = 0
    - otc_strict: the same as otc if n > 0. If n = 0, the factor is 1 where m = 0, and 0 where m > 0.

    >>> penalty(np.array([0, 1, 2]), np.zeros(3), "exp", decay=0.5).tolist()
    [1.0, 0.5, 0.25]

    Args:
        m: Cost of each response, in calls or blocks of tokens.
        n: Least cost of a right response to the same problem, in this batch or an earlier one, in the same unit; at most m.
        kind: Formula of the factor: ``"exp"``, ``"linear"``, ``"otc"`` or ``"otc_strict"``.
        decay: Used only by ``"exp"``: each unit above n multiplies the factor by this number, in (0, 1].
        cap: Used only by ``"linear"`` and ``"otc"``, in units of cost: a larger cap gives a slower fall with the cost.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}.")
    m, n = np.asarray(m, float), np.asarray(n, float)
    if kind == "exp":
        return float(decay) ** (m - n)
    if kind == "linear":
        return np.maximum(0.0, 1.0 - m / (cap + 1))
    # Both forms are computed for every row: for n = 0, and for n > 0 with n = 0 replaced by 1, so that nothing divides by zero.
    at_zero = np.where(m > 0, 0.0, 1.0) if kind == "otc_strict" else np.cos(m * np.pi / (2 * m + cap))
    n_safe = np.maximum(n, 1.0)
    return np.where(n == 0, at_zero, np.sin(m * n_safe / (m + n_safe) * np.pi / n_safe))


@dataclass(eq=False)
class MASH:
    """Correctness times a factor that falls with the cost of the response: its answered calls, or its whole blocks of tokens.

    By default (``kind="exp"``) the factor depends on how much the cost exceeds that of the cheapest right response to the problem, in this
    batch or an earlier one.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[100, 164, 100])
    >>> MASH(decay=0.7, block=64)(batch).values.round(2).tolist()
    [1.0, 0.7, 0.0]
    >>> batch = RewardBatch.from_columns(correct=[1, 1, 1], calls=[0, 1, 2])
    >>> MASH(decay=0.5, cost="calls")(batch).values.tolist()
    [1.0, 0.5, 0.25]

    Attributes:
        kind: Formula of the factor: ``"exp"``, ``"linear"``, ``"otc"`` or ``"otc_strict"``; see ``penalty``.
        decay: Used only by ``"exp"``: each unit above the least cost multiplies the factor by this number, in (0, 1].
        cap: Used only by ``"linear"`` and ``"otc"``, in units of cost: a larger cap gives a slower fall with the cost.
        block: Number of tokens per block. It has no effect if ``cost`` is ``"calls"``.
        cost: ``"calls"``, as in the paper, or ``"tokens"``: blocks of tokens.
        best: Problem id (as text) -> least cost of a right response so far, in calls or blocks of tokens.
    """

    kind: str = "exp"
    decay: Number = PUBLISHED_DECAY
    cap: Number = PUBLISHED_CAP
    block: int = assumed_block
    cost: str = "tokens"
    best: dict[str, int] = field(default_factory=dict, init=False)

    name: ClassVar[str] = "mash"

    def __post_init__(self) -> None:
        penalty(np.zeros(0), np.zeros(0), self.kind)  # raises ValueError for an unknown kind
        if not 0 < self.decay <= 1 or self.cap <= 0 or self.block < 1:
            raise ValueError(
                f"decay={self.decay}, cap={self.cap}, block={self.block}: need 0 < decay <= 1, cap > 0 and block >= 1."
            )

        if self.cost not in COSTS:
            raise ValueError(f"cost={self.cost!r}: choose one of {', '.join(COSTS)}.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"correct", self.cost})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        right, g = batch["correct"].astype(bool), batch.groups
        cost = batch["calls"] if self.cost == "calls" else batch["tokens"] // self.block
        history = np.array([self.best.get(str(i), np.inf) for i in batch.group_ids], float)[g]
        # inf if no response to the problem was right yet, in this batch or an earlier one.
        least = np.minimum(history, groups.lowest(cost, g, right))
        # The factor of a wrong response is not used: its own cost only keeps the arithmetic finite.
        factor = penalty(cost, np.where(right, least, cost), self.kind, decay=self.decay, cap=self.cap)
        if batch.split == "train":
            finite = np.isfinite(least)
            # All rows of a problem have the same least cost, so it does not matter which of them the inner dict keeps.
            self.best.update(
                {str(i): int(n) for i, n in dict(zip(batch["problem_id"][finite], least[finite], strict=True)).items()}
            )
        return RewardValues.sum(correctness=right, cost=np.where(right, factor - 1.0, 0.0))

    def state_dict(self) -> dict[str, Any]:
        """Return the least cost of a right response to each problem so far, as a dict that can be written as JSON."""
        return {"best": dict(self.best)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore the least cost of a right response to each problem from ``saved``, the result of ``state_dict``."""
        self.best = {problem: int(cost) for problem, cost in saved["best"].items()}


def abstention(asked: Bool[ndarray, " n"], answerable: Bool[ndarray, " n"]) -> dict[str, float]:
    """Return F1 scores of abstaining, where a response abstains if it asks for the tool that was taken away.

    The keys are ``unanswerable`` (F1 of asking, for the questions that cannot be answered without the tool), ``answerable`` (F1 of not
    asking, for the others) and ``mean`` (of the two). A score is NaN if there is no such question and no such response.

    >>> abstention(np.array([True, True, False, False]), np.array([False, True, True, True]))["unanswerable"].round(3)
    np.float64(0.667)

    Args:
        asked: True for each response that asks for the tool.
        answerable: True for each response whose question can be answered without the tool.
    """
    asked, answerable = np.asarray(asked, bool), np.asarray(answerable, bool)

    def f1(chosen: ndarray, wanted: ndarray) -> float:
        with np.errstate(invalid="ignore"):  # 0 / 0 = NaN
            return 2 * (chosen & wanted).sum() / np.float64(chosen.sum() + wanted.sum())

    scores = {"unanswerable": f1(asked, ~answerable), "answerable": f1(~asked, answerable)}
    return {**scores, "mean": (scores["unanswerable"] + scores["answerable"]) / 2}
