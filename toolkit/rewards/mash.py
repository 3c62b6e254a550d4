"""MASH: modelling abstention via selective help-seeking, arXiv:2510.01152, with the cost counted in reasoning tokens (ours).

Equations (m: cost of the response; n: least cost of a right response to the problem, in this group and in the history):

    r = c penalty(m)
    exp      lambda^(m - n)
    linear   max(0, 1 - m / (C + 1))
    otc      n = 0: cos(m pi / (2m + C));   n > 0: sin(f pi / (2n)), f = 2mn / (m + n)
    otc_strict   as otc, and 0 where n = 0 and m > 0

Deviations: the paper's cost is searches; ours is blocks of ``block`` whole tokens (``assumed_block``), so that length costs only
against the shortest known right answer, and a hard problem is not punished for being long. The history is one number a problem
(the released code keeps none across batches by problem, and has a branch for m < n that cannot be reached).

Units and signs: blocks of tokens; + is paid; wrong is 0 for any cost. Stateful: changed only in training, from the batch it is
given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from toolkit.rewards import groups
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

PUBLISHED_DECAY = 0.7  # lambda: the default; .5 on NQ, .8 on HotpotQA and 2Wiki
PUBLISHED_CAP = 5  # C
assumed_block = 64  # tokens a unit of cost: ours
KINDS = ("exp", "linear", "otc", "otc_strict")


def penalty(
    m: ndarray, n: ndarray, kind: str, *, decay: Number = PUBLISHED_DECAY, cap: Number = PUBLISHED_CAP
) -> Float[ndarray, " rows"]:
    """What a right response of cost m keeps when the least known cost is n; n may not exceed m."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}.")
    m, n = np.asarray(m, float), np.asarray(n, float)
    if kind == "exp":
        return float(decay) ** (m - n)
    if kind == "linear":
        return np.maximum(0.0, 1.0 - m / (cap + 1))
    free = np.where(m > 0, 0.0, 1.0) if kind == "otc_strict" else np.cos(m * np.pi / (2 * m + cap))
    some = np.maximum(n, 1.0)
    return np.where(n == 0, free, np.sin(m * some / (m + some) * np.pi / some))


@dataclass(eq=False)
class MASH:
    """Right answers are discounted by what they cost beyond the cheapest right answer known.

    Attributes:
        kind: Form of the discount.
        decay: lambda of ``"exp"``.
        cap: C of the other forms, units of cost.
        block: Tokens a unit of cost.
        best: Problem id (as text) -> least cost of a right response so far.
    """

    kind: str = "exp"
    decay: Number = PUBLISHED_DECAY
    cap: Number = PUBLISHED_CAP
    block: int = assumed_block
    best: dict[str, int] = field(default_factory=dict, init=False)

    name: ClassVar[str] = "mash"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens"})

    def __post_init__(self) -> None:
        penalty(np.zeros(0), np.zeros(0), self.kind)  # refuses an unknown kind
        if not 0 < self.decay <= 1 or self.cap <= 0 or self.block < 1:
            raise ValueError(
                f"decay={self.decay}, cap={self.cap}, block={self.block}: need 0 < decay <= 1, cap > 0 and block >= 1."
            )

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        right, g = batch["correct"].astype(bool), batch.groups
        cost = batch["tokens"] // self.block
        before = np.array([self.best.get(str(i), np.inf) for i in batch.group_ids], float)[g]
        least = np.minimum(before, groups.lowest(cost, g, right))
        # A wrong response is paid nothing; any finite cost will do for it.
        kept = penalty(cost, np.where(right, least, cost), self.kind, decay=self.decay, cap=self.cap)
        if batch.split == "train":
            known = np.isfinite(least)
            self.best.update({str(i): int(n) for i, n in dict(zip(batch["problem_id"][known], least[known], strict=True)).items()})
        return RewardValues.sum(correctness=right, cost=np.where(right, kept - 1.0, 0.0))

    def state_dict(self) -> dict[str, Any]:
        """The least costs as JSON."""
        return {"best": dict(self.best)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.best = {problem: int(cost) for problem, cost in saved["best"].items()}
