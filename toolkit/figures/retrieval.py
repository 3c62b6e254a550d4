"""Figures of retrieval heads, which copy from the prompt: how few there are, how stable their ranking is, and the effects of masking them.

Another figure, ``recall``, shows accuracy by the position of a hidden fact (a *needle*) in a long prompt. The depth of a needle is its
relative position in the prompt, from 0 (start) to 1 (end).
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from toolkit.figures.base import COLOURS, CONTROL, GREY, NEITHER, error_bars, styled


def recall(cells: pd.DataFrame) -> go.Figure:
    """Heat map of the share of right answers, by prompt length and by the depth (relative position in the prompt) of the hidden fact.

    Args:
        cells: Table with one row per length and depth. Columns: ``length`` (tokens), ``depth`` (0 to 1), ``correct`` (share of right
            answers, 0 to 1) and ``n`` (number of prompts).
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
        "yaxis": {"title": "depth of the needle in the prompt", "type": "category", "autorange": "reversed"},
    }
    return styled(figure, "Right answers by prompt length and depth of the needle", **axes)


def sparsity(table: pd.DataFrame) -> go.Figure:
    """Bar chart of the share of heads whose copy score is above 0.1, above 0.5, and zero, for several models.

    The copy score of a head is the share of the answer's distinct tokens that the head copies from the prompt (arXiv 2404.15574). There is
    one group of bars for each of the three cases, with one bar per model.

    Args:
        table: One row per model. Columns: ``model``, and ``above 0.1, above 0.5, zero`` (shares of all heads, 0 to 1). The first row, drawn
            in colour, is your model; the others, in grey, are published numbers.
    """
    figure = go.Figure()
    for i, name in enumerate(table["model"]):
        row = table.iloc[i][["above 0.1", "above 0.5", "zero"]]
        others = len(table) - 1
        group = str(name) if i == 0 else f"{others} published model{'s' * (others > 1)}"
        look = {"name": group, "legendgroup": group, "showlegend": i < 2, "marker_color": COLOURS[0] if i == 0 else GREY}
        figure.add_bar(x=row.index, y=row.to_numpy(float), hovertemplate=f"{name}: %{{y:.1%}}<extra></extra>", **look)
    return styled(figure, "Share of heads by copy score", barmode="group", yaxis={"tickformat": ".0%", "title": "share of heads"})


def stability(table: pd.DataFrame) -> go.Figure:
    """Line plot of the stability of the top heads against the number of examples, one line per score by which heads are ranked.

    An example is one response together with one hidden fact of its prompt. For each number n, the top heads on n random examples are
    compared with the top heads on all examples. Stability is the share
    of the former among the latter: 1 means the same heads. The number of top heads is that of ``jobs.retrieval``.

    Args:
        table: Table from ``jobs.retrieval.stability``. Columns: ``ranking`` (name of the score), ``n`` (number of examples) and ``overlap``
            (stability, 0 to 1).
    """
    figure = go.Figure()
    for i, (name, rows) in enumerate(table.groupby("ranking", sort=False)):
        figure.add_scatter(x=rows["n"], y=rows["overlap"], name=str(name), mode="lines+markers", line={"color": COLOURS[i]})
    axes = {
        "xaxis": {"title": "number of examples", "type": "log", "dtick": 1},
        "yaxis": {"title": "share of top heads<br>shared with all examples", "range": [0, 1.03]},
    }
    return styled(figure, "Stability of the top heads", **axes)


def masking_curve(table: pd.DataFrame) -> go.Figure:
    """Line plot of accuracy against the number of masked heads, one panel per score by which heads are ranked.

    One line is for masking the heads with the highest scores, the other for masking random heads of the same layers. The dotted line is the
    accuracy without a mask. Only one way of masking is shown, the published one: masked heads attend uniformly, and only while decoding.

    Args:
        table: Table from ``jobs.masking_effects``.
    """
    rows = table[(table["op"] == "uniform") & (table["during"] == "decode only")]
    names = list(rows["ranking"].unique())
    figure = make_subplots(rows=1, cols=len(names), subplot_titles=[f"ranked by {name}" for name in names], shared_yaxes=True)
    for column, name in enumerate(names, 1):
        part = rows[rows["ranking"] == name].sort_values("heads")
        lines = {"top heads": ("accuracy", "low", "high"), "random heads": ("random", "random_low", "random_high")}
        for (label, columns), colour in zip(lines.items(), (COLOURS[1], CONTROL), strict=True):
            line = {
                "mode": "lines+markers",
                "line": {"color": colour},
                "name": label,
                "legendgroup": label,
                "showlegend": column == 1,
            }
            hover = [f"{label}, {n:.0f} draws" for n in part["draws"]] if label == "random heads" and "draws" in part else None
            figure.add_scatter(
                x=part["heads"],
                y=part[columns[0]],
                hovertext=hover,
                error_y=_bars(part, *columns, colour),
                row=1,
                col=column,
                **line,
            )
        unmasked = float((part["accuracy"] + part["lost"]).iloc[0])  # accuracy without a mask; equal in all rows
        dotted = {
            "line": {"color": NEITHER, "dash": "dot"},
            "name": "unmasked",
            "legendgroup": "unmasked",
            "showlegend": column == 1,
        }
        ends = [part["heads"].min(), part["heads"].max()]
        figure.add_scatter(x=ends, y=[unmasked] * 2, mode="lines", **dotted, row=1, col=column)
    figure.update_xaxes(title="heads masked").update_yaxes(range=[0, 1.03])
    figure.update_yaxes(title="accuracy", row=1, col=1)
    return styled(figure, "Masking, as published (uniform attention, decode only)").update_layout(margin={"t": 90})


