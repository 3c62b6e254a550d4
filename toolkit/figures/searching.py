"""Figure of rewards of tool calls: what each buys in accuracy, and its price in calls and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from toolkit.figures.base import COLOURS, CONTROL, error_bars, styled
from toolkit.figures.labels import bars, near, placed

SIZES = ((280, 300), (380, 330))  # pixels of a panel: on a phone, and beside the other panel
PRICES = {"calls": "calls per response", "tokens": "tokens written per response"}


def price_of_accuracy(arms: Mapping[str, Mapping[str, Any]], *, base: str, controls: Sequence[str] = ()) -> go.Figure:
    """Scatter plots of accuracy against calls and against tokens, one point per trained arm, with 95 % intervals. Up and left is better.

    Arms whose points touch share one label.

    Args:
        arms: Name of an arm -> ``accuracy``, ``calls`` and ``tokens``, each a dict with ``mean``, ``low`` and ``high``.
        base: Name of the arm that is drawn as a black star.
        controls: Names of the arms that are drawn in grey.
    """
    figure = make_subplots(1, len(PRICES), shared_yaxes=True, horizontal_spacing=0.04)
    names = list(arms)
    heights = [end for row in arms.values() for end in (row["accuracy"]["low"], row["accuracy"]["high"])]
    margin = 0.35 * (max(heights) - min(heights)) or 0.1
    y_range = (min(heights) - margin, max(heights) + margin)
    annotations = []
    for column, (price, title) in enumerate(PRICES.items(), 1):
        for i, (name, row) in enumerate(arms.items()):
            x, y = row[price], row["accuracy"]
            colour = "#000000" if name == base else CONTROL if name in controls else COLOURS[i % len(COLOURS)]
            symbol = "star" if name == base else "x" if name in controls else "circle"
            figure.add_scatter(
                x=[x["mean"]],
                y=[y["mean"]],
                error_x=error_bars([x["mean"]], [x["low"]], [x["high"]], colour),
                error_y=error_bars([y["mean"]], [y["low"]], [y["high"]], colour),
                mode="markers",
                marker={"size": 10, "color": colour, "symbol": symbol},
                name=name,
                showlegend=False,
                row=1,
                col=column,
            )
        ends = [end for row in arms.values() for end in (row[price]["low"], row[price]["high"])]
        spread = 0.25 * (max(ends) - min(ends)) or 0.1
        x_range = (min(ends) - spread, max(ends) + spread)
        points = [(row[price]["mean"], row["accuracy"]["mean"]) for row in arms.values()]
        axes = {"xref": f"x{column}" if column > 1 else "x", "yref": f"y{column}" if column > 1 else "y"}
        texts = [""] * len(names)
        for first, *others in near(points, x_range, y_range, SIZES[-1]):
            texts[first] = ", ".join(names[i] for i in (first, *others))
        lines = [line for row in arms.values() for line in bars(row[price], row["accuracy"])]
        annotations += [label | axes for label in placed(points, texts, x_range, y_range, lines=lines, sizes=SIZES)]
        figure.update_xaxes(title=title, range=x_range, zeroline=False, row=1, col=column)
    figure.update_yaxes(range=y_range, tickformat=".0%", zeroline=False)
    figure.update_yaxes(title="accuracy", col=1)
    return styled(figure, "What each reward buys, and its price", annotations=annotations)
