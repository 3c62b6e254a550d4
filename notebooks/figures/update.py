"""Publish a finished demo: `toolkit demo`, then `python notebooks/figures/update.py`.

Writes demo.json (the numbers), the README's table of them, and length_accuracy.png if Chromium is installed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd

from toolkit import figures, report

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
METRICS = [name for name in report.HEADLINE if name != "closed"]


def summary(written: dict) -> pd.DataFrame:
    """The table of ``evaluate.summary``, from report.json."""
    rows = []
    for name, about in written["conditions"].items():
        for metric, own in about["metrics"].items():
            paired = written["paired"].get(name, {}).get(metric, dict.fromkeys(("mean", "low", "high"), 0.0))
            differences = {"difference": paired["mean"], "difference_low": paired["low"], "difference_high": paired["high"]}
            rows.append({"condition": name, "metric": metric, **own, **differences})
    return pd.DataFrame(rows)


def main() -> None:
    """Update all three."""
    sys.path.insert(0, str(ROOT / "data"))
    import publish
    import readme

    written = json.loads((ROOT / "runs/demo/report.json").read_text())
    measured = summary(written)
    board = report.headline_table(measured, metrics=METRICS).to_dict("index")
    (HERE / "demo.json").write_text(json.dumps(board, indent=1) + "\n")
    readme.update(["demo"])
    publish.draw(figures.length_accuracy(measured), HERE / "length_accuracy.png", 920, 440)


if __name__ == "__main__":
    main()
