"""Take the README's table and figure from a finished demo: `toolkit demo`, then `python notebooks/figures/update.py`.

Writes demo.json (the numbers, which a test compares with the README), the table between the README's demo marks, and, if Chromium
is installed, length_accuracy.png.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pandas as pd

from toolkit import figures, report

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
MARKS = ("<!-- demo: begin -->", "<!-- demo: end -->")
METRICS = {k: v for k, v in report.HEADLINE.items() if k != "closed"}


def summary(written: dict) -> pd.DataFrame:
    """The table of ``evaluate.summary``, from report.json."""
    rows = []
    for name, about in written["conditions"].items():
        for metric, own in about["metrics"].items():
            paired = written["paired"].get(name, {}).get(metric, dict.fromkeys(("mean", "low", "high"), 0.0))
            differences = {"difference": paired["mean"], "difference_low": paired["low"], "difference_high": paired["high"]}
            rows.append({"condition": name, "metric": metric, **own, **differences})
    return pd.DataFrame(rows)


def table(board: dict) -> str:
    """The README's table."""
    return report.markdown(pd.DataFrame.from_dict(board, orient="index"))


def main() -> None:
    """Update all three."""
    written = json.loads((HERE.parents[1] / "runs/demo/report.json").read_text())
    measured = summary(written)
    board = report.board(measured, metrics=METRICS).to_dict("index")
    (HERE / "demo.json").write_text(json.dumps(board, indent=1) + "\n")
    before, after = MARKS
    text = re.sub(f"{before}.*{after}", f"{before}\n\n{table(board)}\n\n{after}", README.read_text(), flags=re.DOTALL)
    README.write_text(text)
    if chromium := shutil.which("chromium"):
        figure = figures.length_accuracy(measured).update_layout(width=920, height=440)
        with tempfile.TemporaryDirectory() as folder:
            figure.write_html(f"{folder}/figure.html", config={"displayModeBar": False})
            size = ["--window-size=940,460", "--hide-scrollbars", f"--user-data-dir={folder}/profile", "--virtual-time-budget=5000"]
            options = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", *size]
            subprocess.run([*options, f"--screenshot={HERE / 'length_accuracy.png'}", f"{folder}/figure.html"], check=True)


if __name__ == "__main__":
    main()
