"""Figure of interventions along an axis of difficulty, beside random controls."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from toolkit.figures.base import COLOURS, CONTROL, error_bars, styled

LINES = {
    "base": ("base", "#000000", "dot"),
    "random": ("random controls", CONTROL, "solid"),
    "treated": ("intervention", COLOURS[1], "solid"),
}
"""Column of the table -> ``(title in the legend, colour, dash)``."""


def axis_effects(table: pd.DataFrame, title: str, *, axis: str, unit: str = "right answers") -> go.Figure:
    """Line plots against the levels of an axis with 95 % intervals: one panel per intervention, beside base and its random controls.

    Args:
        table: Table from ``jobs.level_table``.
        title: Title of the figure.
        axis: Title of the horizontal axis.
        unit: Title of the vertical axis.
    """
    arms, order = list(table["arm"].unique()), [str(level) for level in table["level"].unique()]
    figure = make_subplots(rows=1, cols=len(arms), subplot_titles=arms, shared_yaxes=True, horizontal_spacing=0.02)
    figure.update_annotations(font_size=13)
    for column, arm in enumerate(arms, 1):
        rows = table[table["arm"] == arm]
        for name, (label, colour, dash) in LINES.items():
            figure.add_scatter(
                x=rows["level"].astype(str),
                y=rows[name],
                error_y=error_bars(rows[name], rows[f"{name}_low"], rows[f"{name}_high"], colour),
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                name=label,
                legendgroup=label,
                showlegend=column == 1,
                row=1,
                col=column,
            )
        # Half a category of room at both ends, so that the names of levels do not touch those of the next panel.
        ends = {"range": [-0.5, len(order) - 0.5], "tickfont": {"size": 11}}
        figure.update_xaxes(title=axis, type="category", categoryorder="array", categoryarray=order, **ends, row=1, col=column)
    shares = (table["unit"] == "share").all()
    figure.update_yaxes(**({"range": [-0.03, 1.03], "tickformat": ".0%"} if shares else {"rangemode": "tozero"}))
    figure.update_yaxes(title=unit, row=1, col=1)
    # Above the panels: beside them, the legend would take a panel's width.
    legend = {"orientation": "h", "yref": "container", "y": 0.97, "yanchor": "top", "x": 1, "xanchor": "right"}
    return styled(figure, title, legend=legend).update_layout(margin={"t": 100})
