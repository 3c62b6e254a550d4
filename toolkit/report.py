"""A study as files: ``report.json`` for machines, ``report.html`` for people (one file, works offline)."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from toolkit import evaluate, store
from toolkit.metrics import cell, described
from toolkit.types import Direction, Plan, Report

HEADLINE = ("accuracy", "think_tokens", "shortest_20", "shortest_20_same", "closed")
_PLOTLY = {"displaylogo": False, "responsive": True, "showSendToCloud": False}  # no button that hands the numbers to a site
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#222;max-width:1100px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.5rem}p{max-width:75ch}.wide{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;border-bottom:1px solid #ddd;text-align:right}td{white-space:nowrap}
th:first-child,td:first-child{text-align:left}small{color:#666}td.clear{font-weight:600}
pre{background:#f6f6f6;padding:1rem;overflow-x:auto;font-size:.8rem}
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, a paragraph that says how to read it, figures, and under them ``html``.

    ``html`` is a fragment such as a transcript or a :func:`table_html`. It goes into the page as it is: whoever writes it escapes names.
    """

    title: str
    text: str
    figures: tuple[go.Figure, ...] = ()
    html: str = ""


def judged_on(report: Report) -> str:
    """Whether the problems of a comparison are held out, in a sentence or two: what they are, what the conditions were made from, and
    how many problems are both."""
    notes = report.provenance.notes
    task, split = notes.get("task"), notes.get("split")
    asked = f"{notes['problems']} problems" + (f" of {task}" if task else "") + (f" ({split})" if split else "")
    made = {name: str(about["made_from"]) for name, about in report.conditions.items() if about.get("made_from")}
    overlap = {name: about["overlap"] for name, about in report.conditions.items() if about.get("overlap")}
    origin = f" Made from {' and '.join(dict.fromkeys(made.values()))}" if made else ""
    if overlap:
        worst = max(overlap.values())
        return (
            f"NOT held out: {asked}.{origin}; {worst} of these are among the {notes['problems']} judged on ({', '.join(overlap)})."
        )
    if made:
        unknown = [name for name, about in report.conditions.items() if name != report.base and not about.get("made_from")]
        rest = f" What {', '.join(unknown)} {'is' if len(unknown) == 1 else 'are'} made from is not recorded." if unknown else ""
        return f"Held-out problems: {asked}.{origin}, none of them judged on.{rest}"
    return (
        f"{asked[0].upper()}{asked[1:]}. What the models were made from is not recorded."
        if len(report.conditions) > 1
        else f"{asked}."
    )


def as_json(report: Report, summary: pd.DataFrame, **more: Any) -> dict[str, Any]:
    """``{"conditions": {name: {about..., "metrics": {metric: {mean, low, high}}}}, "paired": {...}, "provenance"}``."""
    conditions, paired = {}, {}
    for name, about in report.conditions.items():
        rows = summary[summary["condition"] == name].set_index("metric")
        own = {m: {k: float(row[k]) for k in ("mean", "low", "high")} for m, row in rows.iterrows()}
        conditions[name] = {**about, "metrics": own}
        if name != report.base:
            paired[name] = {
                m: {k: float(row[c]) for k, c in (("mean", "difference"), ("low", "difference_low"), ("high", "difference_high"))}
                for m, row in rows.iterrows()
            }
    return {"base": report.base, "conditions": conditions, "paired": paired, "provenance": report.provenance, **more}


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table for JSON; what has no value (NaN) is ``None``."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def board(summary: pd.DataFrame, *, base: str = "base", metrics: Sequence[str] = HEADLINE) -> pd.DataFrame:
    """Return the headline table as text cells: mean, and the paired difference to base with its 95 % interval."""
    rows = {}
    for name, part in summary.groupby("condition", sort=False):
        cells = part.set_index("metric")
        rows[name] = {described(m).label: _cell(m, cells.loc[m], name == base) for m in metrics if m in cells.index}
    return pd.DataFrame(rows).T


def _cell(metric: str, row: pd.Series, is_base: bool) -> str:
    own = {k: row[k] for k in ("mean", "low", "high")}
    change = {k: row[c] for k, c in (("mean", "difference"), ("low", "difference_low"), ("high", "difference_high"))}
    flat = own if is_base else change
    note = "no variance" if flat["low"] == flat["high"] else ""
    return cell(metric, own, None if is_base else change, note=note)


def page(title: str, intro: str, table: pd.DataFrame, sections: Sequence[Section], path: str | Path) -> Path:
    """Write one self-contained page: the table, then the sections with interactive figures."""
    parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p>", table_html(table)]
    first = True
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>")
        for figure in section.figures:
            # The library travels inside the page once, so that it works offline.
            parts.append(figure.to_html(full_html=False, include_plotlyjs=first, config=_PLOTLY))
            first = False
        parts.append(section.html)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    page = f"<!doctype html><html lang='en'><head>{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    return store.write_text(page, path)


