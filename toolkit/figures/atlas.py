"""Figures of attention heads: scores by several measures ("lenses"), agreement of the lenses, attention weights of one head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from toolkit.figures.base import styled
from toolkit.types import HeadScores


def lenses(scores: Mapping[str, HeadScores]) -> go.Figure:
    """Heat map of head scores, one row per lens (a measure that gives each head one number) and one column per head.

    Columns are named "layer.head". Each row is divided by its largest absolute score, so colours cannot be compared between rows. The hover
    text shows the score itself.

    Args:
        scores: Name of the lens -> scores of all heads.
    """
    values = {name: s.score.numpy() for name, s in scores.items()}
    present = next(iter(scores.values())).present.numpy()  # a layer may have fewer heads than others, or none
    names = [f"{layer}.{head}" for layer, head in np.argwhere(present)]
    raw = np.array([v[present] for v in values.values()])
    scaled = raw / np.abs(raw).max(axis=1, keepdims=True).clip(min=1e-12)  # 1e-12: a row may be all zeros
    heat = go.Heatmap(
        x=names,
        y=list(values),
        z=scaled,
        customdata=raw,
        zmid=0,
        colorscale="RdBu_r",
        ygap=2,
        colorbar={"title": "score / row's<br>largest |score|"},
        hovertemplate="head %{x}<br>%{y}: %{customdata:.3g}<extra></extra>",
    )
    figure = go.Figure(heat)
    # A vertical line between the last head of a layer and the first of the next.
    for end in np.cumsum(present.sum(axis=1))[:-1]:
        figure.add_vline(x=end - 0.5, line={"color": "black", "width": 1})
    axes = {"xaxis": {"title": "layer.head", "type": "category"}, "yaxis": {"autorange": "reversed", "automargin": True}}
    return styled(figure, "Scores of every head by every measure", **axes).update_layout(
        margin={"l": 20}, meta={"least_width": 260 + min(12 * len(names), 480)}
    )


def agreement(table: pd.DataFrame) -> go.Figure:
    """Heat map of the number of top heads that two lenses share, one cell per pair. A lens is a measure that gives each head one number.

    The top heads of a lens are those with the highest scores; the argument ``count`` of ``jobs.agreement`` says how many. Below the number
    of shared heads, a cell shows two numbers:

    * p: one-sided p-value; small if the lenses share more heads than by chance. Chance is estimated by permuting the heads within each
      layer.
    * ρ: Spearman's rank correlation of the two lenses over all heads.

    Args:
        table: Table from ``jobs.agreement``.
    """
    pairs = table["pair"].str.split(" / ", expand=True)
    names = list(dict.fromkeys([*pairs[0], *pairs[1]]))
    at = {name: i for i, name in enumerate(names)}
    shared, text = np.full((len(names), len(names)), np.nan), np.full((len(names), len(names)), "", object)
    for row, a, b in zip(table.itertuples(), pairs[0], pairs[1], strict=True):
        shared[at[b], at[a]] = row.shared
        text[at[b], at[a]] = f"{row.shared:.3g}<br>p {row.p_in_layer:.2g}<br>ρ {row.spearman:+.2f}"
    heat = go.Heatmap(
        x=names,
        y=names,
        z=shared,
        text=text,
        texttemplate="%{text}",
        colorscale="Blues",
        zmin=0,
        xgap=2,
        ygap=2,
        colorbar={"title": "shared"},
        hovertemplate="%{x}<br>%{y}<br>%{text}<extra></extra>",
    )
    axes = {"xaxis": {"automargin": True}, "yaxis": {"autorange": "reversed", "automargin": True}}
    return styled(go.Figure(heat), "Top heads shared, p (heads permuted within layers), rank correlation ρ", **axes).update_layout(
        height=680, margin={"l": 20}, meta={"least_width": 260 + 60 * len(names)}
    )


def attention(
    weights: Float[Tensor, "queries keys"], queries: Sequence[str], keys: Sequence[str], title: str = "Attention"
) -> go.Figure:
    """Heat map of attention weights, one row per query token and one column per key token.

    Args:
        weights: Attention weights, 0 to 1, from each query (row) to each key (column).
        queries: Text of each query token. To see how the model predicts a generated token, use the token before it: the prediction is made
            there. A token that is one space is shown as ␣, a line break as ↵.
        keys: Text of each key token. Spaces and line breaks are shown as in ``queries``.
        title: Title of the figure.
    """
    heat = go.Heatmap(z=weights.numpy(), zmin=0, colorscale="Blues", colorbar={"title": "attention"}, xgap=1, ygap=1)
    heat.update(
        customdata=[[[q, k] for k in keys] for q in queries],
        hovertemplate="%{customdata[0]} to %{customdata[1]}: %{z:.2f}<extra></extra>",
    )
    x = {
        "title": "attended token",
        "tickvals": list(range(len(keys))),
        "ticktext": [_visible(text, 4) for text in keys],
        "tickangle": 0,
    }
    y = {
        "title": "token before the emitted one",
        "tickvals": list(range(len(queries))),
        "ticktext": [_visible(text) for text in queries],
    }
    return styled(go.Figure(heat), title, xaxis=x, yaxis={**y, "autorange": "reversed", "automargin": True})


def _visible(text: str, most: int = 20) -> str:
    short = text if len(text) <= most else text[: most - 1] + "…"
    return {" ": "␣", "\n": "↵"}.get(short, short.replace("<", "&lt;"))
