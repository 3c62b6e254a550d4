"""Filters of rollouts: those that a filter leaves out get advantage 0, so that nothing is learned from them. Pure functions of arrays.

Sources:

* ``GFPO``: group filtered policy optimisation, arXiv:2508.09726. Sample many rollouts per problem, and learn from the shortest of them, or
  from those with the most reward per token.
* ``CellMask``: the masking study of Art, arXiv:2602.20945. A rollout belongs to one of four cells, by correctness and length; no gradient
  comes from the cells that are masked.

Equations. With R_i the reward and L_i the length of rollout i, and m, s mean and standard deviation of rewards (``assumed_stats``)::

    kept rollouts     A_i = the recipe's advantage, GRPO's by default: (R_i - m) / (s + 1e-4)
    other rollouts    A_i = 0

Deviations: we did not find whether m and s are those of the kept rollouts or of the whole group. ``assumed_stats`` chooses, and its default
is ours. GFPO's adaptive difficulty, which keeps more rollouts of harder problems, is left out.

Units and signs: lengths in tokens. With ``metric="shortest"``, short wrong rollouts are kept too. With ``"efficiency"``, all wrong rollouts
have the same metric if their reward is 0; a negative reward would favour long ones.

Cost: rollouts that are left out are sampled, but not trained on. Losses that divide by the number of rollouts or tokens still count them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from toolkit.grpo.advantages import Advantage, Values
from toolkit.rewards import RewardBatch

METRICS, STATS = ("shortest", "efficiency"), ("kept", "all")
CELLS = ("SC", "LC", "SW", "LW")
"""Cells of ``CellMask``: short (within the length limit) or long, and correct or wrong."""


@dataclass(frozen=True)
class GFPO:
    """Keep some rollouts of each problem: the shortest, or those with the most reward per token (arXiv:2508.09726).

    Rollouts with equal metrics are ordered by length, the shorter first, then by their place in the batch.

    Attributes:
        keep: k, the number of rollouts of each problem to keep. If a problem has no more, all are kept, as in GRPO.
        metric: ``"shortest"``, or ``"efficiency"`` for the reward divided by the length.
        assumed_stats: Rollouts from which mean and standard deviation of the advantage are computed: ``"kept"`` or ``"all"`` of the group.

    Raises:
        ValueError: ``keep`` is below 2, or the metric or ``assumed_stats`` is unknown.
    """

    keep: int = 8
    metric: str = "shortest"
    assumed_stats: str = "kept"

    def __post_init__(self) -> None:
        if self.keep < 2:
            raise ValueError(f"keep={self.keep}: an advantage compares rollouts, so keep at least 2.")
        _check("metric", self.metric, METRICS)
        _check("assumed_stats", self.assumed_stats, STATS)

    def keeps(self, batch: RewardBatch, rewards: Float[ndarray, " n"]) -> Bool[ndarray, " n"]:
        """Return a mask, True for the rollouts that are kept.

        >>> batch = RewardBatch.from_columns(correct=[1.0, 0.0, 1.0, 1.0], tokens=[30, 10, 20, 40])
        >>> GFPO(keep=2).keeps(batch, batch["correct"]).tolist(), GFPO(2, "efficiency").keeps(batch, batch["correct"]).tolist()
        ([False, True, True, False], [True, False, True, False])
        """
        tokens = batch["tokens"]
        metric = -tokens if self.metric == "shortest" else rewards / np.maximum(tokens, 1)
        # lexsort sorts by its last key first: groups, then the best metric, then the shorter rollout, then the place in the batch.
        order = np.lexsort((np.arange(len(tokens)), tokens, -metric, batch.groups))
        sizes = np.bincount(batch.groups)
        ranks = np.empty(len(tokens), np.int64)
        ranks[order] = np.concatenate([np.arange(size) for size in sizes]) if len(tokens) else []
        return ranks < self.keep


@dataclass(frozen=True)
class CellMask:
    """Learn nothing from some cells of rollouts, by correctness and length (arXiv:2602.20945).

    With the reward ``truncation``, only the cell SC is rewarded. The paper finds: masking SW together with LW or LC teaches "short is
    correct", and collapses; masking LC and LW ends in long wrong rollouts; masking LC alone gives longer but more accurate ones.

    Attributes:
        cells: Cells to mask, some of ``CELLS``.
        target: Length limit, tokens; a rollout of exactly this length is short.
        assumed_stats: Rollouts from which mean and standard deviation of the advantage are computed: ``"kept"`` or ``"all"`` of the group.

    Raises:
        ValueError: a cell or ``assumed_stats`` is unknown, all cells or none are masked, or the limit is not positive.
    """

    cells: tuple[str, ...]
    target: int
    assumed_stats: str = "all"

    def __post_init__(self) -> None:
        for cell in self.cells:
            _check("cells", cell, CELLS)
        _check("assumed_stats", self.assumed_stats, STATS)
        if not 0 < len(set(self.cells)) < len(CELLS) or self.target <= 0:
            raise ValueError(f"{self}: mask one to three cells, and give a limit above 0.")

    def keeps(self, batch: RewardBatch, rewards: Float[ndarray, " n"]) -> Bool[ndarray, " n"]:
        """Return a mask, True for the rollouts that are kept; ``rewards`` is not used.

        >>> batch = RewardBatch.from_columns(correct=[1.0, 1.0, 0.0, 0.0], tokens=[10, 30, 10, 30])
        >>> CellMask(("LC", "SW"), target=20).keeps(batch, batch["correct"]).tolist()
        [True, False, False, True]
        """
        return ~np.isin(cells_of(batch, self.target), self.cells)


Filter = GFPO | CellMask


def cells_of(batch: RewardBatch, target: int) -> ndarray:
    """Return the cell of each rollout: ``"SC"``, ``"LC"``, ``"SW"`` or ``"LW"``, with a length limit of ``target`` tokens."""
    short, right = np.where(batch["tokens"] <= target, "S", "L"), np.where(batch["correct"].astype(bool), "C", "W")
    return np.char.add(short, right)


def filtered(advantage: Advantage, form: Filter, components: Values, batch: RewardBatch) -> Float[ndarray, " n"]:
    """Return the advantages of a batch, 0 for the rollouts that the filter leaves out.

    Args:
        advantage: Function that computes the advantages, from ``advantages.ALL``.
        form: The filter.
        components: Components of the rewards, ``[n, k]``, as ``advantage`` takes them; their sum is the reward.
        batch: The batch, with whole groups.
    """
    kept = form.keeps(batch, components.sum(axis=1))
    tokens = np.asarray(batch["written_tokens"])
    if form.assumed_stats == "all":
        return np.where(kept, advantage(components, batch.groups, tokens), 0.0)
    values = np.zeros(len(batch))
    values[kept] = advantage(components[kept], batch.groups[kept], tokens[kept])
    return values


def _check(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(known)}.")
