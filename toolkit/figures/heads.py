"""Figure of the scores of attention heads."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from toolkit.figures.base import styled, ticks
from toolkit.types import HeadScores, Plan


def head_scores(scores: HeadScores, plan: Plan | None = None) -> go.Figure:
    """Heat map of head scores, one row per layer and one column per head.

    The title names the score, and the colour bar its unit. An example is the score of ``methods.thinkedit.head_scores``: how strongly a
    head writes towards shorter thinking. Positive scores are red, negative scores blue, and 0 is white; the scale of a score without
    negative values, such as a share, begins at 0. A layer with fewer heads than others has empty cells. If some layers have no attention
    heads, the title names them.

    Args:
        scores: One score per head, with the name of the score and its unit.
        plan: Plan of an edit. The heads to edit are outlined; ``None`` outlines none.
    """
    values = scores.score.numpy()
    limit = float(np.nanmax(np.abs(values))) or 1.0  # 1 if all scores are 0
    signed = bool(np.nanmin(values) < 0)  # then the colours are symmetric, so that 0 is white
    figure = go.Figure(
        go.Heatmap(
            z=values,
            zmin=-limit if signed else 0,
            zmax=limit,
            colorscale="RdBu_r" if signed else "Reds",
            xgap=1,
            ygap=1,
            colorbar={"title": _unit(scores)},
            hovertemplate="layer %{y}, head %{x}: %{z:.3f}<extra></extra>",
        )
    )
    for layer, head in plan.heads if plan else ():
        box = {"x0": head - 0.5, "x1": head + 0.5, "y0": layer - 0.5, "y1": layer + 0.5}
        figure.add_shape(type="rect", line={"color": "#00C853", "width": 4}, **box)
    layers, heads = values.shape
    title = f"Head scores ({scores.method.replace('_', ' ')})" + ("; outlined: edited" if plan else "")
    title += f"; {scores.headless}" if scores.headless else ""
    axes = {"xaxis": {"title": "head", "dtick": ticks(heads)}, "yaxis": {"title": "layer", "dtick": ticks(layers)}}
    return styled(figure, title, **axes)


def _unit(scores: HeadScores) -> str:
    """Return the title of the colour bar: the unit of the scores, and for scores of short thinking what a positive one means."""
    towards = "towards short thinking ↑,<br>" if scores.method.startswith("short_thinking") else ""
    return towards + scores.units
