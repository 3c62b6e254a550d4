"""Figures of judges: a judge's score and the true quality of policies that are optimised against it; recall of each class during training."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from toolkit.figures.base import COLOURS, CONTROL, error_bars, styled

MEASURES = {"score": "score of the judge, standard deviations", "quality": "true quality"}
_DASHES = {"best of n": "solid", "penalty": "dot"}


def over_optimisation(curves: pd.DataFrame, *, controls: tuple[str, ...] = ()) -> go.Figure:
    """Return two panels against KL: score of each judge, and true quality, both as gains over the initial policy, with 95 % intervals.

    Args:
        curves: Rows of ``learning_to_summarize.optimisation_curve``, with a column ``judge``. Solid lines are best of n, dotted ones a
            penalty on KL.
        controls: Judges that are drawn in grey.
    """
    drawn = make_subplots(cols=2, subplot_titles=tuple(MEASURES.values()))
    judges = list(dict.fromkeys(curves["judge"]))
    coloured = dict(zip([j for j in judges if j not in controls], COLOURS, strict=False))
    for column, measure in enumerate(MEASURES, 1):
        for judge in judges:
            colour = coloured.get(judge, CONTROL)
            for by, dash in _DASHES.items():
                g = curves[(curves["judge"] == judge) & (curves["by"] == by) & (curves["measure"] == measure)].sort_values("kl")
                drawn.add_scatter(
                    x=g["kl"], y=g["mean"], error_y=error_bars(g["mean"], g["low"], g["high"], colour), mode="lines+markers",
                    line={"color": colour, "dash": dash}, name=f"{judge}, {by}", showlegend=column == 1, row=1, col=column,
                )  # fmt: skip
    drawn.update_xaxes(title="KL from the initial policy, nats").update_yaxes(title="gain", col=1)
    return styled(drawn, "Optimised against a judge, its score and the true quality").update_layout(margin={"t": 90})


def class_recalls(recalls: Mapping[str, pd.DataFrame], *, lowest: float) -> go.Figure:
    """Return one panel per training run with the recall of each class by step. A dotted line marks the first step with a recall below ``lowest``.

    Args:
        recalls: Name of a run -> one row per step and one column per class, shares from 0 to 1.
        lowest: Recall below which a class counts as lost.
    """
    drawn = make_subplots(cols=len(recalls), subplot_titles=tuple(recalls), shared_yaxes=True)
    for column, table in enumerate(recalls.values(), 1):
        for i, name in enumerate(table):
            drawn.add_scatter(
                x=list(table.index), y=table[name], mode="lines", line={"color": COLOURS[i]}, name=name, legendgroup=name, showlegend=column == 1,
                row=1, col=column,
            )  # fmt: skip
        if (lost := table.index[(table < lowest).any(axis=1)]).size:
            drawn.add_vline(x=lost[0], line={"dash": "dot", "color": CONTROL}, row=1, col=column)
    drawn.update_xaxes(title="step").update_yaxes(range=(-0.03, 1.03), tickformat=".0%").update_yaxes(title="recall", col=1)
    return styled(drawn, "Share of each class that the judge decides rightly").update_layout(margin={"t": 90})
