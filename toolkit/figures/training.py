"""Figures of training runs: learning curves, and accuracy against think length after training."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from toolkit.figures.base import COLOURS, error_bars, styled

HELD_OUT = ("held_out/accuracy", "held_out/think_tokens", "held_out/accuracy_hard")
TITLES = {
    "held_out/accuracy": "held-out accuracy",
    "held_out/accuracy_hard": "held-out accuracy, hardest third",
    "held_out/think_tokens": "held-out think tokens",
    "accuracy": "accuracy in training",
    "think_tokens": "think tokens in training",
    "entropy/think": "entropy of thinking (nats)",
    "zero_std": "groups without variance",
}


def learning_curves(curves: Mapping[str, pd.DataFrame | Sequence[pd.DataFrame]], metrics: Sequence[str] = HELD_OUT) -> go.Figure:
    """Line plots of the columns of training logs against the training step, one panel per column.

    With several seeds, the line is the mean over seeds, and a band reaches from the smallest to the largest value. If there are more curves
    than colours, curves that end alike in every panel share a colour and an entry of the legend; hover over a line to see its own name.

    Args:
        curves: Name of a line -> log of one run, or a list of the logs of several seeds. A log is a table with the column ``step`` and one
            column per metric. A step is drawn only if every seed has a value for it.
        metrics: Columns of the logs, one panel each. The default: accuracy, think tokens, and accuracy on the hardest third of the
            problems, all measured on held-out problems.
    """
    titles = ["<br>".join(textwrap.wrap(TITLES.get(m, m.replace("_", " ")), 22)) for m in metrics]
    figure = make_subplots(rows=1, cols=len(metrics), subplot_titles=titles, horizontal_spacing=0.08)
    figure.update_annotations(font_size=13)
    tables = {
        name: {metric: _over_seeds([logs] if isinstance(logs, pd.DataFrame) else list(logs), metric) for metric in metrics}
        for name, logs in curves.items()
    }
    groups = _alike(tables) if len(tables) > len(COLOURS) else [[name] for name in tables]
    labels = [", ".join(group) for group in groups]
    if shared := len(groups) < len(tables):
        labels = ["<br>".join(textwrap.wrap(label, 26)) for label in labels]
    for name, by_metric in tables.items():
        i = next(k for k, group in enumerate(groups) if name in group)
        line = {"color": COLOURS[i % len(COLOURS)], "dash": "solid" if i < len(COLOURS) else "dot"}
        for column, metric in enumerate(metrics, 1):
            rows = by_metric[metric]
            if rows.empty:
                continue
            place = {"row": 1, "col": column, "legendgroup": labels[i]}
            if (rows["high"] > rows["low"]).any():
                outline = {"x": [*rows.index, *rows.index[::-1]], "y": [*rows["high"], *rows["low"][::-1]]}
                look = {"fill": "toself", "fillcolor": line["color"], "opacity": 0.12, "line": {"width": 0}, "hoverinfo": "skip"}
                figure.add_scatter(**outline, mode="lines", showlegend=False, **look, **place)
            entry = {"name": labels[i], "showlegend": column == 1 and name == groups[i][0]}
            hover = {"hovertemplate": f"{name}: %{{y}}<extra></extra>"}
            drawn = {**entry, **hover, "mode": "lines+markers", "marker": {"size": 4}, "line": line}
            figure.add_scatter(x=list(rows.index), y=list(rows["mean"]), **drawn, **place)
    for column, metric in enumerate(metrics, 1):
        figure.update_xaxes(title="step", row=1, col=column)
        if "accuracy" in metric:
            figure.update_yaxes(range=[0, 1.02], tickformat=".0%", row=1, col=column)
        else:
            figure.update_yaxes(rangemode="tozero", row=1, col=column)
    note = "curves that end alike share a colour" * shared
    top = 90 + 16 * (any("<br>" in title for title in titles) + shared)
    height = max(420, 100 + top + sum(8 + 15 * (1 + label.count("<br>")) for label in labels))
    return styled(figure, "Learning curves", note).update_layout(margin={"t": top}, legend={"font": {"size": 11}}, height=height)


def _alike(tables: Mapping[str, Mapping[str, pd.DataFrame]]) -> list[list[str]]:
    """Return names of curves in groups: a curve joins the first group with a curve that ends near it in every metric.

    Near is a tenth of the distance between the lowest and the highest end of all curves.

    Args:
        tables: Name of a curve -> metric -> table from ``_over_seeds``.
    """
    lasts = {name: [rows["mean"].iloc[-1] if len(rows) else None for rows in by.values()] for name, by in tables.items()}
    ends = pd.DataFrame.from_dict(lasts, orient="index", dtype=float)
    near = 0.1 * (ends.max() - ends.min())
    ends = ends.fillna(ends.min() - 1 - near).fillna(0.0)  # curves that lack a metric are alike in it, and far from the others
    groups: list[list[str]] = []
    for name, own in ends.iterrows():
        group = next((g for g in groups if ((ends.loc[g] - own).abs() <= near).all(axis=1).any()), None)
        if group is None:
            groups.append(group := [])
        group.append(str(name))
    return groups


def _over_seeds(logs: Sequence[pd.DataFrame], metric: str) -> pd.DataFrame:
    """Return the mean, smallest and largest value of a metric over several logs: columns ``mean, low, high``, one row per step.

    Logs without the metric are left out. If no log has the metric, the table is empty. Only steps for which every remaining log has a value
    are in the table.
    """
    columns = [log.set_index("step")[metric].dropna().astype(float) for log in logs if metric in log]
    if not columns:
        return pd.DataFrame()
    together = pd.concat(columns, axis=1, join="inner")
    return pd.DataFrame({"mean": together.mean(axis=1), "low": together.min(axis=1), "high": together.max(axis=1)})


def length_against_accuracy(table: pd.DataFrame) -> go.Figure:
    """Scatter plot of accuracy against think tokens of trained models on held-out problems, with 95 % intervals.

    There is one dot per training run. Runs of the same name, such as seeds of one method, share a colour and symbol. Base is a black cross.

    Args:
        table: Table from ``grpo.curves.after_training``, one row per run. Columns: ``name`` (``"base"`` for the base model),
            ``think_tokens, accuracy``, and the ends of their intervals ``think_tokens_low, think_tokens_high, accuracy_low,
            accuracy_high``.
    """
    figure = go.Figure()
    trained = [name for name in table["name"].unique() if name != "base"]
    for name, rows in table.groupby("name", sort=False):
        bars = {}
        for axis, column in (("x", "think_tokens"), ("y", "accuracy")):
            bars[f"error_{axis}"] = error_bars(rows[column], rows[f"{column}_low"], rows[f"{column}_high"])
        marker = {"size": 12, "symbol": "x", "color": "black"}
        if name != "base":
            i = trained.index(name)
            marker = {"size": 9, "symbol": "circle" if i < len(COLOURS) else "square", "color": COLOURS[i % len(COLOURS)]}
        figure.add_scatter(x=rows["think_tokens"], y=rows["accuracy"], name=str(name), mode="markers", marker=marker, **bars)
    axes = {
        "xaxis": {"title": "think tokens", "rangemode": "tozero"},
        "yaxis": {"title": "accuracy", "range": [0, 1.02], "tickformat": ".0%"},
    }
    framed = styled(figure, "After training: accuracy against think length", **axes)
    return framed.update_layout(height=max(420, 24 * len(figure.data) + 120))  # for the legend
