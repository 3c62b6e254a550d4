"""Figures of token entropy: by position in thinking, by phase, correlations with other measures, accuracy after dropping tokens.

The tables come from the modules ``methods.phase_entropy`` and ``methods.failed_steps``.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from toolkit.figures.base import COLOURS, GREY, NEITHER, error_bars, styled

_TITLES = {"entropy": "entropy (nats per token)", "think_entropy": "entropy of thinking", "fsf": "failed-step fraction"}
"""Column or measure -> its title on an axis; of others, the name without underscores."""


def _title(name: str) -> str:
    """Return the title of a column or measure, such as ``"failed-step fraction (shuffled)"`` for ``"fsf (shuffled)"``."""
    plain, *rest = name.split(" ", 1)
    return " ".join([_TITLES.get(plain, plain.replace("_", " ")), *rest])


def entropy_by_position(curves: Mapping[str, pd.DataFrame], by: str = "position") -> go.Figure:
    """Line plot of the mean token entropy (nats) over the course of thinking, with 95 % bands.

    Args:
        curves: Name of a line -> table from ``methods.phase_entropy.by_position``, or from ``methods.phase_entropy.by_step`` if ``by`` is
            ``"step"``.
        by: Column on the horizontal axis: ``"position"`` (relative position in the think span, 0 to 1) or ``"step"`` (number of the step
            of thinking).
    """
    figure = go.Figure()
    for i, (name, rows) in enumerate(curves.items()):
        colour, x = COLOURS[i % len(COLOURS)], list(rows[by])
        # The band is a closed polygon: along the upper ends, then back along the lower ends.
        outline = [*rows["high"], *rows["low"][::-1]]
        band = {"fill": "toself", "fillcolor": colour, "opacity": 0.15, "line": {"width": 0}, "hoverinfo": "skip"}
        figure.add_scatter(x=[*x, *x[::-1]], y=outline, mode="lines", showlegend=False, legendgroup=name, **band)
        hover = "%{x}: %{y:.3f} nats, %{customdata} rollouts"
        line = {"mode": "lines+markers", "line": {"color": colour}, "legendgroup": name, "hovertemplate": hover}
        figure.add_scatter(x=x, y=list(rows["mean"]), name=name, customdata=list(rows["rollouts"]), **line)
    title = {"position": "relative position in the think span", "step": "number of the step of thinking"}.get(by, by)
    return styled(figure, f"Entropy by {by}", xaxis_title=title, yaxis={"title": "nats per token", "rangemode": "tozero"})


def phase_entropy(tables: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Bar chart of the mean token entropy (nats) of thinking and of the answer, with 95 % intervals.

    Args:
        tables: Name of a model or condition -> table from ``methods.phase_entropy.by_phase``. Each has its own colour.
    """
    figure = go.Figure()
    for i, (name, rows) in enumerate(tables.items()):
        rows = rows[rows["phase"].isin(["think", "answer"])]
        error = error_bars(rows["mean"], rows["low"], rows["high"], NEITHER, opacity=0.8)  # on a bar, a pale line is not seen
        figure.add_bar(x=rows["phase"], y=rows["mean"], name=name, error_y=error, marker_color=COLOURS[i % len(COLOURS)])
    return styled(figure, "Entropy by phase", barmode="group", yaxis_title="nats per token")


