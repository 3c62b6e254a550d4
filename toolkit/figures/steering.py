"""Figures of steering along a direction: length and accuracy by strength (dose-response), damage by strength, and target lengths.

Signs of damage are responses that never close their thinking, responses that loop, and a higher perplexity of base's responses under the
steered model. All tables come from the module ``toolkit.doses``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from toolkit.figures.base import COLOURS, CONTROL, GREY, styled
from toolkit.verdicts import is_control

STRENGTH = "strength of steering: - towards shorter, + towards longer thinking"
"""Note below the titles of figures against strength: too long for the axes of panels side by side."""

Usable = Mapping[str, tuple[float, float]]
"""Name of a direction -> ``(lowest, highest)`` strength of its usable range.

In this range, responses close their thinking and avoid loops about as often as those of base; see ``doses.usable_range``.
"""


def dose_response(table: pd.DataFrame, *, usable: Usable = MappingProxyType({})) -> go.Figure:
    """Line plots of think tokens (left) and accuracy (right) against steering strength, with 95 % bands, one line per direction.

    Args:
        table: The field ``table`` of a ``doses.Doses``. Columns: ``direction, strength, metric, mean, low, high``. Metrics:
            ``think_tokens`` and ``accuracy``; others are not drawn.
        usable: Name of a direction -> ``(lowest, highest)`` strength of the range to shade, for example computed by
            ``doses.usable_range``. Directions that are not keys get no shading.
    """
    figure = _against_strength(table, {"think_tokens": "think tokens", "accuracy": "accuracy"}, usable)
    figure.update_yaxes(range=[-0.02, 1.02], tickformat=".0%", row=1, col=2)
    return styled(figure, "Dose-response of steering", STRENGTH).update_layout(margin={"t": 100})


def damage(table: pd.DataFrame, *, usable: Usable = MappingProxyType({})) -> go.Figure:
    """Line plots of three signs of damage against steering strength, with 95 % bands, one line per direction.

    The panels show the share of closed think spans, the share of responses that end in a loop, and the perplexity per token of base's
    responses under the steered model.

    Args:
        table: The field ``table`` of a ``doses.Doses``. Columns: ``direction, strength, metric, mean, low, high``. Metrics: ``closed``,
            ``looping`` and ``perplexity``; others are not drawn.
        usable: Name of a direction -> ``(lowest, highest)`` strength of the range to shade, for example computed by
            ``doses.usable_range``. Directions that are not keys get no shading.
    """
    panels = {"closed": "closed think spans", "looping": "loops", "perplexity": "perplexity of base's responses"}
    figure = _against_strength(table, panels, usable)
    for column in (1, 2):
        figure.update_yaxes(range=[-0.02, 1.02], tickformat=".0%", row=1, col=column)
    figure.update_yaxes(type="log", row=1, col=3)
    return styled(figure, "Damage by steering", STRENGTH).update_layout(margin={"t": 100})


def _against_strength(table: pd.DataFrame, panels: Mapping[str, str], usable: Usable) -> go.Figure:
    """Return a figure with one panel per metric (``panels``: metric -> title) and one line per direction. Random directions are grey."""
    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=tuple(panels.values()), horizontal_spacing=0.1)
    for i, (name, part) in enumerate(table.groupby("direction", sort=False)):
        colour = CONTROL if is_control(str(name)) else COLOURS[i % len(COLOURS)]
        for column, metric in enumerate(panels, 1):
            rows = part[part["metric"] == metric].sort_values("strength")
            band = {"fill": "toself", "fillcolor": colour, "opacity": 0.15, "line": {"width": 0}, "hoverinfo": "skip"}
            # The band is a closed polygon: along the upper ends, then back along the lower ends.
            outline = [*rows["high"], *rows["low"][::-1]]
            shared = {"legendgroup": str(name), "row": 1, "col": column}
            figure.add_scatter(
                x=[*rows["strength"], *rows["strength"][::-1]], y=outline, showlegend=False, mode="lines", **band, **shared
            )
            line = {"mode": "lines+markers", "line": {"color": colour}, "name": str(name), "showlegend": column == 1}
            figure.add_scatter(x=rows["strength"], y=rows["mean"], **line, **shared)
            if name in usable:
                low, high = usable[str(name)]
                figure.add_vrect(x0=low, x1=high, fillcolor=colour, opacity=0.07, line_width=0, row=1, col=column)
    figure.update_annotations(font_size=13)
    return figure.update_xaxes(title="strength")


def target_lengths(table: pd.DataFrame) -> go.Figure:
    """Line plots that show how well steering hits target lengths. The horizontal axis is the target length in think tokens.

    For each target, one of the measured steering strengths is chosen: the one whose mean think length is closest to the target. The left
    panel shows this mean; the dotted line is where it would equal the target. The right panel shows the share of responses whose think
    length is within 20 % of the target, for the steered model and for base.

    Args:
        table: Table from ``doses.targets``.
    """
    figure = make_subplots(rows=1, cols=2, subplot_titles=("mean think tokens", "responses within 20 %"), horizontal_spacing=0.1)
    line = {"mode": "lines+markers", "line": {"color": COLOURS[0]}, "name": "steered"}
    figure.add_scatter(x=table["target"], y=table["mean"], row=1, col=1, **line)
    exact = {"mode": "lines", "line": {"color": GREY, "dash": "dot"}, "name": "target"}
    figure.add_scatter(x=table["target"], y=table["target"], row=1, col=1, **exact)
    # Percent in the table, shares in the figure.
    figure.add_scatter(x=table["target"], y=table["flexible"] / 100, row=1, col=2, showlegend=False, **line)
    base = {"mode": "lines+markers", "line": {"color": COLOURS[1]}, "name": "base"}
    figure.add_scatter(x=table["target"], y=table["base_flexible"] / 100, row=1, col=2, **base)
    figure.update_xaxes(title="target think tokens")
    figure.update_yaxes(range=[-0.02, 1.02], tickformat=".0%", row=1, col=2)
    return styled(figure, "Target lengths by strength").update_layout(margin={"t": 90})
