"""Figures of length: of thinking (histogram, accuracy, differences from base, directions by layer) and of inputs (accuracy by length)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from toolkit.figures.base import COLOURS, GREY, LONG_COLOUR, SHORT_COLOUR, styled
from toolkit.types import Direction, Rollout


def length_distribution(rollouts: Sequence[Rollout], by=None) -> go.Figure:
    """Histogram of think length in tokens. The legend gives the number of rollouts in each class.

    Args:
        rollouts: Rollouts to count.
        by: Function from a rollout to its class: ``"short"``, ``"long"``, ``"right"``, ``"wrong"`` or ``None``. Each class has its own
            colour; rollouts with ``None`` are drawn in grey, as "in no class". Without the function, all rollouts have one colour.
    """
    labels = [(by(r) if by else None) or ("in no class" if by else "all") for r in rollouts]
    lengths = np.array([r.think_tokens for r in rollouts])
    colours = {"short": SHORT_COLOUR, "wrong": SHORT_COLOUR, "long": LONG_COLOUR, "right": LONG_COLOUR}
    size = max(1, round(lengths.max() / 60)) if len(lengths) else 1  # width of a bin in tokens: about 60 bins
    figure = go.Figure()
    # "short" first, then "long", then the rest.
    for label in sorted(set(labels), key=lambda name: (name != "short", name != "long", name)):
        members = lengths[[name == label for name in labels]]
        colour = colours.get(label, GREY)
        figure.add_histogram(x=members, name=f"{label} ({len(members)})", xbins={"size": size}, marker_color=colour)
    return styled(figure, "Think length", barmode="stack", xaxis_title="think tokens", yaxis_title="rollouts")


def by_layer(curves: Mapping[str, Sequence[float]], title: str, unit: str) -> go.Figure:
    """Line plot with one value per layer and one line per curve.

    An example of a curve is the distance between the hidden states of long and of short thinking in each layer.

    Args:
        curves: Name of a line -> one value per layer.
        title: Title of the figure.
        unit: Title of the vertical axis: what the values are, with their unit.
    """
    figure = go.Figure()
    for i, (name, values) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        figure.add_scatter(x=list(range(len(values))), y=list(values), name=name, mode="lines+markers", line={"color": colour})
    return styled(figure, title, xaxis={"title": "layer", "dtick": 1}, yaxis_title=unit)


def direction_norms(directions: Mapping[str, Direction]) -> go.Figure:
    """Line plot of the norms of directions, one line per direction. A direction has one vector per layer; the horizontal axis is the layer.

    Norms are in units of the residual stream.

    Args:
        directions: Name of a line -> direction, such as a direction of thinking length.
    """
    return by_layer({name: d.norms.tolist() for name, d in directions.items()}, "Norm of the direction", "|v|")


def length_accuracy(summary: pd.DataFrame) -> go.Figure:
    """Scatter plot of accuracy against think tokens, one point per condition, with 95 % intervals of both.

    Args:
        summary: Table from ``evaluate.summary``.
    """
    figure = go.Figure()
    wide = summary.pivot(index="condition", columns="metric", values=["mean", "low", "high"])
    for i, name in enumerate(summary["condition"].unique()):
        row = wide.loc[name]
        point: dict[str, Any] = {}
        for axis, metric in (("x", "think_tokens"), ("y", "accuracy")):
            mean, low, high = (row[part][metric] for part in ("mean", "low", "high"))
            point[axis] = [mean]
            point[f"error_{axis}"] = {
                "type": "data",
                "symmetric": False,
                "array": [high - mean],
                "arrayminus": [mean - low],
                "thickness": 1,
            }
        symbol = {"size": 11, "color": COLOURS[i % len(COLOURS)], "symbol": i // len(COLOURS)}
        figure.add_scatter(**point, name=name, mode="markers", marker=symbol)
    return styled(figure, "Accuracy against think length", xaxis_title="think tokens", yaxis_title="accuracy")


def differences(summary: pd.DataFrame, metric: str, *, base: str = "base") -> go.Figure:
    """Dot plot of paired differences from base (condition minus base) with 95 % intervals, one row per condition.

    A dot is grey if its interval contains zero, or has width 0 because nothing varies.

    Args:
        summary: Table from ``evaluate.summary``.
        metric: Name of the metric, a value in the column ``metric`` of ``summary``.
        base: Name of the base condition, which has no row in the plot.
    """
    # Reversed, because plotly draws the first row at the bottom.
    rows = summary[(summary["metric"] == metric) & (summary["condition"] != base)].iloc[::-1]
    low, high = rows["difference_low"], rows["difference_high"]
    clear = (low < high) & ((low > 0) | (high < 0))  # an interval of width 0 means that nothing varies, so the spread is unknown
    figure = go.Figure(
        go.Scatter(
            x=rows["difference"],
            y=rows["condition"],
            mode="markers",
            marker={"size": 10, "color": np.where(clear, COLOURS[0], GREY)},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": rows["difference_high"] - rows["difference"],
                "arrayminus": rows["difference"] - rows["difference_low"],
                "color": "#888888",
            },
        )
    )
    figure.add_vline(x=0, line={"color": "black", "width": 1})
    return styled(
        figure, f"{metric.replace('_', ' ')}: difference from {base}", xaxis_title=f"condition minus {base}, paired, 95 % interval"
    ).update_layout(yaxis={"automargin": True}, margin={"l": 20})


def accuracy_by_length(table: pd.DataFrame, *, metric: str = "exact") -> go.Figure:
    """Line plots of accuracy against test length with 95 % intervals: one panel per task, one line per encoding (without hints).

    A dotted line marks the longest trained length.

    Args:
        table: Table from ``jobs.length_tables.accuracies``.
        metric: Metric to draw: ``"exact"`` or ``"tokens"``.
    """
    rows = table[(table["metric"] == metric) & (table["hint"] == "none")]
    tasks, encodings = list(rows["task"].unique()), list(rows["encoding"].unique())
    figure = make_subplots(rows=1, cols=max(1, len(tasks)), subplot_titles=tasks, shared_yaxes=True)
    for column, task in enumerate(tasks, 1):
        for i, encoding in enumerate(encodings):
            line = rows[(rows["task"] == task) & (rows["encoding"] == encoding)].sort_values("length")
            error = {
                "type": "data",
                "symmetric": False,
                "array": line["high"] - line["mean"],
                "arrayminus": line["mean"] - line["low"],
                "thickness": 1,
            }
            look = {
                "name": encoding,
                "legendgroup": encoding,
                "showlegend": column == 1,
                "line": {"color": COLOURS[i % len(COLOURS)]},
            }
            figure.add_scatter(x=line["length"], y=line["mean"], error_y=error, mode="lines+markers", **look, row=1, col=column)
        trained = rows.loc[(rows["task"] == task) & (rows["multiple"] == 1), "length"].max()
        figure.add_vline(x=trained, line={"color": GREY, "dash": "dot"}, row=1, col=column)
        figure.update_xaxes(title="length", row=1, col=column)
    figure.update_yaxes(range=[-0.02, 1.02])
    figure.update_yaxes(title="accuracy" if metric == "exact" else "share of right tokens", row=1, col=1)
    return styled(figure, "Accuracy on longer inputs, by positional encoding").update_layout(margin={"t": 90})
