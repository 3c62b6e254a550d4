"""Plotly figures from values: no model, no files. Each returns a ``Figure`` that draws in Jupyter and in a saved page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from toolkit.types import Direction, HeadScores, Plan, Rollout

# Okabe and Ito's palette: told apart with every common colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#666666")
SHORT_COLOUR, LONG_COLOUR, NEITHER = COLOURS[1], COLOURS[0], "#BBBBBB"


def _styled(figure: go.Figure, title: str, **layout) -> go.Figure:
    return figure.update_layout(
        title={"text": title, "x": 0, "xanchor": "left", "font": {"size": 16}},
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 60, "r": 20, "t": 60, "b": 50},
        height=420,
        **layout,
    )


def length_distribution(rollouts: Sequence[Rollout], by=None) -> go.Figure:
    """Histogram of think length (tokens), coloured by class if ``by(rollout) -> "short" | "long" | None`` is given."""
    labels = [(by(r) if by else None) or ("in no class" if by else "all") for r in rollouts]
    lengths = np.array([r.think_tokens for r in rollouts])
    colours = {"short": SHORT_COLOUR, "long": LONG_COLOUR}
    size = max(1, round(lengths.max() / 60)) if len(lengths) else 1
    figure = go.Figure()
    for label in sorted(set(labels), key=lambda name: (name != "short", name != "long", name)):
        mine = lengths[[name == label for name in labels]]
        figure.add_histogram(x=mine, name=f"{label} ({len(mine)})", xbins={"size": size}, marker_color=colours.get(label, NEITHER))
    return _styled(figure, "Think length", barmode="stack", xaxis_title="think tokens", yaxis_title="rollouts")


def by_layer(curves: Mapping[str, Sequence[float]], title: str, unit: str) -> go.Figure:
    """One line a name over the layers, e.g. class separation of several directions."""
    figure = go.Figure()
    for i, (name, values) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        figure.add_scatter(x=list(range(len(values))), y=list(values), name=name, mode="lines+markers", line={"color": colour})
    return _styled(figure, title, xaxis={"title": "layer", "dtick": 1}, yaxis_title=unit)


def direction_norms(directions: Mapping[str, Direction]) -> go.Figure:
    """Norm of each direction over the layers."""
    return by_layer({name: d.norms.tolist() for name, d in directions.items()}, "Norm of the direction", "|v|")


def head_scores(scores: HeadScores, plan: Plan | None = None) -> go.Figure:
    """Heatmap of head scores ``[layers, heads]``; the heads of a plan are outlined."""
    values = scores.score.numpy()
    limit = float(np.abs(values).max()) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values,
            zmin=-limit,
            zmax=limit,
            colorscale="RdBu_r",
            xgap=1,
            ygap=1,
            colorbar={"title": scores.units},
            hovertemplate="layer %{y}, head %{x}: %{z:.3f}<extra></extra>",
        )
    )
    for layer, head in plan.heads if plan else ():
        box = {"x0": head - 0.5, "x1": head + 0.5, "y0": layer - 0.5, "y1": layer + 0.5}
        figure.add_shape(type="rect", line={"color": "#00C853", "width": 4}, **box)
    title = f"Head scores ({scores.method.replace('_', ' ')})" + ("; outlined: edited" if plan else "")
    axes = {"xaxis": {"title": "head", "dtick": 1}, "yaxis": {"title": "layer", "dtick": 1}}
    return _styled(figure, title, **axes)


Usable = Mapping[str, tuple[float, float]]
"""Direction -> lowest and highest strength that leaves responses whole."""


def dose_response(table: pd.DataFrame, *, usable: Usable = MappingProxyType({})) -> go.Figure:
    """Think length and accuracy against steering strength, with 95 % bands.

    Args:
        table: Columns ``direction, strength, metric, mean, low, high`` with the metrics ``think_tokens`` and ``accuracy``.
        usable: Ranges of strength to shade, by direction.
    """
    figure = _against_strength(table, {"think_tokens": "think tokens", "accuracy": "accuracy"}, usable)
    figure.update_yaxes(range=[0, 1], row=1, col=2)
    return _styled(figure, "Dose-response of steering").update_layout(margin={"t": 90})


def damage(table: pd.DataFrame, *, usable: Usable = MappingProxyType({})) -> go.Figure:
    """What steering breaks: closed think spans, loops, and perplexity of the base's own responses, against strength."""
    panels = {"closed": "think span closed", "looping": "looping", "perplexity": "perplexity of base responses"}
    figure = _against_strength(table, panels, usable)
    for column in (1, 2):
        figure.update_yaxes(range=[-0.02, 1.02], row=1, col=column)
    figure.update_yaxes(type="log", row=1, col=3)
    return _styled(figure, "Damage").update_layout(margin={"t": 90})


