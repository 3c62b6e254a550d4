"""Write a board as one web page: ``write_page(board, path)`` makes a self-contained ``report.html`` that works offline.

The page holds the numbers as JSON, and ``page.js`` draws them in the browser with an embedded plotly.js. The content security policy of
the page forbids every network request, and no text of the board is interpreted as HTML.

``board`` is a mapping with the parts below. If a part is missing, the page leaves its section out.

* Shares are from 0 to 1, and intervals (``low, high``) are 95 %.
* ``conditions`` has one entry per condition. ``paired`` has one entry per condition except base: differences from base, condition minus
  base. ``p`` is the p-value of a difference, and ``p_holm`` the same after Holm's correction.
* ``cells`` has one entry per task and difficulty. ``n`` is its number of problems; ``accuracy`` and ``think_tokens`` hold
  ``mean, low, high``.
* ``front`` is the probability that the condition is on the Pareto front of accuracy and think tokens.
* ``metrics`` has the texts of each metric: ``better`` says whether high or low values are good, ``help`` explains the metric.
* ``think`` and ``answer`` are the parts of a response's ``text``, or null; ``open`` says that thinking was never closed.
* ``curves`` has the learning curves of trained conditions, one per seed: held-out accuracy and think tokens by training step.
* ``cost`` holds means over seeds. ``tokens`` and ``seconds`` are totals of all responses to the problems of the main tasks.
* ``command`` makes the board again. The verdict at the top of the page is written from ``conditions`` and ``paired`` (``verdicts.of_board``).
* ``provenance`` describes the base model, the code, the sizes and the number of problems. The page shows all its keys.

::

    {"title": str, "base": str, "provenance": {...},
     "conditions": {name: {"family", "note", "seeds", "paper", "metrics": {metric: {"mean", "low", "high"}},
                           "cells": {task: {difficulty: {"n", "accuracy": {...}, "think_tokens": {...}}}},
                           "cost": {"tokens", "seconds", "parameters_changed", "training_steps"},
                           "front": float}},
     "paired": {name: {metric: {"mean", "low", "high", "p", "p_holm"}}},
     "metrics": {metric: {"label", "unit": "share|tokens|nats|score|number", "better": "high|low|none",
                          "group": "main|damage|budget|mechanism|cost", "help"}},
     "tasks": ["all", ...], "difficulties": ["all", ...],
     "examples": [{"id", "task", "difficulty", "prompt", "answer", "responses": {name: {"text", "think", "answer", "open", "correct",
                                                                                                   "think_tokens"}}}],
     "curves": {name: [{"seed", "step": [...], "accuracy": [...], "think_tokens": [...]}]},
     "figures": [{"title", "text", "figure": {"data", "layout"}}],
     "methods": [{"title", "text"}], "command": str}
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from toolkit import pages, store, verdicts

HERE = Path(__file__).parent


def write_page(board: Mapping[str, Any], path: str | Path) -> Path:
    """Write a board as one HTML file that opens from disk without a network, and return its path.

    Args:
        board: Mapping with the parts listed at the top of this module.
        path: File to write.

    Raises:
        ValueError: ``board["base"]`` (``"base"`` if it is missing) is not one of the conditions.
    """
    conditions, base = board.get("conditions") or {}, board.get("base", "base")
    if conditions and base not in conditions:
        raise ValueError(
            f"base {base!r} is not among the conditions ({', '.join(map(str, conditions))}): name the one to compare with."
        )
    template, style, script = (pages.asset(f"page.{kind}", HERE) for kind in ("html", "css", "js"))
    verdict = verdicts.of_board(board) if conditions and board.get("paired") else []
    parts = {
        "title": html.escape(str(board.get("title", "The board"))),
        "style": f"{pages.asset('base.css')}\n{style}",
        "verdict": pages.verdict_html(verdict),
        "command": pages.command_html(str(board.get("command") or "")),
        "data": pages.embedded(board),
        "plotly": get_plotlyjs(),
        "script": f"{pages.asset('plots.js')}\n{script}",
    }
    return store.write_text(Template(template).substitute(parts), path)