def masking_forms(table: pd.DataFrame) -> go.Figure:
    """Dot plot that compares masking the top heads with masking random heads, one row per way of masking.

    A way of masking is an operation (uniform attention, zero output or mean output), applied in decoding only or in prefill too. The
    horizontal axis is accuracy with random heads masked minus accuracy with the top heads masked: + means that the top heads matter more.
    Each score by which heads are ranked has its own colour. If several numbers of heads were masked, only the largest is shown. Error bars
    are 95 % intervals.

    Args:
        table: Table from ``jobs.masking_effects``.
    """
    # Reversed, because plotly draws the first row at the bottom.
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
        figure.add_scatter(x=part[columns[0]], y=labels[part.index], error_x=_bars(part, *columns, COLOURS[i]), **dots)
    figure.add_vline(x=0, line={"color": "black", "width": 1})
    axes = {
        "xaxis": {"title": "accuracy with random heads masked minus accuracy with top heads masked, 95 % interval"},
        "yaxis": {"automargin": True},
    }
    return styled(figure, "Other forms of masking", scattermode="group", **axes).update_layout(margin={"l": 20})


def thinking_or_not(table: pd.DataFrame) -> go.Figure:
    """Bar chart of the accuracy lost by masking heads, when the model thinks and when it answers directly; one panel per task.

    The loss is the accuracy with nothing masked minus the accuracy with the mask, both from 0 to 1. One bar is for masking the top
    retrieval heads, the other for masking equally many random heads of the same layers.

    Args:
        table: Table from ``jobs.thinking_or_not``.
    """
    rows = table[(table["masked"] != "nothing") & (table["mode"] != "thinking - directly")]  # the last: difference of the two modes
    names = list(rows["task"].unique())
    figure = make_subplots(rows=1, cols=len(names), subplot_titles=names, shared_yaxes=True)
    for column, task in enumerate(names, 1):
        for label, colour in (("top", COLOURS[1]), ("random", CONTROL)):
            part = rows[(rows["task"] == task) & (rows["masked"] == label)]
            bar = {"name": f"{label} heads", "legendgroup": label, "marker_color": colour, "showlegend": column == 1}
            figure.add_bar(
                x=part["mode"],
                y=part["lost"],
                error_y=_bars(part, "lost", "lost_low", "lost_high", NEITHER, 0.8),
                row=1,
                col=column,
                **bar,
            )
    figure.update_yaxes(title="accuracy lost", row=1, col=1)
    return styled(figure, "Accuracy loss from masking", barmode="group").update_layout(margin={"t": 90})


def _bars(rows: pd.DataFrame, mean: str, low: str, high: str, colour: str, opacity: float = 0.35) -> dict[str, Any]:
    """Return plotly's error bars from three columns of ``rows``."""
    return error_bars(rows[mean], rows[low], rows[high], colour, opacity=opacity)


def recall_by_length(table: pd.DataFrame) -> go.Figure:
    """Line plot of the share of right responses by prompt length, one line per condition, with 95 % intervals.

    Args:
        table: From ``jobs.length_table``: columns ``condition``, ``length``, ``recall``, ``recall_low`` and ``recall_high``.
    """
    figure = go.Figure()
    for i, (name, rows) in enumerate(table.groupby("condition", sort=False)):
        error = error_bars(rows["recall"], rows["recall_low"], rows["recall_high"], COLOURS[i % len(COLOURS)])
        figure.add_scatter(
            x=rows["length"],
            y=rows["recall"],
            error_y=error,
            name=str(name),
            mode="lines+markers",
            line={"color": COLOURS[i % len(COLOURS)]},
        )
    axes = {
        "xaxis": {"title": "prompt length", "type": "log"},
        "yaxis": {"title": "right responses", "tickformat": ".0%", "range": [0, 1.02]},
    }
    return styled(figure, "Recall by prompt length", **axes)
