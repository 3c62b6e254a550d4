"""Take the committed board, and the README's table and figure, from a finished one: ``toolkit board``, then ``python data/board/update.py``.

Writes ``board.json``, ``table.parquet`` and ``report.html`` beside this script, ``board.png`` (if Chromium is installed), and the table
between the README's board marks, and the line beside this script that says what code made it. ``python data/board/update.py OTHER`` reads another directory than ``runs/board``.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from toolkit import figures, report
from toolkit.board import shown
from toolkit.board.page import page

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MADE_BY = re.compile(r"^Made by .*$", re.MULTILINE)  # the line of the README beside this script
METRICS = ("accuracy", "think_tokens", "shortest_20", "accuracy_lookup", "aes")
ROWS = (
    "base", "ThinkEdit, as published", "ThinkEdit 1", "control: random heads edited", "control: random direction edited", "steered -0.5", "steered +0.5",
    "control: steered randomly +0.5", "Efficiency Steering -0.25", "budget of 24", "Wait, once", "no re-checks", "asked to be quick", "GRPO: correctness",
    "GRPO: naive length penalty", "GRPO-lambda", "DLER", "DLER, merged", "LASER-D", "HAPO", "DRPO", "SLPO", "SAR", "PEAR", "Train Long, Think Short",
    "Efficient Reasoning", "Surrogate format and length", "ThinkEdit 1, then GRPO-lambda", "GRPO-lambda, then steered -0.5",
)  # fmt: skip
"""What the README shows of the board."""
NAMED = (
    "base",
    "ThinkEdit 2",
    "PEAR",
    "Surrogate format and length",
    "GRPO: naive length penalty",
    "Wait, once",
    "no re-checks",
    "asked to be quick",
)
"""What its figure names."""


def readme_table(board: dict) -> str:
    """The README's table."""
    table = shown(board, METRICS)
    return report.markdown(table.loc[[name for name in ROWS if name in table.index]])


def main() -> None:
    """Update all of it."""
    sys.path.insert(0, str(HERE.parent))
    import publish

    source = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "board"
    board = json.loads((source / "board.json").read_text())
    shutil.copyfile(source / "table.parquet", HERE / "table.parquet")
    (HERE / "board.json").write_text(json.dumps({k: v for k, v in board.items() if k != "figures"}, separators=(",", ":")) + "\n")
    page(board, HERE / "report.html")
    publish.splice("board", readme_table(board))
    own = HERE / "README.md"
    own.write_text(MADE_BY.sub(lambda _: f"Made by {board['provenance']['made_by']}.", own.read_text(), count=1))
    publish.draw(figures.pareto(board, labels=NAMED), HERE / "board.png", 1000, 520)


if __name__ == "__main__":
    main()
