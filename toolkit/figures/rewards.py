"""Figures of the rewards that rollouts get: reward against length, and mean advantage of short, long, right and wrong responses."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from toolkit.figures.base import LONG_COLOUR, SHORT_COLOUR, styled


def reward_by_length(table: pd.DataFrame, *, across: int = 3) -> go.Figure:
    """Scatter plot of reward against response length in tokens, one panel per reward, one colour for right and one for wrong answers.

    Args:
        table: Table from ``rewards.compare``.
        across: Number of panels per row of the figure.
    """
    names = list(table["name"].unique())
    down = math.ceil(len(names) / across)
    # As shares of the figure. 0.3 / down is plotly's default for the vertical spacing, too wide for few rows.
    spacing = {"horizontal_spacing": 0.06, "vertical_spacing": min(0.14, 0.3 / down)}
    figure = make_subplots(rows=down, cols=across, subplot_titles=names, shared_xaxes=True, **spacing)
    for i, name in enumerate(names):
        row, column = divmod(i, across)
        for right, label, colour in ((False, "wrong", SHORT_COLOUR), (True, "right", LONG_COLOUR)):
            part = table[(table["name"] == name) & (table["correct"] == right)]
            dots = {"mode": "markers", "marker": {"color": colour, "size": 5, "opacity": 0.45}, "text": part["problem_id"]}
            legend_entry = {"name": label, "legendgroup": label, "showlegend": i == 0}
            figure.add_scatter(x=part["tokens"], y=part["reward"], row=row + 1, col=column + 1, **dots, **legend_entry)
        if row == down - 1 or i + across >= len(names):  # no panel below this one
            figure.update_xaxes(title="tokens", showticklabels=True, row=row + 1, col=column + 1)
    legend = {"orientation": "h", "yref": "container", "y": 0.97, "yanchor": "top", "x": 1, "xanchor": "right"}
    framed = styled(figure, "Reward against response length")
    return framed.update_layout(
        height=170 * down + 110, margin={"t": 90}, legend=legend | {"traceorder": "reversed", "itemsizing": "constant"}
    )


def reward_pushes(table: pd.DataFrame) -> go.Figure:
    """Heat map of the mean advantage of short and long, right and wrong responses, one row per reward.

    The advantage is GRPO's: the reward minus the mean reward of all responses to the problem, divided by the standard deviation of these
    rewards. Training makes responses with a positive advantage more likely. A response is short if it has fewer tokens than the median
    response to the same problem, and long if it has more. The percentage after the name of a reward is the share of problems whose
    responses all get the same reward; their advantages are 0. Colours are clipped at -1 and +1; the numbers in the cells are not.

    Args:
        table: Table from ``rewards.mean_advantages``.
    """
    kinds = [column for column in table if column != "no push"]
    values = table[kinds].to_numpy(float)
    text = [["" if math.isnan(v) else f"{v:+.2f}" for v in row] for row in values]
    names = [f"{name} ({share:.0%})" for name, share in zip(table.index, table["no push"], strict=True)]
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=kinds,
            y=names,
            text=text,
            texttemplate="%{text}",
            colorscale="RdBu",
            zmid=0,
            zmin=-1,
            zmax=1,
            colorbar={"title": "advantage" + "<br>(clipped at ±1)" * bool(np.nanmax(np.abs(values)) > 1)},
        )
    )
    axis = {"autorange": "reversed", "automargin": True, "title": "reward (share of problems without any advantage)"}
    return styled(figure, "Mean advantage by reward", xaxis={"side": "top"}, yaxis=axis).update_layout(
        height=24 * len(names) + 150, margin={"t": 110}
    )
