"""Ruler: a model-agnostic method to control generated length, arXiv:2409.18943, its hit test as a reward (ours).

Equation (T: the length that the prompt asked for):

    r = 1[low(T) < len <= high(T)]        flexible or precise ranges, as published in words

Deviations: the paper measures with this and does not train on it. In tokens, or for targets without a published range, ranges are
``T +- share T`` (``ranges=None``; ours).

Units and signs: words (runs of letters, digits and underscores) or tokens; + is paid. Correctness is not looked at: put it in a
sum or a gate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from toolkit import stats
from toolkit.rewards.batch import RewardBatch, Scored
from toolkit.rewards.longwriter import lengths, lengths_column
from toolkit.stats import RULER_FLEXIBLE, Number, Ranges, assumed_flexible


@dataclass(frozen=True)
class Ruler:
    """1 if the length hits its target's range, else 0.

    Attributes:
        ranges: ``stats.RULER_FLEXIBLE``, ``stats.RULER_PRECISE``, one's own, or ``None`` for ``T +- share T``.
        share: Half width of such a range.
        unit: What is counted.
        target: One target for all; ``None`` reads the column ``target``.
    """

    ranges: Ranges | None = field(default_factory=lambda: RULER_FLEXIBLE)
    share: float = assumed_flexible
    unit: str = "words"
    target: Number | None = None

    name: ClassVar[str] = "ruler"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({lengths_column(self.unit)} | ({"target"} if self.target is None else set()))

    def __call__(self, batch: RewardBatch) -> Scored:
        batch.check(self)
        targets = batch["target"].astype(float) if self.target is None else np.full(len(batch), float(self.target))
        ranges = stats.ranges_around(np.unique(targets).tolist(), self.share) if self.ranges is None else self.ranges
        return Scored.sum(match=stats.hits(lengths(batch, self.unit), targets, ranges))
