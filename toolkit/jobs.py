"""What the commands do: find, edit, prove. Functions over the rooms below, in the order a researcher would call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolkit import collect, directions, edits
from toolkit.lm import LM
from toolkit.methods import thinkedit
from toolkit.types import Direction, HeadScores, Moments, Plan, Rollout

PUBLISHED, OURS = "thinkedit", "thinkedit-ours"


@dataclass(frozen=True)
class Settings:
    """How the heads are found.

    Attributes:
        fraction: Share of heads edited.
        strength: lambda of the edit.
        share: Share of rollouts in each quantile class, unless absolute thresholds are given.
        short_below: Absolute threshold in tokens, or ``None``.
        long_above: Absolute threshold in tokens, or ``None``.
    """

    fraction: float = thinkedit.PUBLISHED_FRACTION
    strength: float = 1.0
    share: float = thinkedit.assumed_share
    short_below: float | None = None
    long_above: float | None = None

    def classes(self, rollouts: Sequence[Rollout]) -> thinkedit.LengthClasses:
        """Absolute classes if both thresholds are given, else quantiles. Errors as in ``thinkedit``."""
        if (self.short_below is None) != (self.long_above is None):
            raise ValueError("Give both short_below and long_above, or neither (then the classes are quantiles).")
        if self.short_below is not None and self.long_above is not None:
            return thinkedit.length_classes(rollouts, short_below=self.short_below, long_above=self.long_above)
        return thinkedit.quantile_classes(rollouts, share=self.share)
