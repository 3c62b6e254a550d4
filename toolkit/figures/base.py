"""Colours and layout that all figures share."""

from __future__ import annotations

import plotly.graph_objects as go

# Okabe and Ito's palette: distinguishable with every common colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#666666")
SHORT_COLOUR, LONG_COLOUR, GREY = COLOURS[1], COLOURS[0], "#BBBBBB"


def styled(figure: go.Figure, title: str, **layout) -> go.Figure:
    """Apply the common layout to a figure in place, and return the figure.

    Args:
        title: Title of the figure.
        layout: Further fields of plotly's layout.
    """
    return figure.update_layout(
        title={"text": title, "x": 0, "xanchor": "left", "font": {"size": 16}},
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 60, "r": 20, "t": 60, "b": 50},
        height=420,
        **layout,
    )
