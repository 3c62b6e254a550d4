"""Write the results of a comparison of conditions: ``report.json``, a web page that works offline, and model cards."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go

from toolkit import evaluate, store
from toolkit.metrics import cell, described
from toolkit.stats import NO_VARIANCE
from toolkit.types import Direction, Plan, Report

HEADLINE = ("accuracy", "think_tokens", "shortest_20", "shortest_20_same", "closed")
_PLOTLY = {"displaylogo": False, "responsive": True, "showSendToCloud": False}  # no button that sends the data to a website
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
    """A section of a web page (see ``write_page``).

    Attributes:
        title: Heading.
        text: Paragraph that says how to read the section.
        figures: Interactive figures (plotly).
        html: HTML under the figures, such as a transcript or the result of ``table_html``. It is inserted unchanged, so plain text in it
            must already be escaped.
    """

    title: str
    text: str
    figures: tuple[go.Figure, ...] = ()
    html: str = ""


def judged_on(report: Report) -> str:
    """Return a text that names the problems on which the conditions of a report were compared, and says whether they were held out.

    The problems are held out if none of them was used to edit, steer or train a condition. For conditions without a record of the problems
    used, the text says so.
    """
    notes = report.provenance.notes
    task, split = notes.get("task"), notes.get("split")
    problems = f"{notes['problems']} problems" + (f" of {task}" if task else "") + (f" ({split})" if split else "")
    problems += f", sampled by {notes['engine']}" if "engine" in notes else ""
    made = {name: str(about["made_from"]) for name, about in report.conditions.items() if about.get("made_from")}
    overlap = {name: about["overlap"] for name, about in report.conditions.items() if about.get("overlap")}
    origin = f" The conditions were made from {' and '.join(dict.fromkeys(made.values()))}" if made else ""
    if overlap:
        worst = max(overlap.values())
        return f"NOT held out: {problems}.{origin}, {worst} of them among these {notes['problems']} ({', '.join(overlap)})."
    if made:
        unknown = [name for name, about in report.conditions.items() if name != report.base and not about.get("made_from")]
        rest = f" Not recorded: the problems that were used to make {', '.join(unknown)}." if unknown else ""
        return f"Held-out problems: {problems}.{origin}, none of them among these {notes['problems']}.{rest}"
    return (
        f"{problems[0].upper()}{problems[1:]}. Not recorded: the problems that were used to make the models."
        if len(report.conditions) > 1
        else f"{problems}."
    )


def as_json(report: Report, summary: pd.DataFrame, **more: Any) -> dict[str, Any]:
    """Return a report and its summary as a dict that JSON can store.

    Args:
        summary: Table from ``evaluate.summary``.
        more: Additional entries of the dict.

    Returns:
        A dict with these keys and the keys of ``more``; intervals are 95 %:

        * ``base``: name of the base condition.
        * ``conditions``: name of a condition -> its description from ``Report.conditions``, with the added key ``metrics``:
          ``{metric: {"mean", "low", "high"}}``.
        * ``paired``: name of a condition -> ``{metric: {"mean", "low", "high"}}``, the differences from base (condition minus base), paired
          by problem. Base has no entry.
        * ``provenance``: ``Report.provenance``.
    """
    conditions, paired = {}, {}
    for name, about in report.conditions.items():
        rows = summary[summary["condition"] == name].set_index("metric")
        metrics = {m: {k: float(row[k]) for k in ("mean", "low", "high")} for m, row in rows.iterrows()}
        conditions[name] = {**about, "metrics": metrics}
        if name != report.base:
            paired[name] = {
                m: {k: float(row[c]) for k, c in (("mean", "difference"), ("low", "difference_low"), ("high", "difference_high"))}
                for m, row in rows.iterrows()
            }
    return {"base": report.base, "conditions": conditions, "paired": paired, "provenance": report.provenance, **more}


def json_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as a list of dicts for JSON; missing values (NaN) become ``None``."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def headline_table(summary: pd.DataFrame, *, base: str = "base", metrics: Sequence[str] = HEADLINE) -> pd.DataFrame:
    """Return a table of text cells for reports, one row per condition and one column per metric.

    A cell holds the mean and, in brackets, the paired difference from base (condition minus base) with its 95 % interval. Shares are in
    percent.

    Args:
        summary: Table from ``evaluate.summary``.
        base: Name of the base condition. Its cells hold the mean with the interval of the mean.
        metrics: Names of the metrics; those that the summary lacks are left out.
    """
    rows = {}
    for name, part in summary.groupby("condition", sort=False):
        cells = part.set_index("metric")
        rows[name] = {described(m).label: _cell(m, cells.loc[m], name == base) for m in metrics if m in cells.index}
    return pd.DataFrame(rows).T


def _cell(metric: str, row: pd.Series, is_base: bool) -> str:
    """Return the text of one cell of ``headline_table``, from a row of the summary."""
    estimate = {k: row[k] for k in ("mean", "low", "high")}
    change = {k: row[c] for k, c in (("mean", "difference"), ("low", "difference_low"), ("high", "difference_high"))}
    interval = estimate if is_base else change
    note = NO_VARIANCE if interval["low"] == interval["high"] else ""
    return cell(metric, estimate, None if is_base else change, note=note)


def write_page(title: str, intro: str, table: pd.DataFrame, sections: Sequence[Section], path: str | Path) -> Path:
    """Write a self-contained HTML page: title, introduction, table, and sections with interactive figures. Return its path.

    Args:
        title: Heading of the page.
        intro: Paragraph under the heading, as plain text.
        table: Table of text cells, such as from ``headline_table``. The text after a cell's first space is put on a second line.
        sections: Sections, in order.
        path: File to write.
    """
    parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p>", table_html(table)]
    first = True
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>")
        for figure in section.figures:
            # The first figure brings the plotly library into the page, so that the page works offline.
            parts.append(figure.to_html(full_html=False, include_plotlyjs=first, config=_PLOTLY))
            first = False
        parts.append(section.html)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    page = f"<!doctype html><html lang='en'><head>{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    return store.write_text(page, path)


def table_html(table: pd.DataFrame) -> str:
    """Return a table of text cells as HTML, with the index as first column. Text after a cell's first space is put on a second line."""
    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in (table.index.name or "condition", *table.columns))
    body = "".join(
        f"<tr><td>{html.escape(str(name))}</td>" + "".join(f"<td>{_lines(str(cell))}</td>" for cell in row) + "</tr>"
        for name, row in zip(table.index, table.itertuples(index=False), strict=True)
    )
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _lines(cell: str) -> str:
    """Return a cell's text as HTML: the part before the first space, and the rest in small type on a second line."""
    mean, _, rest = html.escape(cell).partition(" ")
    return f"{mean}<br><small>{rest}</small>"


