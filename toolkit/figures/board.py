"""Figures of a board, the comparison of conditions in ``board.json``.

They show accuracy against length, shifts of hidden states, accuracy on chains of additions (``17+5-9=?``), differences from base (the
unchanged model), and the contribution of the short-thinking heads (those that ThinkEdit edits).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from toolkit.figures.base import BETTER, COLOURS, GREY, WORSE, error_bars, styled
from toolkit.figures.labels import bars, placed

FAMILIES = {
    "base": ("base", "#000000", "star"),
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


def _bars(rows: Sequence[Mapping[str, float]], colour: str) -> dict[str, Any]:
    """Return plotly's error bars for values with ``mean, low, high``."""
    return error_bars([row["mean"] for row in rows], [row["low"] for row in rows], [row["high"] for row in rows], colour)


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
            error_x=_bars(x, colour),
            error_y=_bars(y, colour),
            hovertext=[name for name, _ in conditions],
            mode="markers",
            name=title,
            marker={
                "size": 13 if family == "base" else 9,
                "color": colour,
                "symbol": [f"{symbol}-open" if few_seeds(v) else symbol for v in y],
            },
        )
        few |= any(few_seeds(v) for v in y)
    title = "Accuracy against think tokens" + few * " (open: fewer than three seeds, not tested)"
    return _framed(figure, board, title, labels).update_layout(legend_traceorder="reversed")


def highlighted(board: Board, names: Sequence[str], *, labels: Sequence[str] = ()) -> go.Figure:
    """Scatter plot of accuracy against think tokens that shows a few conditions in colour, and all others in grey.

    Base is a dark star, random controls are grey crosses, and any other condition is a small grey dot. Error bars (95 %) belong to base and
    to the conditions in colour. There is no legend: names stand at the points.

    Args:
        board: Content of ``board.json``.
        names: Conditions in colour, labelled with their names.
        labels: Further conditions whose points are labelled with their names.
    """
    points = {name: c["metrics"] for name, c in board["conditions"].items() if "think_tokens" in c["metrics"]}
    base, figure = board.get("base", "base"), go.Figure()
    looks = {name: (colour, "circle", 13) for name, colour in zip(names, (COLOURS[0], COLOURS[2], *COLOURS[3:]), strict=False)} | {
        base: ("#333333", "star", 15)
    }
    controls = [name for name in points if board["conditions"][name]["family"] == "control" and name not in looks]
    others = [name for name in points if name not in looks and name not in controls]
    grey = ((others, "#C4C4C4", "circle", 7), (controls, "#888888", "x", 8))
    chosen = (((name,), *looks[name]) for name in (*names, base) if name in points)
    for members, colour, symbol, size in (*grey, *chosen):
        x, y = ([points[name][m] for name in members] for m in ("think_tokens", "accuracy"))
        bars = {} if members is others or members is controls else {"error_x": _bars(x, colour), "error_y": _bars(y, colour)}
        mark = {"color": colour, "symbol": symbol, "size": size}
        place = {"x": [v["mean"] for v in x], "y": [v["mean"] for v in y], "hovertext": list(members)}
        figure.add_scatter(**place, **bars, mode="markers", marker=mark, name=members[0] if len(members) == 1 else "")
    title = "Accuracy against think tokens (crosses: random controls; dots: other conditions)"
    framed = _framed(figure, board, title, (*names, base, *labels)).update_layout(showlegend=False)
    for annotation in framed.layout.annotations:
        colour = looks.get(annotation.name, ("#666666",))[0]
        annotation.font.color = colour
        if annotation.name in names:
            annotation.text = f"<b>{annotation.text}</b>"
    return framed


def _framed(figure: go.Figure, board: Board, title: str, labels: Sequence[str]) -> go.Figure:
    """Give a plot of accuracy against think tokens its axes, its title, and labels that cover no point and no other label."""
    metrics = {name: c["metrics"] for name, c in board["conditions"].items() if "think_tokens" in c["metrics"]}
    names = [*(name for name in labels if name in metrics), *(name for name in metrics if name not in labels)]
    points = [(metrics[name]["think_tokens"]["mean"], metrics[name]["accuracy"]["mean"]) for name in names]
    x, y = ([_whole(metrics[name][metric]) for name in names] for metric in ("think_tokens", "accuracy"))
    x_range, y_range = _around(x), _around(y)
    lines = [line for across, up in zip(x, y, strict=True) for line in bars(across, up)]
    axes = {
        "xaxis": {"title": "think tokens", "range": x_range, "zeroline": False},
        "yaxis": {"title": "accuracy", "range": y_range, "tickformat": ".0%", "zeroline": False},
    }
    texts = [name if name in labels else "" for name in names]
    return styled(figure, title, annotations=placed(points, texts, x_range, y_range, lines=lines), **axes)


