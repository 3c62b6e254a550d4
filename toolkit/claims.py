"""Judge published effects by our measurements: a verdict, and the effect size that would be detected with 80 % power.

Every effect is signed so that + is the direction that the paper claims. The smallest effect that matters is our choice, stated with each
claim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from toolkit.metrics import with_interval
from toolkit.stats import Effect, Estimate

POWER = 1.96 + 0.84  # size, in standard errors, of an effect that is detected with 80 % power at the 5 % level
UNITS = {"points": "share"}  # unit of a claim -> the name that ``with_interval`` has for it, where the two differ
COLUMNS = ("effect", "from", "estimate (+ as claimed)", "verdict", "detectable with 80 % power")
"""Columns of ``verdict_table``: the claim, its source, the estimate with its interval, the verdict, and ``Claim.detectable``."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published effect and its measurement.

    Attributes:
        text: The claim in words.
        source: Paper that makes the claim, or ``control``.
        estimate: The measured effect; positive if it has the claimed direction.
        smallest: Smallest effect that matters (our choice), in the unit of ``estimate``: 0.03 means 3 points.
        unit: ``points`` (the estimate is a share, e.g. 0.03, and is shown as 3.0 points), ``tokens``, ``nats`` or ``correlation``.
        beyond: The claim is that the effect exceeds this value, in the unit of ``estimate``: 0 if the claim is only that there is an effect
            in this direction, -0.03 for "loses less than 3 points".
    """

    text: str
    source: str
    estimate: Estimate
    smallest: float
    unit: str
    beyond: float = 0.0

    @property
    def verdict(self) -> str:
        """The verdict, from the interval of the estimate. An effect that matters exceeds ``beyond`` by at least ``smallest``.

        - ``reproduced``: the interval lies above ``beyond`` and includes effects that matter.
        - ``real but too small to matter``: the interval lies above ``beyond`` and includes no effect that matters.
        - ``contradicted``: the interval lies below ``beyond`` and reaches at least ``smallest`` below it.
        - ``not reproduced``: the interval is none of the above and includes no effect that matters.
        - ``undecided``: the interval is none of the above, has width 0, or does not exist (NaN).
        - ``not judged: 2 seeds``: a random or trained condition with too few seeds; the text gives their number.

        >>> Claim(text="longer", source="", estimate=Estimate(3.0, 1.0, 5.0), smallest=2.0, unit="tokens").verdict
        'reproduced'
        """
        note = self.estimate.note if isinstance(self.estimate, Effect) else ""
        if "seed" in note:  # the note of an effect names the seeds only if they are too few
            return f"not judged: {note}"
        low, high = self.estimate.low - self.beyond, self.estimate.high - self.beyond
        if np.isnan(low) or low == high:
            return "undecided"
        if low > 0:
            return "reproduced" if high >= self.smallest else "real but too small to matter"
        if high < 0 and low <= -self.smallest:
            return "contradicted"
        return "not reproduced" if high < self.smallest else "undecided"

    @property
    def detectable(self) -> float:
        """The effect size, in the unit of ``estimate``, that would be detected with 80 % power; 0 if the interval has width 0.

        It is 2.8 standard errors. The standard error follows from the width of the interval.
        """
        return POWER * (self.estimate.high - self.estimate.low) / (2 * 1.96)

    @property
    def row(self) -> tuple[str, str, str, str, str]:
        """The claim as text cells, in the order of ``COLUMNS``."""
        unit = UNITS.get(self.unit, self.unit)
        e = self.estimate
        digits = 2 if self.unit in ("nats", "correlation") else 1
        effect = with_interval(e.mean, e.low, e.high, unit, sign="+", digits=digits)
        scale = 100 if self.unit == "points" else 1
        power = f"{scale * self.detectable:.{digits}f}" if self.detectable > 0 else "unknown"
        return self.text, self.source, f"{effect} {self.unit}", self.verdict, power


def verdict_table(claims: Sequence[Claim]) -> pd.DataFrame:
    """Return one row of text cells per claim, indexed by the claim's text; ``COLUMNS`` lists the columns."""
    return pd.DataFrame([claim.row for claim in claims], columns=list(COLUMNS)).set_index("effect")


def json_records(claims: Sequence[Claim]) -> list[dict[str, object]]:
    """Return one dict per claim for JSON.

    Keys: those of ``COLUMNS`` (text), ``"estimate"`` (a dict of the numbers ``mean, low, high``, or ``None``) and ``"smallest"`` (the
    smallest effect that matters).
    """
    return [
        {
            **dict(zip(COLUMNS, claim.row, strict=True)),
            "estimate": None if np.isnan(claim.estimate.mean) else {k: getattr(claim.estimate, k) for k in ("mean", "low", "high")},
            "smallest": claim.smallest,
        }
        for claim in claims
    ]
