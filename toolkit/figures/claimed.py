"""Figure of published effects: the measured effect of each claim, in units of the smallest effect that matters."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from toolkit.claims import Claim
from toolkit.figures.base import BETTER, CONTROL, WORSE, error_bars, styled

VERDICTS = {"reproduced": BETTER, "contradicted": WORSE}
"""Verdict -> colour; dots of other verdicts are open and grey."""


def claimed(claims: Sequence[Claim]) -> go.Figure:
    """Dot plot of measured effects, one row per claim, with 95 % intervals.

    An effect is divided by the smallest effect that matters (``Claim.smallest``), so that claims with different units share an axis: 1 is an
    effect that just matters, and + is the direction that the paper claims. If a claim names a limit (``Claim.beyond``), the limit is
    subtracted first; if such a claim has no smallest effect, the size of the limit is the unit. Blue is reproduced, brown is contradicted; open grey dots have another verdict, and grey crosses compare with a random
    control. Claims without an estimate or without a unit are left out.

    Args:
        claims: Claims with their measurements.
    """
    rows = [c for c in claims if c.estimate.mean == c.estimate.mean and _unit(c)][::-1]  # plotly draws the first row at the bottom
    scaled = [[(end - c.beyond) / _unit(c) for end in (c.estimate.mean, c.estimate.low, c.estimate.high)] for c in rows]
    mean, low, high = zip(*scaled, strict=True) if scaled else ((), (), ())
    colours = [CONTROL if c.source == "control" else VERDICTS.get(c.verdict, "#777777") for c in rows]
    symbols = [("x" if c.source == "control" else "circle") + "-open" * (c.verdict not in VERDICTS) for c in rows]
    dots = {"size": 10, "color": colours, "symbol": symbols, "line": {"width": 1.5, "color": colours}}
    names = [c.text for c in rows]
    hover = [f"{c.verdict}, {c.source}" for c in rows]
    figure = go.Figure(
        go.Scatter(x=mean, y=names, mode="markers", marker=dots, hovertext=hover, error_x=error_bars(mean, low, high, opacity=0.45))
    )
    figure.add_vline(x=0, line={"color": "black", "width": 1})
    figure.add_vline(x=1, line={"color": "#999999", "width": 1, "dash": "dot"})
    note = "blue: reproduced; brown: contradicted; open: another verdict; crosses: against a random control"
    axis = {"title": "effect in units of the smallest that matters (+ as claimed)"}
    framed = styled(figure, "Published effects, measured here", note, xaxis=axis, yaxis={"automargin": True})
    return framed.update_layout(margin={"l": 20}, height=166 + 26 * len(rows))


def _unit(claim: Claim) -> float:
    """Return the size by which a claim's effect is divided; 0 if it has none."""
    return claim.smallest or abs(claim.beyond)