def _whole(e: Mapping[str, Any]) -> dict[str, float]:
    """Return ``mean, low, high`` of an entry of the board. An interval that could not be computed is ``None`` there; here it has width 0."""
    return {end: float(e["mean"] if e[end] is None else e[end]) for end in ("mean", "low", "high")}


def _around(values: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """Return the ends of an axis around values with ``mean, low, high``. A wide interval may end outside.

    The interval of a condition with two seeds can be many times as wide as all means lie apart.
    """
    least, most = min((v["mean"] for v in values), default=0.0), max((v["mean"] for v in values), default=1.0)
    reach = (most - least) or 0.1 * abs(most) or 1.0
    low = max(min((v["low"] for v in values), default=least), least - reach)
    high = min(max((v["high"] for v in values), default=most), most + reach)
    room = 0.1 * (high - low or reach)  # for names
    return low - room, high + room


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
                error_x=_bars(values, colour),
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
        yaxis={"title": "accuracy", "tickformat": ".0%"},
    )


def metric_differences(board: Board, metrics: Sequence[str]) -> go.Figure:
    """Heat map of paired differences from base (condition minus base), one row per condition and one column per metric.

    Differences are in percentage points. Blue cells are better than base, brown cells are worse, whether the metric is better high or low;
    grey cells belong to metrics that are neither. White cells have p >= .05 after Holm's correction, or no test. Numbers in brackets belong
    to random or trained conditions with fewer than three seeds, too few for a test.

    Args:
        board: Content of ``board.json``.
        metrics: Names of the metrics, one column each. They must be shares (0 to 1), such as ``"accuracy"``.
    """
    names = [name for name in board["conditions"] if name in board["paired"]]
    columns = [m for m in metrics if any(m in board["paired"][name] for name in names)]
    # Two heat maps, one over the other: metrics with a better direction, and the others.
    directed, plain = np.full((2, len(names), len(columns)), np.nan)
    signed, unsigned = ([[""] * len(columns) for _ in names] for _ in range(2))
    for i, name in enumerate(names):
        for j, metric in enumerate(columns):
            d, better = board["paired"][name].get(metric), board["metrics"][metric]["better"]
            if d and d["mean"] is not None:
                values, texts = (plain, unsigned) if better == "none" else (directed, signed)
                texts[i][j] = f"({100 * d['mean']:+.0f})" if few_seeds(d) else f"{100 * d['mean']:+.0f}"
                # The colour shows the difference only if it is significant; 0 is white.
                shown = d["mean"] if d["p_holm"] is not None and d["p_holm"] < 0.05 else 0.0
                values[i, j] = -shown if better == "low" else shown
    labels = [_lines(board["metrics"][m]["label"]) for m in columns]
    shared = {
        "x": labels,
        "y": names,
        "texttemplate": "%{text}",
        "textfont": {"size": 10},
        "showscale": False,
        "hoverongaps": False,
    }
    shared |= {"hovertemplate": "%{y}<br>%{x}: %{text} points<extra></extra>"}
    scale = {"colorscale": [(0, WORSE), (0.5, "white"), (1, BETTER)], "zmin": -1, "zmax": 1}
    greys = {"colorscale": [(0, "white"), (1, "#888888")], "zmin": 0, "zmax": 1}
    figure = go.Figure(
        [go.Heatmap(z=directed, text=signed, **scale, **shared), go.Heatmap(z=np.abs(plain), text=unsigned, **greys, **shared)]
    )
    note = "blue: better; brown: worse; grey: neither; white: not significant (p ≥ .05, Holm) or not tested"
    rows = max((label.count("<br>") + 1 for label in labels), default=1)
    figure = styled(figure, "Condition minus base, in points", note)
    return figure.update_layout(
        title={"y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 10}},
        yaxis={"autorange": "reversed", "automargin": True},
        xaxis={"side": "top", "tickangle": 0, "tickfont": {"size": 10}},
        margin={"t": 68 + 15 * rows, "b": 10},
        height=88 + 15 * rows + 20 * len(names),
        meta={"least_width": 260 + 66 * len(columns)},
    )


def _lines(label: str) -> str:
    """Return a label with line breaks, at most about ten characters per line."""
    return "<br>".join(textwrap.wrap(label, 10, break_long_words=False))


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
