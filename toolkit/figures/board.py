"""Figures of a board, the comparison of conditions in ``board.json``.

They show accuracy against length, shifts of hidden states, accuracy on chains of additions (``17+5-9=?``), differences from base (the
unchanged model), and the contribution of the short-thinking heads (those that ThinkEdit edits).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from toolkit.figures.base import COLOURS, GREY, styled

FAMILIES = {
    "base": ("base", "black", "star"),
    "edit": ("weight edits", COLOURS[1], "square"),
    "steer": ("steering", COLOURS[4], "diamond"),
    "mask": ("masked heads", COLOURS[6], "cross"),
    "decode": ("decoding", COLOURS[3], "triangle-up"),
    "prompt": ("prompt", COLOURS[5], "triangle-down"),
    "trained": ("trained (GRPO)", COLOURS[0], "circle"),
    "combined": ("combined", COLOURS[2], "hexagon"),
    "control": ("random controls", GREY, "x"),
}
"""Family of a condition -> ``(title in the legend, colour, plotly symbol)``."""

Board = Mapping[str, Any]
"""Content of ``board.json``."""


def _of(board: Board, family: str, metric: str = "accuracy") -> list[tuple[str, Mapping[str, Any]]]:
    """Return ``(name, entry)`` for the conditions of a family in ``board["conditions"]``. Conditions without the metric are left out."""
    return [(name, c) for name, c in board["conditions"].items() if c["family"] == family and metric in c["metrics"]]


def few_seeds(e: Mapping[str, Any]) -> bool:
    """Return True if an entry of the board belongs to a random or trained condition with fewer than three seeds, too few for a test.

    Args:
        e: Entry of ``board.json`` for one metric of a condition, or for its difference from base. With too few seeds, it has a ``note``
            such as ``"2 seeds"``.
    """
    return "seed" in e.get("note", "")


def _error(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return plotly's error bars for values with ``mean, low, high``."""
    up, down = [r["high"] - r["mean"] for r in rows], [r["mean"] - r["low"] for r in rows]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1}


def pareto(board: Board, *, labels: Sequence[str] = ()) -> go.Figure:
    """Scatter plot of accuracy against think tokens, one point per condition with 95 % intervals; colour and symbol show its family.

    Open symbols are random or trained conditions with fewer than three seeds, too few for a test.

    Args:
        board: Content of ``board.json``.
        labels: Conditions whose points are labelled with their names.
    """
    figure, few = go.Figure(), False
    for family, (title, colour, symbol) in reversed(FAMILIES.items()):  # base last, on top
        conditions = _of(board, family, "think_tokens")
        if not conditions:
            continue
        x, y = ([c["metrics"][m] for _, c in conditions] for m in ("think_tokens", "accuracy"))
        figure.add_scatter(
            x=[v["mean"] for v in x],
            y=[v["mean"] for v in y],
            error_x=_error(x) | {"color": colour},
            error_y=_error(y) | {"color": colour},
            text=[name if name in labels else "" for name, _ in conditions],
            hovertext=[name for name, _ in conditions],
            textposition="top center",
            textfont={"size": 11},
            mode="markers+text",
            name=title,
            marker={
                "size": 13 if family == "base" else 9,
                "color": colour,
                "symbol": [f"{symbol}-open" if few_seeds(v) else symbol for v in y],
            },
        )
        few |= any(few_seeds(v) for v in y)
    layout = {"xaxis_title": "think tokens", "yaxis_title": "accuracy", "yaxis_tickformat": ".0%", "legend_traceorder": "reversed"}
    means = [c["metrics"]["think_tokens"]["mean"] for c in board["conditions"].values() if "think_tokens" in c["metrics"]]
    # The space on the left is for labels, which are centred on their points.
    ranges = {
        "xaxis_range": [-0.16 * max(means), 1.2 * max(means)],
        "yaxis_range": [-0.04, 1.04],
    }  # a wide interval may end outside
    title = "Accuracy against think tokens" + few * " (open: fewer than three seeds, not tested)"
    return styled(figure, title, **layout, **ranges)


def state_shifts(board: Board) -> go.Figure:
    """Dot plot of the cosine between each condition's shift of hidden states and the direction of thinking length, one row per condition.

    Base and the condition read the same responses of base. The shift is the mean hidden state of the condition minus that of base. Hidden
    states are taken at the end of the residual stream, at the positions where a line of thinking begins. The direction of thinking length
    is ThinkEdit's (arXiv 2503.22048). A positive cosine means a shift towards longer thinking. Error bars are 95 % intervals.

    The grey bar shows cosines that occur by chance. To compute them, the direction is replaced 500 times by the difference between the mean
    hidden states of two random groups of responses. The bar is symmetric around 0 and contains 97.5 % of these cosines.

    Conditions of the families ``decode`` and ``prompt``, and conditions that change no hidden state, are left out.

    Args:
        board: Content of ``board.json``.
    """
    rows = [(name, c) for name, c in board["conditions"].items() if c.get("shift") and c["family"] not in ("decode", "prompt")]
    rows.sort(key=lambda row: row[1]["shift"]["cosine"])
    figure, names = go.Figure(), [name for name, _ in rows]
    bound = [c["shift"]["random"] for _, c in rows]
    # A bar from -bound to +bound: plotly takes its start (``base``) and its length.
    figure.add_bar(
        x=[2 * b for b in bound],
        y=names,
        base=[-b for b in bound],
        orientation="h",
        marker_color="#e5e5e5",
        name="random groups of responses, 97.5 %",
    )
    for family, (title, colour, symbol) in FAMILIES.items():
        conditions = [(name, c["shift"]) for name, c in rows if c["family"] == family]
        if conditions:
            values = [{"mean": s["cosine"], "low": s["low"], "high": s["high"]} for _, s in conditions]
            figure.add_scatter(
                x=[v["mean"] for v in values],
                y=[name for name, _ in conditions],
                error_x=_error(values),
                mode="markers",
                name=title,
                marker={"color": colour, "symbol": symbol, "size": 9},
            )
    figure = styled(
        figure,
        "Shift of hidden states on the same texts",
        xaxis={"title": "cosine with the length direction (+ longer)", "range": [-1.05, 1.05]},
    )
    return figure.update_layout(
        yaxis={"automargin": True, "categoryorder": "array", "categoryarray": names}, height=120 + 22 * len(rows)
    )