def write(directory: str | Path, report: Report, *, seed: int = 0, **more: Any) -> pd.DataFrame:
    """Summarise a report, and write it into a directory: ``report.json`` (see ``as_json``) and ``rows.parquet`` (one row per rollout).

    Args:
        directory: Directory to write to.
        report: Results of the comparison.
        seed: Random seed of the bootstrap that gives the intervals of the summary.
        more: Additional entries of ``report.json``.

    Returns:
        The summary, a table from ``evaluate.summary``.
    """
    summary = evaluate.summary(report, seed=seed)
    store.write_json(as_json(report, summary, **more), Path(directory) / "report.json")
    store.save_table(report.rows, Path(directory) / "rows.parquet")
    return summary


def model_card(base: str, plan: Plan, heads: pd.DataFrame, table: pd.DataFrame, *, on: str) -> str:
    """Return the model card of an edited checkpoint as markdown: front matter, description of the edit, edited heads, measurements.

    Args:
        base: Name of the base model.
        plan: The edit, as a ``Plan``.
        heads: Table with one row per edited head, such as from ``jobs.plan_table``; all columns are shown.
        table: Measurements, from ``headline_table``.
        on: Text that names the problems of the measurements, from ``judged_on``.
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

## Why these heads

These heads contribute most towards *short* thinking. {_origin(plan)} Base weights: SHA-256 `{p.fingerprint}`.

## Measured

{on} A cell holds the mean and, in brackets, the paired difference from base (condition minus base) with its 95 % interval (bootstrap over problems). The controls
edit other heads of the same layers, or the same heads along random directions that these heads can write.

{markdown(table)}

Made with reasoning-length-toolkit {p.toolkit_version}. `edit.json` holds the plan and the norms of the edited heads' weights before and after, `direction.safetensors` the direction.
"""


