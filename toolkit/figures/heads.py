"""Figure of the scores of attention heads."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from toolkit.figures.base import styled
from toolkit.types import HeadScores, Plan


def head_scores(scores: HeadScores, plan: Plan | None = None) -> go.Figure:
    """Heat map of head scores, one row per layer and one column per head.

    The title names the score, and the colour bar its unit. An example is the score of ``methods.thinkedit.head_scores``: how strongly a
    head writes towards shorter thinking. Positive scores are red, negative scores blue, and 0 is white. A layer with fewer heads than
    others has empty cells. If some layers have no attention heads, the title names them.

    Args:
        scores: One score per head, with the name of the score and its unit.
        plan: Plan of an edit. The heads to edit are outlined; ``None`` outlines none.
    """
    values = scores.score.numpy()
    limit = float(np.nanmax(np.abs(values))) or 1.0  # symmetric colours: 0 is white; 1 if all scores are 0
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
    title += f"; {scores.headless}" if scores.headless else ""
    axes = {"xaxis": {"title": "head", "dtick": 1}, "yaxis": {"title": "layer", "dtick": 1}}
    return styled(figure, title, **axes)