def correlation(rows: pd.DataFrame, table: pd.DataFrame, x: str = "entropy", y: str = "response_tokens") -> go.Figure:
    """Scatter plot of two measures, one dot per rollout, in two panels.

    The left panel shows the values. The right panel shows the values minus the mean over the rollouts of the same problem. Differences in
    difficulty between problems then do not contribute to the correlation.

    Args:
        rows: Table with one row per rollout, from ``methods.phase_entropy.table`` or ``methods.failed_steps.table``.
        table: Correlations of ``x`` and ``y``, from ``methods.phase_entropy.correlations``. They are written above the panels.
        x: Column of ``rows`` on the horizontal axis.
        y: Column of ``rows`` on the vertical axis.
    """
    labels = {scope: _coefficient_text(table[table["scope"] == scope]) for scope in ("pooled", "within")}
    titles = (f"pooled<br>{labels['pooled']}", f"within problem<br>{labels['within']}")
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.12)
    rows = rows.dropna(subset=[x, y])
    values = rows[[x, y]].astype(float)
    centred = values - values.groupby(rows["problem_id"]).transform("mean")
    for column, (part, colour) in enumerate(((values, COLOURS[0]), (centred, COLOURS[1])), 1):
        dots = {"mode": "markers", "marker": {"color": colour, "size": 6, "opacity": 0.5}, "showlegend": False}
        figure.add_scatter(x=part[x], y=part[y], text=rows["problem_id"], row=1, col=column, **dots)
        minus = ",<br>minus mean of the problem" if column == 2 else ""
        figure.update_xaxes(title=_title(x) + minus, row=1, col=column)
        figure.update_yaxes(title=_title(y) + minus, row=1, col=column)
    framed = styled(figure, f"{x} and {y}".replace("_", " ").capitalize())
    return framed.update_layout(height=500, margin={"t": 140, "b": 70}, title={"y": 0.97, "yanchor": "top"})


def coefficients(table: pd.DataFrame, title: str, *, kind: str = "spearman") -> go.Figure:
    """Dot plot of the correlation between each measure of thinking, such as its length, and correctness, with 95 % intervals.

    Each measure has two dots. The dot "pooled" is the correlation over all rollouts. For the dot "within problem", the means over the
    rollouts of the same problem are first subtracted from the measure and from correctness, so that differences in difficulty do not
    contribute. A negative correlation means that a larger value of the measure goes with wrong answers.

    Args:
        table: Table from ``methods.failed_steps.correctness_correlations``.
        title: Title of the figure.
        kind: Kind of correlation: ``"spearman"`` or ``"pearson"``.
    """
    chosen, names = table[table["kind"] == kind], list(table["measure"].unique())
    figure = go.Figure()
    for scope, name, at, colour in (("pooled", "pooled", -0.13, GREY), ("within", "within problem", 0.13, COLOURS[0])):
        rows = chosen[chosen["scope"] == scope].set_index("measure").loc[names]
        error = error_bars(rows["r"], rows["low"], rows["high"])
        marker = {"size": 10, "color": colour, "line": {"color": "#444444", "width": 1}}
        places = [i + at for i in range(len(names))]  # the two dots of a measure are a little apart
        figure.add_scatter(x=list(rows["r"]), y=places, name=name, mode="markers", marker=marker, error_x=error)
    figure.add_vline(x=0, line={"color": "black", "width": 1})
    labels = [_title(name) for name in names]
    axis = {"tickvals": list(range(len(names))), "ticktext": labels, "autorange": "reversed", "automargin": True}
    return styled(figure, title, xaxis_title=f"{kind} correlation, 95 % interval", yaxis=axis).update_layout(margin={"l": 20})


def _coefficient_text(rows: pd.DataFrame) -> str:
    """Return the correlation coefficients of ``rows`` with their intervals as text, one line per kind of correlation."""
    return "<br>".join(f"{row['kind']} {row['r']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" for _, row in rows.iterrows())


def entropy_filtering(summary: pd.DataFrame) -> go.Figure:
    """Line plot of accuracy after some think tokens were dropped, against the share of think tokens kept, with 95 % intervals.

    There is one line per choice of the dropped tokens: those of highest entropy, random ones, or the last ones. The think span is closed
    after the tokens that were kept, and the model samples an answer from there.

    Args:
        summary: Table from ``methods.phase_entropy.filtering_summary``.
    """
    names = {"entropy": "highest entropy dropped", "random": "random tokens dropped", "truncate": "end cut off"}
    figure = go.Figure()
    for i, (drop, name) in enumerate(names.items()):
        rows = summary[summary["drop"] == drop].sort_values("keep")
        error = error_bars(rows["accuracy"], rows["low"], rows["high"], COLOURS[i])
        line = {"mode": "lines+markers", "line": {"color": COLOURS[i]}, "error_y": error}
        figure.add_scatter(x=rows["keep"], y=rows["accuracy"], name=name, **line)
    axes = {
        "xaxis": {"title": "share of think tokens kept", "tickformat": ".0%"},
        "yaxis": {"title": "accuracy", "range": [0, 1.02]},
    }
    return styled(figure, "Answering from filtered thinking", **axes)