def plan_card(base: str, plan: Plan, kind: Literal["adapter", "merged", "plan"]) -> str:
    """Return the card of a plan of head edits as markdown: front matter, how to use it, edited heads.

    The card says that nothing was measured. For a card with measurements, see ``model_card``.

    Args:
        base: Name of the base model.
        plan: The plan.
        kind: What the folder holds: a PEFT adapter, a checkpoint with the edit in its weights, or only the plan.
    """
    p = plan.provenance
    relation = {"adapter": "adapter", "merged": "finetune", "plan": "adapter"}[kind]
    library = {"adapter": "peft", "merged": "transformers", "plan": "reasoning-length-toolkit"}[kind]
    use = {
        "adapter": 'PeftModel.from_pretrained(model, "this folder")',
        "merged": 'AutoModelForCausalLM.from_pretrained("this folder")',
        "plan": 'edits.apply(base, store.load("plan.safetensors", Plan))',
    }[kind]
    heads = pd.DataFrame([(e.layer, e.head, e.op, e.strength) for e in plan.edits], columns=["layer", "head", "op", "strength"])
    return f"""---
base_model: {_yaml(base)}
base_model_relation: {relation}
library_name: {library}
pipeline_tag: text-generation
tags: [reasoning-length]
---
# {base}, with {len(plan.edits)} attention heads edited

{plan.name}. `project_out` removes a direction v from a head's output, `W_h <- (I - strength v v^T) W_h`; `scale` shrinks it,
`W_h <- (1 - strength) W_h`. W_h holds the head's columns of the output projection. {_origin(plan)} Use: `{use}`.

## Edited heads

{markdown(heads.rename_axis("edit"))}

## Measured

Nothing has been measured with these files yet. Base weights: SHA-256 `{p.fingerprint}`, revision {p.revision}.

Made with reasoning-length-toolkit {p.toolkit_version}.
"""


def vector_card(direction: Direction, *, table: pd.DataFrame | None = None, on: str = "", figures: Sequence[str] = ()) -> str:
    """Return the model card of a steering vector as markdown: front matter, description of the vector, how to use it, measurements.

    The card is for a folder that ``vectors.save_folder`` writes.

    Args:
        direction: The steering vector.
        table: Measurements, such as from ``headline_table``. If ``None``, the card says that nothing was measured.
        on: Text that names the problems of the measurements, from ``judged_on``. Not used without ``table``.
        figures: File names of figures in the folder, to which the card links.
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
    """Return a name as a YAML string. A name of a common form, such as ``Qwen/Qwen3-1.7B``, stays as it is; any other is quoted.

    Without quotes, YAML would read ``1.5`` as a number and ``no`` as a boolean.
    """
    return name if re.fullmatch(r"[A-Za-z]+[-/][\w./-]*\w", name, re.ASCII) else json.dumps(name, ensure_ascii=False)


def _origin(plan: Plan) -> str:
    return "" if plan.direction is None else _described(plan.direction)


def _described(v: Direction) -> str:
    return f"The direction is the {v.estimator} at {v.kind} over {v.positions} positions of {v.n_pos} long and {v.n_neg} short rollouts."


def markdown(table: pd.DataFrame) -> str:
    """Return a table as GitHub markdown, with the index as first column. Floats have three digits after the decimal point."""
    head = [table.index.name or "", *map(str, table.columns)]
    rows = [
        [str(name), *(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row)]
        for name, row in zip(table.index, table.itertuples(index=False), strict=True)
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])