def _against_strength(table: pd.DataFrame, panels: Mapping[str, str], usable: Usable) -> go.Figure:
    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=tuple(panels.values()), horizontal_spacing=0.1)
    for i, (name, part) in enumerate(table.groupby("direction", sort=False)):
        colour = COLOURS[i % len(COLOURS)]
        for column, metric in enumerate(panels, 1):
            rows = part[part["metric"] == metric].sort_values("strength")
            band = {"fill": "toself", "fillcolor": colour, "opacity": 0.15, "line": {"width": 0}, "hoverinfo": "skip"}
            outline = [*rows["high"], *rows["low"][::-1]]
            shared = {"legendgroup": str(name), "row": 1, "col": column}
            figure.add_scatter(
                x=[*rows["strength"], *rows["strength"][::-1]], y=outline, showlegend=False, mode="lines", **band, **shared
            )
            line = {"mode": "lines+markers", "line": {"color": colour}, "name": str(name), "showlegend": column == 1}
            figure.add_scatter(x=rows["strength"], y=rows["mean"], **line, **shared)
            if name in usable:
                low, high = usable[str(name)]
                figure.add_vrect(x0=low, x1=high, fillcolor=colour, opacity=0.07, line_width=0, row=1, col=column)
    return figure.update_xaxes(title="strength (- shorter, + longer)")


def targets(dial: pd.DataFrame) -> go.Figure:
    """Mean length reached against target length, and the share of single responses within 20 % of it (from ``doses.targets``)."""
    figure = make_subplots(rows=1, cols=2, subplot_titles=("mean think tokens", "responses within 20 %"), horizontal_spacing=0.1)
    line = {"mode": "lines+markers", "line": {"color": COLOURS[0]}, "name": "steered"}
    figure.add_scatter(x=dial["target"], y=dial["mean"], row=1, col=1, **line)
    exact = {"mode": "lines", "line": {"color": NEITHER, "dash": "dot"}, "name": "target"}
    figure.add_scatter(x=dial["target"], y=dial["target"], row=1, col=1, **exact)
    figure.add_scatter(x=dial["target"], y=dial["flexible"] / 100, row=1, col=2, showlegend=False, **line)
    base = {"mode": "lines+markers", "line": {"color": COLOURS[1]}, "name": "base"}
    figure.add_scatter(x=dial["target"], y=dial["base_flexible"] / 100, row=1, col=2, **base)
    figure.update_xaxes(title="target think tokens")
    figure.update_yaxes(range=[0, 1], row=1, col=2)
    return _styled(figure, "Strength as a dial").update_layout(margin={"t": 90})


def length_accuracy(summary: pd.DataFrame) -> go.Figure:
    """Accuracy against think tokens, one point a condition, with 95 % intervals both ways (from ``evaluate.summary``)."""
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
    return _styled(figure, "Accuracy against think length", xaxis_title="think tokens", yaxis_title="accuracy")


