"""A web page of results: what it shows (``Page``), and the file that it becomes (``write``)."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from toolkit import store
from toolkit.pages.parts import asset, command_html, embedded, plain, table_html, verdict_html

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
    "worker-src blob:; base-uri 'none'; form-action 'none'"
)
"""Content security policy of a page: it forbids every request to a network."""


@dataclass(frozen=True)
class Section:
    """A section of a web page.

    Attributes:
        title: Heading.
        text: Paragraph that says how to read the section.
        figures: Interactive figures (plotly). Their titles and subtitles are shown above them.
        html: HTML under the figures, such as a transcript or the result of ``table_html``. It is inserted unchanged, so plain text in it
            must already be escaped.
    """

    title: str
    text: str
    figures: tuple[go.Figure, ...] = ()
    html: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a web page shows, in the order of reading.

    Attributes:
        title: Heading of the page.
        verdict: Sentences of the verdict box, such as from ``verdicts.of_summary``. Without sentences there is no box.
        main: Section with the main figure, above the table; ``None`` for none.
        table: Table of text cells, such as from ``report.headline_table``.
        caption: How to read the table.
        sections: Further sections, in order. Transcripts come last.
        made: How the results were made, as plain text.
        command: Command that makes the page again; "" if no single command does.
    """

    title: str
    table: pd.DataFrame
    caption: str
    verdict: Sequence[str] = ()
    main: Section | None = None
    sections: Sequence[Section] = ()
    made: str = ""
    command: str = ""


def write(page: Page, path: str | Path) -> Path:
    """Write a page as one HTML file that opens from disk without a network, and return its path.

    Args:
        page: What the page shows.
        path: File to write.
    """
    figures: list[dict[str, Any]] = []
    title = html.escape(page.title)
    caption = f"<section><h2>Table</h2><p class='how'>{html.escape(page.caption)}</p>{table_html(page.table)}</section>"
    parts = [f"<h1>{title}</h1>", verdict_html(page.verdict)]
    parts += [_section(page.main, figures)] if page.main else []
    parts += [caption, *(_section(section, figures) for section in page.sections)]
    if page.made or page.command:
        parts.append(f"<section><h2>How it was made</h2><p>{html.escape(page.made)}</p>{command_html(page.command)}</section>")
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{asset('base.css')}\n{asset('page.css')}</style>"
    )
    # The data come before the scripts, and plotly only if there is something to draw.
    scripts = [f"<script>{text}</script>" for text in (get_plotlyjs(), asset("plots.js"), asset("page.js"))] if figures else []
    data = f"<script type='application/json' id='figures'>{embedded(figures)}</script>"
    body = f"{''.join(parts)}{data}{''.join(scripts)}"
    return store.write_text(f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>", path)


def _section(section: Section, figures: list[dict[str, Any]]) -> str:
    """Return a section as HTML, and append its figures to ``figures``, where the script of the page finds them by number."""
    drawn = ""
    for figure in section.figures:
        name, note = html.escape(figure.layout.title.text or ""), html.escape(figure.layout.title.subtitle.text or "")
        label = name or html.escape(section.title)
        drawn += (
            f"<figure><figcaption>{name}{f'<br><small>{note}</small>' if note else ''}</figcaption>"
            f"<div class='frame'><div class='plot' data-figure='{len(figures)}' role='img' aria-label='{label}'></div></div></figure>"
        )
        figures.append(plain(figure))
    text = f"<p>{html.escape(section.text)}</p>" if section.text else ""
    return f"<section><h2>{html.escape(section.title)}</h2>{text}{drawn}{section.html}</section>"
