"""Web pages of results that work offline: ``write`` makes one file with a verdict, figures, tables and transcripts.

``Page`` says what a page shows, in the order of reading. ``base.css`` and ``plots.js`` are shared with the page of the board. ``plots.js``
draws the figures so that they fit the width of the window. ``responses`` shows responses side by side.
"""

from toolkit.pages.page import Page, Section, write
from toolkit.pages.parts import asset, command_html, embedded, plain, table_html, verdict_html

__all__ = ["Page", "Section", "asset", "command_html", "embedded", "plain", "table_html", "verdict_html", "write"]
