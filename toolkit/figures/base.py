"""Colours, error bars and layout that all figures share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import plotly.graph_objects as go

# Okabe and Ito's palette: distinguishable with every common colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#666666")
SHORT_COLOUR, LONG_COLOUR, GREY = COLOURS[1], COLOURS[0], "#BBBBBB"
BETTER, WORSE, NEITHER = COLOURS[0], COLOURS[1], "#444444"
"""Colours of a clear effect: blue if it is better, brown if it is worse, dark grey for metrics that are neither, such as lengths."""
CONTROL = "#999999"
"""Colour of random controls."""


def effect_colour(better: str, difference: float) -> str:
    """Return the colour of a clear difference from base.

    Args:
        better: ``Metric.better``: ``high``, ``low`` or ``none``.
        difference: Condition minus base.
    """
    if better == "none":
        return NEITHER
    return BETTER if (difference > 0) == (better == "high") else WORSE


def error_bars(
    mean: Iterable[Any], low: Iterable[Any], high: Iterable[Any], colour: str = NEITHER, *, opacity: float = 0.35
) -> dict[str, Any]:
    """Return plotly's error bars for values with intervals, as a light layer: thin, without caps, in a pale colour.

    Args:
        mean: The values.
        low: Lower ends of their intervals.
        high: Upper ends.
        colour: Colour as ``#rrggbb``, usually that of the marks.
        opacity: Opacity of the bars, 0 to 1.
    """
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    middle, least, most = (np.array(list(values), float) for values in (mean, low, high))
    look = {"thickness": 1.5, "width": 0, "color": f"rgba({red},{green},{blue},{opacity})"}
    return {"type": "data", "symmetric": False, "array": (most - middle).tolist(), "arrayminus": (middle - least).tolist(), **look}


def ticks(count: int) -> int:
    """Return the distance between the ticks of an axis of layers or heads, so that numbers do not overlap: 1, or 5 for more than 16.

    Args:
        count: Number of layers or heads.
    """
    return 1 if count <= 16 else 5


def styled(figure: go.Figure, title: str, note: str = "", /, **layout) -> go.Figure:
    """Apply the common layout to a figure in place, and return the figure.

    Args:
        title: Title of the figure.
        note: Line below the title that explains colours and symbols which no legend explains.
        layout: Further fields of plotly's layout.
    """
    below = {"subtitle": {"text": note, "font": {"size": 12, "color": "#555555"}}} if note else {}
    return figure.update_layout(
        title={"text": title, "x": 0, "xanchor": "left", "font": {"size": 16}, **below},
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 60, "r": 20, "t": 60 + 16 * bool(note), "b": 50},
        height=420,
        **layout,
    )