def differences(summary: pd.DataFrame, metric: str, *, base: str = "base") -> go.Figure:
    """Paired differences to base with 95 % intervals, one row a condition; an interval that crosses zero is grey."""
    rows = summary[(summary["metric"] == metric) & (summary["condition"] != base)].iloc[::-1]
    clear = (rows["difference_low"] > 0) | (rows["difference_high"] < 0)
    figure = go.Figure(
        go.Scatter(
            x=rows["difference"],
            y=rows["condition"],
            mode="markers",
            marker={"size": 10, "color": np.where(clear, COLOURS[0], NEITHER)},
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
    return _styled(
        figure, f"{metric.replace('_', ' ')}: difference to {base}", xaxis_title="paired difference, 95 % interval"
    ).update_layout(yaxis={"automargin": True}, margin={"l": 20})


def entropy_by_position(curves: Mapping[str, pd.DataFrame], by: str = "position") -> go.Figure:
    """Mean token entropy over thinking with 95 % bands, one line a name.

    Args:
        curves: Name -> table of ``phase_entropy.by_position``, or of ``phase_entropy.by_step`` with ``by="step"``.
    """
    figure = go.Figure()
    for i, (name, rows) in enumerate(curves.items()):
        colour, x = COLOURS[i % len(COLOURS)], list(rows[by])
        outline = [*rows["high"], *rows["low"][::-1]]
        band = {"fill": "toself", "fillcolor": colour, "opacity": 0.15, "line": {"width": 0}, "hoverinfo": "skip"}
        figure.add_scatter(x=[*x, *x[::-1]], y=outline, mode="lines", showlegend=False, legendgroup=name, **band)
        hover = "%{x}: %{y:.3f} nats, %{customdata} rollouts"
        line = {"mode": "lines+markers", "line": {"color": colour}, "legendgroup": name, "hovertemplate": hover}
        figure.add_scatter(x=x, y=list(rows["mean"]), name=name, customdata=list(rows["rollouts"]), **line)
    title = {"position": "share of thinking written", "step": "step of thinking"}.get(by, by)
    return _styled(figure, f"Entropy by {by}", xaxis_title=title, yaxis={"title": "nats a token", "rangemode": "tozero"})


def phase_entropy(tables: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Mean entropy of thinking and of the answer with 95 % intervals, one colour a name (from ``phase_entropy.by_phase``)."""
    figure = go.Figure()
    for i, (name, rows) in enumerate(tables.items()):
        shown = rows[rows["phase"].isin(["think", "answer"])]
        error = {"symmetric": False, "array": shown["high"] - shown["mean"], "arrayminus": shown["mean"] - shown["low"]}
        figure.add_bar(x=shown["phase"], y=shown["mean"], name=name, error_y=error, marker_color=COLOURS[i % len(COLOURS)])
    return _styled(figure, "Entropy by phase", barmode="group", yaxis_title="nats a token")


def correlation(rows: pd.DataFrame, found: pd.DataFrame, x: str = "entropy", y: str = "response_tokens") -> go.Figure:
    """Two columns against each other, rollout by rollout: as they are, and with each problem's means subtracted.

    Args:
        rows: From ``phase_entropy.table`` or ``failed_steps.table``.
        found: Their coefficients, from ``phase_entropy.correlations``; shown above each panel.
    """
    labels = {scope: _coefficients(found[found["scope"] == scope]) for scope in ("pooled", "within")}
    titles = (f"pooled<br>{labels['pooled']}", f"within question<br>{labels['within']}")
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.12)
    kept = rows.dropna(subset=[x, y])
    values = kept[[x, y]].astype(float)
    centred = values - values.groupby(kept["problem_id"]).transform("mean")
    for column, (part, colour) in enumerate(((values, COLOURS[0]), (centred, COLOURS[1])), 1):
        dots = {"mode": "markers", "marker": {"color": colour, "size": 6, "opacity": 0.5}, "showlegend": False}
        figure.add_scatter(x=part[x], y=part[y], text=kept["problem_id"], row=1, col=column, **dots)
        minus = ", minus the problem's mean" if column == 2 else ""
        figure.update_xaxes(title=x.replace("_", " ") + minus, row=1, col=column)
        figure.update_yaxes(title=y.replace("_", " ") + minus, row=1, col=column)
    styled = _styled(figure, f"{x} and {y}".replace("_", " ").capitalize())
    return styled.update_layout(height=500, margin={"t": 140}, title={"y": 0.97, "yanchor": "top"})


def _coefficients(rows: pd.DataFrame) -> str:
    return "<br>".join(f"{row['kind']} {row['r']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" for _, row in rows.iterrows())


def entropy_filtering(summary: pd.DataFrame) -> go.Figure:
    """Accuracy against the share of think tokens kept, by what was dropped (from ``phase_entropy.filtering_summary``)."""
    names = {"entropy": "highest entropy dropped", "random": "random tokens dropped", "truncate": "end cut off"}
    figure = go.Figure()
    for i, (drop, name) in enumerate(names.items()):
        rows = summary[summary["drop"] == drop].sort_values("keep")
        error = {"symmetric": False, "array": rows["high"] - rows["accuracy"], "arrayminus": rows["accuracy"] - rows["low"]}
        line = {"mode": "lines+markers", "line": {"color": COLOURS[i]}, "error_y": {**error, "thickness": 1}}
        figure.add_scatter(x=rows["keep"], y=rows["accuracy"], name=name, **line)
    axes = {
        "xaxis": {"title": "share of think tokens kept", "tickformat": ".0%"},
        "yaxis": {"title": "accuracy", "range": [0, 1.02]},
    }
    return _styled(figure, "Answering from filtered thinking", **axes)
