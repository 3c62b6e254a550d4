"""What the commands print: tables that fit the terminal, lines of progress, and the next steps."""

from __future__ import annotations

import re

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

out, log = Console(), Console(stderr=True)
Column = tuple[str, list[str]]
"""Name of a column, and the texts of its cells."""
EDGE = 3  # width of a column besides its text: a blank on each side, and a line


def show(frame: pd.DataFrame, title: str) -> None:
    """Print a table with a title to the terminal. The index becomes the first column; floats have three significant digits.

    Lines are broken between words only. If the columns do not fit side by side, they are printed in several tables, one below the other,
    each with the index.
    """
    head = frame.index.name or ""
    index = [str(name) for name in frame.index]
    left: list[Column] = [(str(name), [_text(cell) for cell in frame.iloc[:, i]]) for i, name in enumerate(frame.columns)]
    out.print(Text(title, style="italic"))
    while True:
        chosen, room = [(head, index)], out.width - 1 - EDGE - _least(head, index)
        for name, cells in left:
            room -= EDGE + _least(name, cells)
            if room < 0 and len(chosen) > 1:
                break
            chosen.append((name, cells))
        out.print(_table(chosen))
        left = left[len(chosen) - 1 :]
        if not left:
            return


def _table(columns: list[Column]) -> Table:
    """Return a table whose columns are as wide as the terminal allows. The first column is the index."""
    table = Table()
    least = [_least(name, cells) for name, cells in columns]
    widths = [max(map(len, (_words(name), *cells))) for name, cells in columns]
    excess = sum(widths) + EDGE * len(widths) + 1 - out.width
    while excess > 0 and widths != least:
        # Narrow the widest column that still can be, so that short cells stay on one line.
        i = max((i for i, width in enumerate(widths) if width > least[i]), key=lambda i: widths[i])
        widths[i] -= 1
        excess -= 1
    for i, ((name, _), width) in enumerate(zip(columns, widths, strict=True)):
        table.add_column(Text(_words(name)), justify="right" if i else "left", width=width, overflow="fold")
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*map(Text, row))
    return table


def _least(name: str, cells: list[str]) -> int:
    """Return the width of the longest word of a column, at most half of the terminal."""
    words = [word for text in (_words(name), *cells) for word in text.split()]
    return min(max(map(len, words), default=1), out.width // 2)


def _words(name: str) -> str:
    """Return the name of a column with blanks for underscores, so that it can be broken into lines."""
    return re.sub(r"(?<=\w)_(?=\w)", " ", name)


def _text(cell: object) -> str:
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def say(text: str) -> None:
    """Print one line of progress to stderr."""
    log.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)


def name_files(text: str, *files: object) -> None:
    """Print a line to stdout that names files. The line is not broken, so that paths can be copied; any path is printed as it is.

    Args:
        text: The line, with ``{}`` in place of each file.
        files: Paths or addresses, shown in bold.
    """
    out.print(text.format(*(f"[bold]{escape(str(file))}[/bold]" for file in files)), highlight=False, soft_wrap=True)


def next_steps(**commands: str) -> None:
    """Print commands that a user may want to give next.

    Args:
        commands: What a command does, with underscores for blanks -> the command.
    """
    out.print("Next:", style="bold")
    for purpose, command in commands.items():
        out.print(f"  {command}  # {purpose.replace('_', ' ')}", style="dim", highlight=False, markup=False, soft_wrap=True)
