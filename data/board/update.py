"""Publish a finished board: run ``toolkit board``, then ``python data/board/update.py [DIRECTORY]`` (default ``runs/board``).

Writes ``board.json``, ``table.parquet``, ``report.html`` and, if Chromium is installed, ``board.png`` beside this script. Updates the
README's table of the board, and in the README.md beside this script the line that names the code.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import publish

from toolkit import figures
from toolkit.board.page import write_page
from toolkit.board.reading import sections

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MADE_BY = re.compile(r"^Made by .*$", re.MULTILINE)  # this line of the README.md beside this script is replaced
COLOURED = ("ThinkEdit (ours), strength 2", "GRPO-lambda")
"""Conditions in colour: the most accurate edit, and the most accurate trained policy."""
NAMED = (
    "2 retrieval heads masked", "control: 2 random heads masked", "GRPO: naive length penalty", "NoWait", "CREST, 8 heads", "budget of 12",
    "asked to be quick", "PEAR",
)  # fmt: skip
"""Further conditions with a label in the figure."""


def draw(board: Mapping[str, Any]) -> None:
    """Write ``board.png``: two conditions in colour, base and all others in grey.

    Raises:
        KeyError: a condition with a colour or a label is not on the board.
    """
    if missing := [name for name in (*COLOURED, *NAMED) if name not in board["conditions"]]:
        raise KeyError(f"The board has no condition {missing[0]!r}, which COLOURED or NAMED lists: give a name that is on it.")
    figure = figures.highlighted(board, COLOURED, labels=NAMED)
    publish.draw(figure, HERE / "board.png", 1000, 520)


def main() -> None:
    """Update all files."""
    import readme

    source = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "board"
    board = json.loads((source / "board.json").read_text())
    shutil.copyfile(source / "table.parquet", HERE / "table.parquet")
    (HERE / "board.json").write_text(json.dumps({k: v for k, v in board.items() if k != "figures"}, separators=(",", ":")) + "\n")
    write_page({**board, "figures": sections(board), "command": "toolkit board --jobs 2"}, HERE / "report.html")
    readme.update(["board"])
    card = HERE / "README.md"
    card.write_text(MADE_BY.sub(lambda _: f"Made by {board['provenance']['made_by']}.", card.read_text(), count=1))
    draw(board)


if __name__ == "__main__":
    main()
