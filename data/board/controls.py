"""Compare conditions of a finished board with their random controls: ``toolkit board``, then ``python data/board/controls.py [DIRECTORY]``.

The board's own table compares everything with base. Here the control is subtracted, paired by problem and by seed. Writes
``controls.json`` and its table in ``README.md`` here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from toolkit import board as boards
from toolkit import lm as lms
from toolkit import report, stats, store
from toolkit.board import default, reading
from toolkit.metrics import with_interval

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

PAIRS = {
    "ThinkEdit (ours)": ("control: random heads edited", "control: random direction edited"),
    "steered -0.5": ("control: steered randomly -0.5",),
    "steered +0.5": ("control: steered randomly +0.5",),
    "Efficiency Steering -0.25": ("control: Efficiency Steering, random direction -0.25",),
    "2 retrieval heads masked": ("control: 2 random heads masked",),
    "stable direction -0.2": ("control: stable direction",),
    "manifold 0.5": ("control: manifold",),
    "CREST, 8 heads": ("control: CREST",),
    "ReBalance 0.5": ("control: ReBalance",),
    "CoDE-Stop": ("control: CoDE-Stop",),
    "exit probe 0.7": ("control: exit probe",),
    "NoWait": ("control: NoWait",),
    "budget of 48": ("control: budget of 48",),
    "GRPO-lambda, two heads": ("control: GRPO-lambda, two random heads",),
}
"""Condition -> its random controls on the default board."""
METRICS = {"accuracy": "share", "think_tokens": "tokens", "accuracy_lookup": "share"}


def compared(table: reading.AlignedResults) -> list[dict[str, Any]]:
    """Return one row per control and metric: the condition minus its control, with a p-value after Holm's correction over all rows."""
    rows = [
        {"condition": name, "control": control, "metric": metric, "mean": e.mean, "low": e.low, "high": e.high, "p": e.p}
        for name, controls in PAIRS.items()
        for control in controls
        for metric in METRICS
        for e in [table.change(metric, name, control)]
    ]
    corrected = stats.holm(np.array([row["p"] for row in rows]))
    return [row | {"p_holm": float(p)} for row, p in zip(rows, corrected, strict=True)]


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a table: one line per control, one column per metric."""
    lines: dict[str, list[str]] = {}
    for r in rows:
        cell = with_interval(r["mean"], r["low"], r["high"], METRICS[r["metric"]], sign="+") + "*" * (r["p_holm"] < 0.05)
        lines.setdefault(f"{r['condition']} minus {r['control']}", []).append(cell)
    columns = ["accuracy, points", "think tokens", "lookup, points"]
    return report.markdown(pd.DataFrame.from_dict(lines, orient="index", columns=columns).rename_axis("difference"))


def main() -> None:
    """Compare, and write the rows and the table."""
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parents[1] / "runs" / "board"
    ground = boards.Ground(lms.load("tiny-reasoner", device="cpu"), boards.FULL, source)
    specs = boards.select_conditions(default.CONDITIONS)
    rows = compared(reading.AlignedResults(reading.condition_results(ground, specs)))
    store.write_json(rows, HERE / "controls.json")
    publish.splice("controls", tables(rows), HERE / "README.md")


if __name__ == "__main__":
    main()
