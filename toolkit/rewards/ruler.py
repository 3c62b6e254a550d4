"""Ruler: a model-agnostic method to control generated length, arXiv:2409.18943. Its length test is used as a reward here (ours).

Equation (len: length; T: target, the length requested in the prompt; low(T), high(T): range of lengths that match the target):

    r = 1[low(T) < len <= high(T)]

The paper has two tables of ranges in words, a narrow one ("precise") and a wide one ("flexible"). The wide one is the default.

Deviations: the paper uses this test for evaluation, not for training. A target that is missing in the table has the range from
``(1 - share) T`` to ``(1 + share) T`` (ours, as in the task ``target_length``). With ``ranges=None`` all targets have such a range.

Units and signs: ``unit="words"`` measures the answer in words (runs of letters, digits and underscores); ``unit="tokens"`` measures the
whole response in tokens. Higher is better. The targets are in the column ``target_words``, which the task ``target_length`` sets, or
``target_tokens``. Correctness has no effect: add it with ``combine.WeightedSum`` or ``combine.Gated``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from toolkit import stats
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.rewards.longwriter import length_column, response_lengths
from toolkit.stats import RULER_FLEXIBLE, RULER_PRECISE, Number, Ranges, assumed_flexible


@dataclass(frozen=True)
class Ruler:
    """Reward 1 if the length is within a range around the target, else 0. The target is the length that the prompt requests.

    The lower end of the range does not belong to it; the upper end does.

    >>> batch = RewardBatch.from_columns(tokens=[95, 130])
    >>> Ruler(ranges=None, share=0.2, unit="tokens", target=100)(batch).values.tolist()
    [1.0, 0.0]

    Attributes:
        ranges: Table from target T to ``(low, high)``: ``stats.RULER_FLEXIBLE`` or ``stats.RULER_PRECISE``, which need ``unit="words"``,
            or one of your own. A target that is missing in the table has the range from ``(1 - share) T`` to ``(1 + share) T``. With
            ``None``, all targets have such a range.
        share: Half width of the range of a target that is missing in the table, as a share of the target T, in (0, 1].
        unit: Unit of all lengths: ``"words"`` of the answer, or ``"tokens"`` of the response.
        target: One target for all rows; ``None`` reads the column ``target_words`` or ``target_tokens``.
    """

    ranges: Ranges | None = field(default_factory=lambda: RULER_FLEXIBLE)
    share: float = assumed_flexible
    unit: str = "words"
    target: Number | None = None

    name: ClassVar[str] = "ruler"

    def __post_init__(self) -> None:
        if self.unit != "words" and any(self.ranges is table for table in (RULER_FLEXIBLE, RULER_PRECISE)):
            raise ValueError(
                f"unit={self.unit!r}: Ruler's ranges are in words. Give ranges=None for T +- share T, or ranges of your own."
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({length_column(self.unit)} | ({f"target_{self.unit}"} if self.target is None else set()))

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        targets = batch[f"target_{self.unit}"].astype(float) if self.target is None else np.full(len(batch), float(self.target))
        published = self.ranges or {}
        others = [t for t in np.unique(targets).tolist() if t not in published]
        return RewardValues.sum(
            match=stats.hits(response_lengths(batch, self.unit), targets, {**stats.ranges_around(others, self.share), **published})
        )