def chain_accuracy(board: Board) -> go.Figure:
    """Scatter plot of accuracy on chains of additions against p^H, the accuracy expected from single steps (arXiv 2509.09677).

    There is one point per condition. A chain of additions is a problem such as ``17+5-9=?``, which the model solves step by step. A step is
    right if its total follows from the previous total, even if that one is wrong.

    p is the share of right steps in all responses of the condition. H is the number of steps in its response to one problem, and p^H is
    averaged over problems. Below the diagonal, accuracy is lower than the single steps predict. Above it, accuracy is higher, for example
    because wrong steps are corrected.

    Args:
        board: Content of ``board.json``.
    """
    figure = go.Figure()
    for family, (title, colour, symbol) in FAMILIES.items():
        conditions = _of(board, family, "running_sum_expected")
        if conditions:
            x, y = ([c["metrics"][m] for _, c in conditions] for m in ("running_sum_expected", "accuracy_running_sum"))
            figure.add_scatter(
                x=[v["mean"] for v in x],
                y=[v["mean"] for v in y],
                hovertext=[name for name, _ in conditions],
                mode="markers",
                name=title,
                marker={"color": colour, "symbol": symbol, "size": 9},
            )
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"dash": "dot", "color": "#999999"}, name="as expected", hoverinfo="skip"
    )
    return styled(
        figure,
        "Chains of additions: accuracy against p^H",
        xaxis_title="p^H, expected from step accuracy p over H steps",
        yaxis_title="accuracy",
    )


def metric_differences(board: Board, metrics: Sequence[str]) -> go.Figure:
    """Heat map of paired differences from base (condition minus base), one row per condition and one column per metric.

    Differences are in percentage points. White cells have p >= .05 after Holm's correction, or no test. Numbers in brackets belong to
    random or trained conditions with fewer than three seeds, too few for a test.

    Args:
        board: Content of ``board.json``.
        metrics: Names of the metrics, one column each. They must be shares (0 to 1), such as ``"accuracy"``.
    """
    names = [name for name in board["conditions"] if name in board["paired"]]
    columns = [m for m in metrics if any(m in board["paired"][name] for name in names)]
    values = np.full((len(names), len(columns)), np.nan)
    text = [["" for _ in columns] for _ in names]
    for i, name in enumerate(names):
        for j, metric in enumerate(columns):
            d = board["paired"][name].get(metric)
            if d and d["mean"] is not None:
                text[i][j] = f"({100 * d['mean']:+.0f})" if few_seeds(d) else f"{100 * d['mean']:+.0f}"
                # The colour shows the difference only if it is significant; 0 is white.
                values[i, j] = d["mean"] if d["p_holm"] is not None and d["p_holm"] < 0.05 else 0.0
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=[board["metrics"][m]["label"] for m in columns],
            y=names,
            text=text,
            texttemplate="%{text}",
            textfont={"size": 10},
            colorscale=[(0, COLOURS[1]), (0.5, "white"), (1, COLOURS[0])],
            zmid=0,
            zmin=-1,
            zmax=1,
            showscale=False,
            hovertemplate="%{y}<br>%{x}: %{text} points<extra></extra>",
        )
    )
    figure = styled(
        figure, "Condition minus base, in points (coloured: p < .05 after Holm's correction; in brackets: fewer than three seeds)"
    )
    return figure.update_layout(
        yaxis={"autorange": "reversed", "automargin": True}, xaxis={"side": "top", "automargin": True}, height=160 + 20 * len(names)
    )


def head_change(board: Board) -> go.Figure:
    """Scatter plot of think tokens against how strongly the short-thinking heads write towards short thinking, one point per condition.

    Short-thinking heads are the heads that ThinkEdit (arXiv 2503.22048) would edit in base; they are the same for all conditions. The
    horizontal axis is the component of these heads' summed output along the direction of short thinking, in units of the residual stream.
    A positive value is towards shorter thinking. All conditions read the same responses of base. The value is a mean over the positions
    where a line of thinking begins.

    If a trained model thinks longer than base but has the same horizontal position, these heads do not explain the longer thinking.

    Args:
        board: Content of ``board.json``.
    """
    figure = go.Figure()
    for family, (title, colour, symbol) in FAMILIES.items():
        conditions = _of(board, family, "short_push")
        if conditions:
            figure.add_scatter(
                x=[c["metrics"]["short_push"]["mean"] for _, c in conditions],
                y=[c["metrics"]["think_tokens"]["mean"] for _, c in conditions],
                hovertext=[name for name, _ in conditions],
                mode="markers",
                name=title,
                marker={"color": colour, "symbol": symbol, "size": 9},
            )
    return styled(
        figure,
        "Think length against the contribution of the short-thinking heads",
        xaxis_title="contribution of base's short-thinking heads towards short thinking, same texts",
        yaxis_title="think tokens",
    )
