"""Compare published effects with our measurements: each effect gets a verdict, such as "reproduced".

Every effect is signed so that + is the direction that the paper claims. The field ``smallest`` of a ``Claim`` says how large an effect must
be to matter; it is a choice, not taken from the paper. ``Claim.detectable`` is the size of an effect that the measurement would detect with
80 % power; ``Claim.power`` is the probability that it detects an effect of the smallest size that matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special

from toolkit.metrics import with_interval
from toolkit.stats import Effect, Estimate

LIMIT = 1.96  # size, in standard errors, from which an effect is detected at the 5 % level
POWER = LIMIT + 0.84  # size, in standard errors, of an effect that is detected with 80 % power at the 5 % level
UNITS = {"points": "share"}  # unit of a claim -> name of the unit in ``with_interval``, if the two differ
COLUMNS = ("effect", "from", "estimate (+ as claimed)", "verdict", "detectable with 80 % power")
"""Columns of ``verdict_table``: text of the claim, its source, the estimate with its interval, the verdict, and ``Claim.detectable``."""
CONTROLS = (
    "A difference from a random control is one from the mean of its draws: the interval holds the uncertainty of this mean, not the spread of "
    "single draws."
)
"""The sentence that explains comparisons with random controls, for legends of tables."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published effect and its measurement.

    Attributes:
        text: The claim in words.
        source: Paper that makes the claim, or ``control`` for a comparison with a random control.
        estimate: The measured effect with its 95 % interval; positive if it has the claimed direction.
        smallest: Smallest value of ``estimate - beyond`` (see ``beyond``) that counts as an effect; a choice, not taken from the paper.
        unit: Unit in which the effect is shown: ``tokens``, ``nats``, ``correlation``, or ``points`` (percentage points). For ``points``,
            ``estimate``, ``smallest`` and ``beyond`` are shares: 0.03 is shown as 3.0 points.
        beyond: Value that ``estimate`` exceeds if the claim is right. 0 for the claim "there is an effect in this direction"; -0.03 for
            the claim "accuracy falls by less than 3 points".
        missing: Why nothing could be measured; "" if it was. ``estimate`` is then NaN.
    """

    text: str
    source: str
    estimate: Estimate
    smallest: float
    unit: str
    beyond: float = 0.0
    missing: str = ""

    @property
    def verdict(self) -> str:
        """The verdict as text.

        Each line below has a verdict (left) and a condition (right). The first line whose condition holds gives the verdict. ``low`` and
        ``high`` are the ends of the interval of ``estimate - beyond``. ``smallest`` is the smallest value of this difference that counts
        as an effect::

            not measured                    ``missing`` says why
            not judged: 2 seeds             the note of ``estimate`` says that a condition has too few seeds: fewer than three, here two
            undecided                       there is no interval (NaN), its width is 0, or the estimate lies outside it
            reproduced                      0 < low,  high >= smallest
            real but too small to matter    0 < low,  high <  smallest
            contradicted                    high < 0, low <= -smallest
            not reproduced                  high < smallest
            undecided                       all other intervals

        >>> Claim(text="longer", source="", estimate=Estimate(3.0, 1.0, 5.0), smallest=2.0, unit="tokens").verdict
        'reproduced'
        """
        if self.missing:
            return "not measured"
        note = self.estimate.note if isinstance(self.estimate, Effect) else ""
        if "seed" in note:  # the note of an effect names the seeds only if they are too few
            return f"not judged: {note}"
        low, high = self.estimate.low - self.beyond, self.estimate.high - self.beyond
        rounding = 1e-9 * (high - low)
        if np.isnan(low) or low == high or not low - rounding <= self.estimate.mean - self.beyond <= high + rounding:
            return "undecided"
        if low > 0:
            return "reproduced" if high >= self.smallest else "real but too small to matter"
        if high < 0 and low <= -self.smallest:
            return "contradicted"
        return "not reproduced" if high < self.smallest else "undecided"

    @property
    def detectable(self) -> float:
        """Size of an effect that would be detected with 80 % power (at the 5 % level), in the unit of ``estimate``.

        This is 2.8 standard errors of the estimate, computed from the width of its interval. It is 0 if the interval has width 0.
        """
        return POWER * self._standard_error

    @property
    def power(self) -> float:
        """Probability (0 to 1) that an effect of the smallest size that matters is detected, at the 5 % level, in either direction.

        For a claim with a limit (``beyond``) and no smallest effect, it is the probability to tell no effect at all from an effect at the
        limit. It is NaN if there is no such size, or if the interval has width 0.

        >>> claim = Claim(text="longer", source="", estimate=Estimate(3.0, 1.04, 4.96), smallest=2.8, unit="tokens")
        >>> round(claim.power, 2)  # the smallest effect is 2.8 standard errors
        0.8
        """
        size, error = self.smallest or abs(self.beyond), self._standard_error
        if not (size and error > 0):
            return float("nan")
        return float(special.ndtr(size / error - LIMIT) + special.ndtr(-size / error - LIMIT))

    @property
    def _standard_error(self) -> float:
        return (self.estimate.high - self.estimate.low) / (2 * LIMIT)  # a 95 % interval is 2 x 1.96 standard errors wide

    @property
    def row(self) -> tuple[str, str, str, str, str]:
        """Row of ``verdict_table`` for this claim: text cells in the order of ``COLUMNS``."""
        unit = UNITS.get(self.unit, self.unit)
        e = self.estimate
        digits = 2 if self.unit in ("nats", "correlation") else 1
        effect = "" if self.missing else f"{with_interval(e.mean, e.low, e.high, unit, sign='+', digits=digits)} {self.unit}"
        scale = 100 if self.unit == "points" else 1
        power = f"{scale * self.detectable:.{digits}f}" if self.detectable > 0 else "unknown"
        return self.text, self.source, effect, self.verdict, power


def verdict_table(claims: Sequence[Claim]) -> pd.DataFrame:
    """Return a table of text cells with one row per claim, indexed by the claim's text. ``COLUMNS`` lists the columns."""
    return pd.DataFrame([claim.row for claim in claims], columns=list(COLUMNS)).set_index("effect")


def json_records(claims: Sequence[Claim]) -> list[dict[str, object]]:
    """Return one dict per claim for JSON.

    Keys: those of ``COLUMNS`` (text cells), ``"estimate"`` (a dict of the numbers ``mean, low, high``; ``None`` if there is no estimate),
    and ``"smallest", "beyond", "unit", "power", "missing"`` (the attributes of ``Claim``; ``None`` where they are NaN).
    """
    return [
        {
            **dict(zip(COLUMNS, claim.row, strict=True)),
            "estimate": None if np.isnan(claim.estimate.mean) else {k: getattr(claim.estimate, k) for k in ("mean", "low", "high")},
            "smallest": claim.smallest,
            "beyond": claim.beyond,
            "unit": claim.unit,
            "power": None if np.isnan(claim.power) else claim.power,
            "missing": claim.missing,
        }
        for claim in claims
    ]