def table_html(table: pd.DataFrame) -> str:
    """A table of text cells, rows named by its index; what follows a cell's first blank stands small under it."""
    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in (table.index.name or "condition", *table.columns))
    body = "".join(
        f"<tr><td>{html.escape(str(name))}</td>" + "".join(f"<td>{_lines(str(cell))}</td>" for cell in row) + "</tr>"
        for name, row in zip(table.index, table.itertuples(index=False), strict=True)
    )
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _lines(cell: str) -> str:
    mean, _, rest = html.escape(cell).partition(" ")
    return f"{mean}<br><small>{rest}</small>"


def write(directory: str | Path, report: Report, *, seed: int = 0, **more: Any) -> pd.DataFrame:
    """Write ``report.json`` and ``rows.parquet`` into a directory; returns the summary."""
    summary = evaluate.summary(report, seed=seed)
    store.write_json(as_json(report, summary, **more), Path(directory) / "report.json")
    store.save_table(report.rows, Path(directory) / "rows.parquet")
    return summary


def model_card(base: str, plan: Plan, heads: pd.DataFrame, table: pd.DataFrame, *, on: str) -> str:
    """Markdown card of an edited checkpoint: front matter, what was edited and why, how it measured.

    Args:
        on: What it was measured on: a sentence of :func:`judged_on`.
    """
    p = plan.provenance
    return f"""---
base_model: {_yaml(base)}
base_model_relation: finetune
library_name: transformers
pipeline_tag: text-generation
tags: [thinkedit, reasoning-length]
---
# {base}, edited to think less briefly

Weight edit after ThinkEdit (arXiv:2503.22048): `W_h <- (I - lambda v v^T) W_h` in the output projection of {len(plan.edits)} attention heads, with v the
direction of thinking length at each layer. No other weight differs from the base model. Plan: {plan.name}.

## Edited heads

{markdown(heads)}

## Why these

They write the most towards *short* thinking. {_origin(plan)} Base weights: SHA-256 `{p.fingerprint}`.

## Measured

{on} Mean, and in brackets the paired difference to base with its 95 % interval (bootstrap over problems). The controls edit other heads of the same layers,
or the same heads along random directions of those they can write.

{markdown(table)}

Made with reasoning-length-toolkit {p.toolkit_version}. `edit.json` holds the plan and the norms before and after, `direction.safetensors` the direction.
"""


def vector_card(direction: Direction, *, table: pd.DataFrame | None = None, on: str = "", figures: Sequence[str] = ()) -> str:
    """Markdown card of a folder of ``vectors.save_folder``: front matter, what the vector is, how to use it, how it measured.

    Args:
        table: Conditions by metrics, such as :func:`board` of a comparison; without one the card says that nothing was measured.
        on: What it was measured on: a sentence of :func:`judged_on`.
        figures: File names of figures in the folder.
    """
    p = direction.provenance
    layers, width = direction.vector.shape
    norms = ", ".join(f"{norm:.3g}" for norm in direction.norms.tolist())
    measured = "Nothing has been measured with it yet." if table is None else f"{on}\n\n{markdown(table)}".lstrip()
    return f"""---
base_model: {_yaml(p.model)}
library_name: reasoning-length-toolkit
pipeline_tag: text-generation
tags: [steering-vector, reasoning-length]
---
# Thinking length of {p.model}, as a steering vector

{_described(direction)} + is longer thinking, - is shorter.

| | |
| --- | --- |
| site | {direction.kind} |
| layers x width | {layers} x {width} |
| norm per layer | {norms} |
| base weights | SHA-256 `{p.fingerprint}` |
| revision, seed | {p.revision}, {p.seed} |

## Use

```python
from toolkit import edits, lm, vectors
from toolkit.lm import Condition

base = lm.load({json.dumps(p.model, ensure_ascii=False)})
direction = vectors.load("direction.safetensors", base)
shorter = Condition(base, (edits.steering(direction, -0.05),))  # the strength is an example: choose it on a development split
```

`direction.gguf`, if it is here, is the same vector for llama.cpp (`--control-vector-scaled`), without layer 0.

## Measured

{measured}

{"".join(f"- [{name}]({name})" + chr(10) for name in figures)}
Made with reasoning-length-toolkit {p.toolkit_version}.
"""


def _yaml(name: str) -> str:
    """A name as YAML text: as it is where that is plainly a string, else as a string of JSON, which is one of YAML too."""
    return name if re.fullmatch(r"[A-Za-z]+[-/][\w./-]*\w", name, re.ASCII) else json.dumps(name, ensure_ascii=False)


def _origin(plan: Plan) -> str:
    return "" if plan.direction is None else _described(plan.direction)


def _described(v: Direction) -> str:
    return f"The direction is the {v.estimator} at {v.kind} over {v.positions} positions of {v.n_pos} long and {v.n_neg} short rollouts."


def markdown(table: pd.DataFrame) -> str:
    """A table as GitHub markdown."""
    head = [table.index.name or "", *map(str, table.columns)]
    rows = [
        [str(name), *(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row)]
        for name, row in zip(table.index, table.itertuples(index=False), strict=True)
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])
