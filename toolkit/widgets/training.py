"""Learning curves in Jupyter that update while a model trains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from toolkit import figures


def live(*, every: int = 5, metrics: Sequence[str] = ("accuracy", "think_tokens", "reward")) -> Any:
    """Return a callback for GRPO training that draws learning curves in Jupyter during the run.

    Pass it to the trainer as ``grpo.extras.Extras(callbacks=(live(),))``.

    Args:
        every: Number of training steps between two updates of the figure.
        metrics: Columns of the training log, one panel each.
    """
    from toolkit.grpo.log import Watch  # imports transformers' trainer, which nothing else here needs

    displays: list[Any] = []

    def show(rows: Sequence[dict[str, Any]]) -> None:
        from IPython.display import display

        figure = figures.learning_curves({"this run": pd.DataFrame(rows)}, metrics).update_layout(showlegend=False)
        # Update the picture's data: displaying the figure again would add a second one below.
        picture = {"application/vnd.plotly.v1+json": json.loads(figure.to_json())}
        if displays:
            displays[0].update(picture, raw=True)
        else:
            displays.append(display(picture, raw=True, display_id=True))

    return Watch(show, every)
