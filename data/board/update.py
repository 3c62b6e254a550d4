"""Publish a finished board: run ``toolkit board``, then ``python data/board/update.py [DIRECTORY]`` (default ``runs/board``).

Writes ``board.json``, ``table.parquet``, ``report.html`` and, if Chromium is installed, ``board.png`` beside this script. Updates the
README's table of the board, and in the README.md beside this script the line that names the code.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from toolkit import figures
from toolkit.board.page import write_page

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MADE_BY = re.compile(r"^Made by .*$", re.MULTILINE)  # this line of the README.md beside this script is replaced
NAMED = (
    "base",
    "ThinkEdit (ours), strength 2",
    "PEAR",
    "Surrogate format and length",
    "GRPO: naive length penalty",
    "Wait, once",
    "no re-checks",
    "asked to be quick",
)
"""Conditions with a label in the figure."""


def main() -> None:
    """Update all files."""
    sys.path.insert(0, str(HERE.parent))
    import publish
    import readme

    source = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "board"
    board = json.loads((source / "board.json").read_text())
    shutil.copyfile(source / "table.parquet", HERE / "table.parquet")
    (HERE / "board.json").write_text(json.dumps({k: v for k, v in board.items() if k != "figures"}, separators=(",", ":")) + "\n")
    write_page(board, HERE / "report.html")
    readme.update(["board"])
    card = HERE / "README.md"
    card.write_text(MADE_BY.sub(lambda _: f"Made by {board['provenance']['made_by']}.", card.read_text(), count=1))
    publish.draw(figures.pareto(board, labels=NAMED), HERE / "board.png", 1000, 520)


if __name__ == "__main__":
    main()
