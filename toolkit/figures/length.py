"""Figures of length: of thinking (histogram, accuracy, differences from base, directions by layer) and of inputs (accuracy by length)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from toolkit.figures.base import (
    BETTER,
    COLOURS,
    CONTROL,
    GREY,
    LONG_COLOUR,
    NEITHER,
    SHORT_COLOUR,
    WORSE,
    effect_colour,
    error_bars,
    styled,
    ticks,
)
from toolkit.figures.labels import bars, placed
from toolkit.metrics import described
from toolkit.types import Direction, Rollout
from toolkit.verdicts import Change, is_control

NAMED = 3  # most random controls whose names stand in a scatter plot


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
    layers = max(map(len, curves.values()), default=1)
    axis = {"title": "layer", "dtick": ticks(layers), "range": [-0.5, layers - 0.5]}
    return styled(figure, title, xaxis=axis, yaxis_title=unit)


def direction_norms(directions: Mapping[str, Direction]) -> go.Figure:
    """Line plot of the norms of directions, one line per direction. A direction has one vector per layer; the horizontal axis is the layer.

    Norms are in units of the residual stream.

    Args:
        directions: Name of a line -> direction, such as a direction of thinking length.
    """
    return by_layer({name: d.norms.tolist() for name, d in directions.items()}, "Norm of the direction", "|v|")


def length_accuracy(summary: pd.DataFrame, *, base: str = "base") -> go.Figure:
    """Scatter plot of accuracy against think tokens, one point per condition, with 95 % intervals of both.

    Names stand at the points. A condition is blue if it is clearly more accurate than base, brown if it is clearly less accurate, and else
    dark grey; a line below the title says so. Base is a black star. Random controls, known by their names (see ``verdicts.is_control``),
    are grey crosses. More than ``NAMED`` of them have no names in the figure; hover over one to see its name.

    Args:
        summary: Table from ``evaluate.summary``.
        base: Name of the base condition.
    """
    names = [str(name) for name in summary["condition"].unique()]
    rows = {metric: part.set_index("condition").loc[names] for metric, part in summary.groupby("metric")}
    length, accuracy = rows["think_tokens"], rows["accuracy"]
    changed = [name for name in names if name != base and not is_control(name)]
    colours = {name: _colour(accuracy.loc[name]) for name in changed}
    figure = go.Figure()
    controls = [name for name in names if is_control(name)]
    named = len(controls) <= NAMED
    # The star would hide a cross with a name, and many crosses the star.
    order = [*changed, base, *controls] if named else [*controls, *changed, base]
    for name in (name for name in order if name in names):
        colour = colours.get(name, "#000000" if name == base else CONTROL)
        symbol = "star" if name == base else "circle" if name in colours else "x"
        x, y = ({column: [table.loc[name, column]] for column in ("mean", "low", "high")} for table in (length, accuracy))
        pale = 0.15 if is_control(name) else 0.4
        ends = {"error_x": error_bars(**x, colour=colour, opacity=pale), "error_y": error_bars(**y, colour=colour, opacity=pale)}
        mark: dict[str, Any] = {"size": 13 if name == base else 10 if name in colours else 8, "color": colour, "symbol": symbol}
        if name in controls:
            mark["line"] = {"width": 1, "color": "white"}
        figure.add_scatter(x=x["mean"], y=y["mean"], name=name, mode="markers", marker=mark, **ends)
    low, high = min(length["low"]), max(length["high"])
    room = 0.12 * (high - low or 1.0)  # for names
    x_range, y_range = (low - room, high + room), _wide(accuracy["low"].min(), accuracy["high"].max())
    points = list(zip(length["mean"], accuracy["mean"], strict=True))
    texts = [name if name in (base, *changed) or named else "" for name in names]
    across, up = (table[["mean", "low", "high"]].to_dict("index") for table in (length, accuracy))
    lines = [line for name in names for line in bars(across[name], up[name])]
    meanings = {
        "blue: clearly more accurate than base": BETTER in colours.values(),
        "brown: clearly less accurate": WORSE in colours.values(),
        "dark grey: no clear difference": NEITHER in colours.values(),
        "crosses: random controls": bool(controls),
    }
    axes = {
        "xaxis": {"title": "think tokens", "range": x_range},
        "yaxis": {"title": "accuracy", "range": y_range, "tickformat": ".0%"},
    }
    annotations = placed(points, texts, x_range, y_range, lines=lines)
    return styled(figure, "Accuracy against think length", _note(meanings), showlegend=False, annotations=annotations, **axes)


def accuracy_at_budgets(curves: pd.DataFrame, *, base: str = "base") -> go.Figure:
    """Line plot of accuracy against the token budget, one line per condition. A response that is longer than the budget counts as wrong.

    Base is black and random controls are grey. Pale bands are 95 % intervals; controls have none. A line that is higher on the left gets
    more right with few tokens.

    Args:
        curves: Table from ``evaluate.accuracy_at_budgets``.
        base: Name of the base condition.
    """
    names = [str(name) for name in curves["condition"].unique()]
    changed = iter(COLOURS)
    colours = {name: "#000000" if name == base else CONTROL if is_control(name) else next(changed, GREY) for name in names}
    figure = go.Figure()
    for name in sorted(names, key=lambda name: (not is_control(name), name == base)):  # controls below, base on top
        own, colour = curves[curves["condition"] == name], colours[name]
        if not is_control(name):
            red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
            figure.add_scatter(
                x=[*own["tokens"], *own["tokens"][::-1]], y=[*own["high"], *own["low"][::-1]], fill="toself", line={"width": 0}, mode="lines",
                fillcolor=f"rgba({red},{green},{blue},0.12)", hoverinfo="skip", showlegend=False, name=name,
            )  # fmt: skip
        figure.add_scatter(
            x=own["tokens"], y=own["mean"], name=name, mode="lines", line={"color": colour, "width": 1 if is_control(name) else 2}
        )
    return styled(
        figure,
        "Accuracy at token budgets",
        xaxis_title="largest number of response tokens",
        yaxis={"title": "accuracy", "tickformat": ".0%"},
    )


def _note(meanings: Mapping[str, bool]) -> str:
    """Return the explanations that a figure needs as one line: those whose value is True."""
    return "; ".join(text for text, is_shown in meanings.items() if is_shown)


def _colour(row: pd.Series) -> str:
    """Return the colour of a condition by its accuracy: a row of the summary."""
    change = Change(mean=row["difference"], low=row["difference_low"], high=row["difference_high"])
    return effect_colour("high", change.mean) if change.is_clear else NEITHER


def _wide(low: float, high: float) -> tuple[float, float]:
    """Return the ends of an axis around an interval, with room on both sides."""
    room = 0.15 * (high - low or 0.2)
    return low - room, high + room


def differences(summary: pd.DataFrame, metric: str, *, base: str = "base") -> go.Figure:
    """Dot plot of paired differences from base (condition minus base) with 95 % intervals, one row per condition.

    Filled dots have an interval that excludes zero: blue is better, brown is worse, dark grey is neither, as for lengths. Open dots have an
    interval that contains zero, or that has width 0 because nothing varies. Random controls are grey crosses. A line below the title
    explains what is shown. Shares are in percentage points.

    Args:
        summary: Table from ``evaluate.summary``.
        metric: Name of the metric, a value in the column ``metric`` of ``summary``.
        base: Name of the base condition, which has no row in the plot.
    """
    # Reversed, because plotly draws the first row at the bottom.
    rows = summary[(summary["metric"] == metric) & (summary["condition"] != base)].iloc[::-1]
    label, unit, better = _about(metric)
    scale = 100 if unit == "share" else 1
    mean, low, high = (scale * rows[column] for column in ("difference", "difference_low", "difference_high"))
    colours, symbols = [], []
    for name, d, least, most in zip(rows["condition"], mean, low, high, strict=True):
        clear = Change(mean=d, low=least, high=most).is_clear
        colours.append(CONTROL if is_control(name) else effect_colour(better, d) if clear else "#777777")
        symbols.append(("x" if is_control(name) else "circle") + "-open" * (not clear))
    figure = go.Figure(
        go.Scatter(
            x=mean,
            y=rows["condition"],
            mode="markers",
            marker={"size": 10, "color": colours, "symbol": symbols, "line": {"width": 1.5, "color": colours}},
            error_x=error_bars(mean, low, high, opacity=0.45),
        )
    )
    figure.add_vline(x=0, line={"color": "black", "width": 1})
    title = f"{label}: condition minus {base}, paired, 95 % interval"
    axis = {"share": "percentage points", "number": ""}.get(unit, unit)
    filled = [colour for colour, symbol in zip(colours, symbols, strict=True) if not symbol.endswith("-open")]
    meanings = {
        "filled: interval excludes 0": bool(filled),
        "open: it does not": len(filled) < len(rows),
        "blue: better than " + base: BETTER in filled,
        "brown: worse": WORSE in filled,
        "crosses: random controls": any(map(is_control, rows["condition"])),
    }
    framed = styled(figure, title[0].upper() + title[1:], _note(meanings), xaxis_title=axis, yaxis={"automargin": True})
    return framed.update_layout(margin={"l": 20}, height=156 + 26 * len(rows))


def by_level(table: pd.DataFrame, *, base: str = "base") -> go.Figure:
    """Dot plots of paired differences from base (condition minus base) with 95 % intervals per level of difficulty, one panel per metric.

    One row per condition, one colour per level. Random controls are crosses. Shares are in percentage points.

    Args:
        table: Table from ``difficulty.by_level``.
        base: Name of the base condition, which has no row in the plot.
    """
    rows = table[table["condition"] != base].iloc[::-1]  # plotly draws the first row at the bottom
    metrics, levels = list(table["metric"].unique()), [level for level in table["level"].unique() if " minus " not in level]
    figure = make_subplots(rows=1, cols=len(metrics), shared_yaxes=True, subplot_titles=[_about(m)[0] for m in metrics])
    for column, metric in enumerate(metrics, 1):
        unit = _about(metric)[1]
        for level, colour in zip(levels, COLOURS, strict=False):
            own = rows[(rows["metric"] == metric) & (rows["level"] == level)]
            mean, low, high = (
                (100 if unit == "share" else 1) * own[c] for c in ("difference", "difference_low", "difference_high")
            )
            symbols = ["x" if is_control(name) else "circle" for name in own["condition"]]
            figure.add_scatter(
                x=mean, y=own["condition"], error_x=error_bars(mean, low, high, colour), name=level, legendgroup=level, showlegend=column == 1,
                mode="markers", orientation="h", marker={"size": 9, "color": colour, "symbol": symbols}, row=1, col=column,
            )  # fmt: skip
        figure.update_xaxes(title="percentage points" if unit == "share" else unit, row=1, col=column)
        figure.add_vline(x=0, line={"color": "black", "width": 1}, row=1, col=column)
    note = "crosses: random controls" * any(map(is_control, rows["condition"]))
    framed = styled(figure, f"By level of difficulty: condition minus {base}, paired, 95 % interval", note, scattermode="group")
    return framed.update_layout(margin={"t": 100}, height=210 + 40 * rows["condition"].nunique())


def _about(metric: str) -> tuple[str, str, str]:
    """Return label, unit and better direction of a metric. A metric that ``metrics.METRICS`` lacks is a number without a direction."""
    try:
        about = described(metric)
    except KeyError:
        return metric.replace("_", " "), "number", "none"
    return about.label, about.unit, about.better


def accuracy_by_length(table: pd.DataFrame, *, metric: str = "exact") -> go.Figure:
    """Line plots of accuracy against test length with 95 % intervals: one panel per task, one line per encoding (without hints).

    A dotted line marks the longest trained length.

    Args:
        table: Table from ``jobs.length_tables.accuracies``.
        metric: Metric to draw: ``"exact"`` or ``"tokens"``.
    """
    rows = table[(table["metric"] == metric) & (table["hint"] == "none")]
    tasks, encodings = list(rows["task"].unique()), list(rows["encoding"].unique())
    columns = max(1, min(3, len(tasks)))
    rows_of_panels = max(1, math.ceil(len(tasks) / columns))
    figure = make_subplots(rows=rows_of_panels, cols=columns, subplot_titles=tasks, shared_yaxes=True, vertical_spacing=0.18)
    for panel, task in enumerate(tasks):
        place = {"row": panel // columns + 1, "col": panel % columns + 1}
        for i, encoding in enumerate(encodings):
            line = rows[(rows["task"] == task) & (rows["encoding"] == encoding)].sort_values("length")
            error = error_bars(line["mean"], line["low"], line["high"], COLOURS[i % len(COLOURS)])
            look = {
                "name": encoding,
                "legendgroup": encoding,
                "showlegend": panel == 0,
                "line": {"color": COLOURS[i % len(COLOURS)]},
            }
            figure.add_scatter(x=line["length"], y=line["mean"], error_y=error, mode="lines+markers", **look, **place)
        trained = rows.loc[(rows["task"] == task) & (rows["multiple"] == 1), "length"].max()
        figure.add_vline(x=trained, line={"color": GREY, "dash": "dot"}, **place)
        if panel + columns >= len(tasks):
            figure.update_xaxes(title="length", **place)
    figure.update_yaxes(range=[-0.02, 1.02], tickformat=".0%")
    figure.update_yaxes(title="accuracy" if metric == "exact" else "share of right tokens", col=1)
    return styled(figure, "Accuracy on longer inputs, by positional encoding").update_layout(margin={"t": 90})
