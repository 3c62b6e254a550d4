"""Retrieval heads: recall of needles, sparsity and stability of the heads, and the effect of masking them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from toolkit.figures.base import COLOURS, NEITHER, styled


def recall(cells: pd.DataFrame) -> go.Figure:
    """Heat map of the share of right answers by prompt length and depth of the needle.

    Args:
        cells: Columns ``length`` (tokens), ``depth`` (0 to 1), ``correct`` (0 to 1) and ``n`` (prompts).
    """
    wide, counts = (cells.pivot(index="depth", columns="length", values=name) for name in ("correct", "n"))
    figure = go.Figure(
        go.Heatmap(
            x=[f"{length:g}" for length in wide.columns],
            y=[f"{depth:.0%}" for depth in wide.index],
            z=wide.to_numpy(),
            customdata=counts.to_numpy(),
            zmin=0,
            zmax=1,
            colorscale="Viridis",
            xgap=2,
            ygap=2,
            colorbar={"title": "right", "tickformat": ".0%"},
            hovertemplate="%{x} tokens, depth %{y}: %{z:.0%} of %{customdata}<extra></extra>",
        )
    )
    axes = {
        "xaxis": {"title": "prompt length (tokens)", "type": "category"},
        "yaxis": {"title": "depth", "type": "category", "autorange": "reversed"},
    }
    return styled(figure, "Recall by length and depth", **axes)


def sparsity(table: pd.DataFrame) -> go.Figure:
    """Shares of heads with a copy score above 0.1, above 0.5 and at zero.

    Args:
        table: One row per model, columns ``model, above 0.1, above 0.5, zero``. The first row is ours, the others are published.
    """
    figure = go.Figure()
    for i, name in enumerate(table["model"]):
        row = table.iloc[i][["above 0.1", "above 0.5", "zero"]]
        figure.add_bar(x=row.index, y=row.to_numpy(float), name=name, marker_color=COLOURS[0] if i == 0 else NEITHER)
    return styled(figure, "Share of heads by copy score", barmode="group", yaxis={"tickformat": ".0%", "title": "share of heads"})


def stability(table: pd.DataFrame) -> go.Figure:
    """Overlap of the top heads from n examples with those from all examples, one line per ranking.

    Args:
        table: Columns ``ranking, n, overlap`` (0 to 1).
    """
    figure = go.Figure()
    for i, (name, rows) in enumerate(table.groupby("ranking", sort=False)):
        figure.add_scatter(x=rows["n"], y=rows["overlap"], name=str(name), mode="lines+markers", line={"color": COLOURS[i]})
    axes = {"xaxis": {"title": "examples", "type": "log", "dtick": 1}, "yaxis": {"title": "overlap with all", "range": [0, 1.03]}}
    return styled(figure, "Stability of the top heads", **axes)


def masking_curve(table: pd.DataFrame) -> go.Figure:
    """Accuracy against the number of heads masked as published, beside random heads of the same layers, one panel per ranking."""
    rows = table[(table["op"] == "uniform") & (table["during"] == "decode only")]
    names = list(rows["ranking"].unique())
    figure = make_subplots(rows=1, cols=len(names), subplot_titles=[f"ranked by {name}" for name in names], shared_yaxes=True)
    for column, name in enumerate(names, 1):
        part = rows[rows["ranking"] == name].sort_values("heads")
        lines = {"top heads": ("accuracy", "low", "high"), "random heads": ("random", "random_low", "random_high")}
        for (label, columns), colour in zip(lines.items(), (COLOURS[1], COLOURS[7]), strict=True):
            line = {
                "mode": "lines+markers",
                "line": {"color": colour},
                "name": label,
                "legendgroup": label,
                "showlegend": column == 1,
            }
            hover = [f"{label}, {n:.0f} draws" for n in part["draws"]] if label == "random heads" and "draws" in part else None
            figure.add_scatter(
                x=part["heads"], y=part[columns[0]], hovertext=hover, error_y=_bars(part, *columns), row=1, col=column, **line
            )
        unmasked = float((part["accuracy"] + part["lost"]).iloc[0])
        figure.add_hline(y=unmasked, line={"color": NEITHER, "dash": "dot"}, row=1, col=column)
    figure.update_xaxes(title="heads masked").update_yaxes(range=[0, 1.03])
    figure.update_yaxes(title="accuracy", row=1, col=1)
    return styled(figure, "Masking, as published (uniform attention, decode only)").update_layout(margin={"t": 90})


def masking_forms(table: pd.DataFrame) -> go.Figure:
    """Accuracy loss from masking minus that from random heads, by operation and phase, at each ranking's largest number of heads."""
    rows = table[table["heads"] == table.groupby("ranking")["heads"].transform("max")].iloc[::-1]
    labels = rows["op"] + ", " + rows["during"]
    figure = go.Figure()
    for i, (name, part) in enumerate(rows.groupby("ranking", sort=False)):
        columns = ("more_than_random", "more_than_random_low", "more_than_random_high")
        dots: dict[str, Any] = {
            "mode": "markers",
            "marker": {"size": 10, "color": COLOURS[i]},
            "name": f"{name}, {part['heads'].iloc[0]} heads",
        }
        figure.add_scatter(x=part[columns[0]], y=labels[part.index], error_x=_bars(part, *columns), **dots)
    figure.add_vline(x=0, line={"color": "black", "width": 1})
    axes = {"xaxis": {"title": "accuracy lost more than with random heads, 95 % interval"}, "yaxis": {"automargin": True}}
    return styled(figure, "Other forms of masking", scattermode="group", **axes).update_layout(margin={"l": 20})


def thinking_or_not(table: pd.DataFrame) -> go.Figure:
    """Accuracy loss from masking with thinking and with direct answers, one panel per task."""
    rows = table[(table["masked"] != "nothing") & (table["mode"] != "thinking - directly")]
    names = list(rows["task"].unique())
    figure = make_subplots(rows=1, cols=len(names), subplot_titles=names, shared_yaxes=True)
    for column, task in enumerate(names, 1):
        for label, colour in (("top", COLOURS[1]), ("random", COLOURS[7])):
            part = rows[(rows["task"] == task) & (rows["masked"] == label)]
            bar = {"name": f"{label} heads", "legendgroup": label, "marker_color": colour, "showlegend": column == 1}
            figure.add_bar(
                x=part["mode"], y=part["lost"], error_y=_bars(part, "lost", "lost_low", "lost_high"), row=1, col=column, **bar
            )
    figure.update_yaxes(title="accuracy lost", row=1, col=1)
    return styled(figure, "Accuracy loss from masking", barmode="group").update_layout(margin={"t": 90})


def _bars(rows: pd.DataFrame, mean: str, low: str, high: str) -> dict[str, Sequence[float] | bool | int | str]:
    return {
        "type": "data",
        "symmetric": False,
        "array": (rows[high] - rows[mean]).tolist(),
        "arrayminus": (rows[mean] - rows[low]).tolist(),
        "thickness": 1,
    }
