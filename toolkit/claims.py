"""Judge published effects by what was measured: verdict, and the effect that would have been found.

A claim is signed so that + is what was claimed. It counts from a smallest effect that matters on, which is ours and stated beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from toolkit.metrics import with_interval
from toolkit.stats import Effect, Estimate

POWER = 1.96 + 0.84  # standard errors of an effect that is found with 80 % power at 5 %
UNITS = {"points": "share"}  # unit of a claim -> unit of its digits, where they differ
COLUMNS = ("effect", "from", "found, + as claimed", "verdict", "80 % power at")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published effect and its measurement.

    Attributes:
        text: The claim in words.
        source: Paper, or ``control``.
        estimate: The measured effect, + as claimed.
        smallest: From what size on it matters (ours), in the estimate's own unit.
        unit: ``points`` (of 1; shown in percent), ``tokens``, ``nats`` or ``correlation``.
    """

    text: str
    source: str
    estimate: Estimate
    smallest: float
    unit: str

    @property
    def verdict(self) -> str:
        """One of these.

        - ``reproduced``: the interval is on the claimed side of 0 and reaches what matters.
        - ``real but too small to matter``: it is on that side and ends before what matters.
        - ``not reproduced``: it contains or lies below 0 and ends before what matters.
        - ``undecided``: none of these, or there is no interval.
        - ``not judged: 2 seeds``: too few seeds of what is random or trained.

        >>> Claim(text="longer", source="", estimate=Estimate(3.0, 1.0, 5.0), smallest=2.0, unit="tokens").verdict
        'reproduced'
        """
        note = self.estimate.note if isinstance(self.estimate, Effect) else ""
        if "seed" in note:
            return f"not judged: {note}"
        low, high = self.estimate.low, self.estimate.high
        if np.isnan(low) or low == high:
            return "undecided"
        if high < self.smallest:
            return "real but too small to matter" if low > 0 else "not reproduced"
        return "reproduced" if low > 0 else "undecided"

    @property
    def detectable(self) -> float:
        """The effect that would have been found with 80 % power, from the width of the interval; 0 if it has none."""
        return POWER * (self.estimate.high - self.estimate.low) / (2 * 1.96)

    @property
    def row(self) -> tuple[str, str, str, str, str]:
        """Text cells of :data:`COLUMNS`."""
        unit = UNITS.get(self.unit, self.unit)
        e, digits = self.estimate, 2 if self.unit in ("nats", "correlation") else 1
        found = with_interval(e.mean, e.low, e.high, unit, sign="+", digits=digits)
        scale = 100 if self.unit == "points" else 1
        power = f"{scale * self.detectable:.{digits}f}" if self.detectable > 0 else "unknown"
        return self.text, self.source, f"{found} {self.unit}", self.verdict, power


def table(claims: Sequence[Claim]) -> pd.DataFrame:
    """Return one row of text per claim, indexed by its words."""
    return pd.DataFrame([claim.row for claim in claims], columns=list(COLUMNS)).set_index("effect")


def records(claims: Sequence[Claim]) -> list[dict[str, object]]:
    """Return the claims for JSON: the cells of :data:`COLUMNS`, the estimate in numbers, and the smallest effect that matters."""
    return [
        {
            **dict(zip(COLUMNS, claim.row, strict=True)),
            "estimate": None if np.isnan(claim.estimate.mean) else {k: getattr(claim.estimate, k) for k in ("mean", "low", "high")},
            "smallest": claim.smallest,
        }
        for claim in claims
    ]


def plus(e: Effect, by: float) -> Effect:
    """Return an effect moved by a constant, as for "loses less than 3 points". Its p-value was against another value, so it is dropped."""
    return replace(e, mean=e.mean + by, low=e.low + by, high=e.high + by, p=np.nan)
