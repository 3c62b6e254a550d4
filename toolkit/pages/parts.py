"""Parts of web pages as HTML: verdict, table, command, and values embedded as JSON."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from plotly.basedatatypes import BaseFigure

from toolkit import store


def asset(name: str, folder: str | Path = Path(__file__).parent) -> str:
    """Return the text of a file of the package, such as a style sheet.

    Args:
        name: Name of the file.
        folder: Its folder; by default that of the pages.
    """
    return "\n".join(store.read_lines(Path(folder) / name))


def embedded(value: Any) -> str:
    """Return a value as JSON text for a ``<script>`` element. The text has no ``<``, so it cannot close or open an HTML element."""
    return json.dumps(plain(value), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def plain(value: Any) -> Any:
    """Return a value converted to JSON types: keys to text, arrays to lists, plotly figures to mappings, NaN and infinity to ``None``."""
    if isinstance(value, BaseFigure):
        value = value.to_dict()
    elif hasattr(value, "tolist"):  # arrays and single numbers of numpy, pandas and torch
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return plain(store.jsonable(value))


def verdict_html(sentences: Sequence[str]) -> str:
    """Return the verdict box of a page as HTML, one paragraph per sentence; "" without sentences."""
    if not sentences:
        return ""
    said = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)
    return f"<div class='verdict-box' role='region' aria-label='Verdict'><h2>Verdict</h2>{said}</div>"


def command_html(command: str) -> str:
    """Return the command that makes a page again as HTML; "" without a command."""
    return f"<p>To make it again:</p><pre class='command'>{html.escape(command)}</pre>" if command else ""


def table_html(table: pd.DataFrame) -> str:
    """Return a table of text cells as HTML, with the index as first column. Text after a number, or in brackets, is put on a second line.

    Each cell names its column in ``data-column``, which the page shows where a table is too wide for the window.
    """
    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in (table.index.name or "condition", *table.columns))
    body = "".join(
        f"<tr><td>{html.escape(str(name))}</td>"
        + "".join(
            f"<td data-column='{html.escape(str(c))}'><span>{_lines(str(cell))}</span></td>"
            for c, cell in zip(table.columns, row, strict=True)
        )
        + "</tr>"
        for name, row in zip(table.index, table.itertuples(index=False), strict=True)
    )
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _lines(cell: str) -> str:
    """Return a cell's text as HTML. What follows a number, or is in brackets after a word, is in small type on a second line."""
    mean, _, rest = html.escape(cell).partition(" ")
    if not any(c.isdigit() for c in mean) and not rest.startswith(("(", "[")):  # such as "not reproduced"
        return html.escape(cell)
    return f"{mean}<br><small>{rest}</small>"
