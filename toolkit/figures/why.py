"""Figure of the reasons why a changed model thinks longer or shorter than its base."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from toolkit.figures.base import COLOURS, CONTROL, NEITHER, error_bars, styled

PANELS = (
    "Effect of each head's change, nats",
    "Cosine with the length direction",
    "Steps per response, changed minus base",
    "Share of the change in length",
)


def reasons(tables: Mapping[str, pd.DataFrame], title: str) -> go.Figure:
    """Return four panels: effect of each head, cosines of layers with the length direction, kinds of steps, and shares of single sets of heads.

    Bars show 95 % intervals. In the panel of cosines, all layers lie between the grey lines for 95 % of random directions. In the last panel,
    blue heads are put back to base and brown ones changed alone; random controls are grey. It is empty if the whole change in length is not
    detectable.

    Args:
        tables: ``jobs.Why.tables``: ``heads``, ``outputs``, ``steps`` and ``undo`` are read.
        title: Title of the figure.
    """
    figure = make_subplots(rows=2, cols=2, subplot_titles=PANELS, horizontal_spacing=0.14, vertical_spacing=0.2)
    grid = tables["heads"].pivot_table(index="layer", columns="head", values="effect")
    limit = float(np.nanmax(np.abs(grid.to_numpy()))) or 1.0  # symmetric colours: 0 is white
    colours = {"zmin": -limit, "zmax": limit, "colorscale": "RdBu", "colorbar": {"len": 0.4, "x": 0.44, "y": 0.82, "thickness": 10}}
    figure.add_heatmap(z=grid.to_numpy(), x=grid.columns, y=grid.index, xgap=1, ygap=1, **colours, row=1, col=1)
    layers = tables["outputs"].query("head < 0")
    figure.add_scatter(x=layers["layer"], y=layers["cosine"], mode="lines+markers", line={"color": COLOURS[0]}, row=1, col=2)
    for sign in (-1, 1):
        figure.add_scatter(
            x=layers["layer"], y=sign * layers["random"], mode="lines", line={"color": CONTROL, "dash": "dot"}, row=1, col=2
        )
    steps = tables["steps"]
    bars = error_bars(steps["difference"], steps["difference_low"], steps["difference_high"])
    figure.add_scatter(
        x=steps["difference"], y=steps["kind"], error_x=bars, mode="markers", marker={"color": NEITHER, "size": 9}, row=2, col=1
    )
    shares = tables["undo"].query("measure == 'think_tokens' and way != ''").dropna(subset=["share"])
    for way, colour in (("put back", COLOURS[0]), ("alone", COLOURS[1])):
        for random in (False, True):
            rows = shares[(shares["way"] == way) & shares["heads"].str.startswith("random").eq(random)]
            shade = CONTROL if random else colour
            bars = error_bars(rows["share"], rows["share_low"], rows["share_high"], shade)
            names = rows["heads"] + ", " + way
            figure.add_scatter(
                x=rows["share"], y=names, error_x=bars, mode="markers", marker={"color": shade, "size": 9}, row=2, col=2
            )
    if shares.empty:
        figure.add_annotation(
            text="no change in length detectable", showarrow=False, xref="x4 domain", yref="y4 domain", x=0.5, y=0.5
        )
        figure.update_xaxes(visible=False, row=2, col=2).update_yaxes(visible=False, row=2, col=2)
    figure.update_xaxes(title="head", dtick=1, row=1, col=1).update_yaxes(title="layer", dtick=1, row=1, col=1)
    figure.update_xaxes(title="layer", dtick=1, row=1, col=2).update_yaxes(range=[-1.05, 1.05], row=1, col=2)
    figure.update_xaxes(zeroline=True, zerolinecolor="#888888", row=2).update_xaxes(tickformat=".0%", row=2, col=2)
    return styled(figure, title, showlegend=False).update_layout(height=640, margin={"l": 130, "t": 90})
