"""Write the results of a comparison of conditions: ``report.json``, its web page, and model cards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from toolkit import claims, difficulty, evaluate, figures, store, verdicts
from toolkit.claims import Claim
from toolkit.lm import LM
from toolkit.metrics import described, row_cell
from toolkit.pages import Page, Section, table_html
from toolkit.pages.responses import side_by_side
from toolkit.types import Direction, Plan, Problem, Report

HEADLINE = ("accuracy", "think_tokens", "shortest_20", "shortest_20_same", "closed")


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
        rows[name] = {described(m).label: row_cell(m, cells.loc[m], is_base=name == base) for m in metrics if m in cells.index}
    return pd.DataFrame(rows).T


def comparison_page(
    title: str, report: Report, summary: pd.DataFrame, *, sections: Sequence[Section] = (), command: str = ""
) -> Page:
    """Return the web page of a comparison: verdict, accuracy against length, table, differences from base, and how it was made.

    Args:
        title: Heading of the page.
        report: Results of ``evaluate.compare``.
        summary: Table from ``evaluate.summary``.
        sections: Further sections, such as transcripts, which come last.
        command: Command that makes the page again; "" if no single command does.
    """
    sections = [*(_against_base(report, summary) if len(report.conditions) > 1 else []), *sections]
    sampling = report.provenance.notes.get("sampling", {})
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in sampling.items() if value is not None)
    return Page(
        title=title,
        verdict=verdicts.of_summary(summary, base=report.base),
        main=Section(
            "Accuracy against length",
            "Bars are 95 % intervals. Blue: more accurate than base. Brown: less accurate. Dark grey: no effect on accuracy detectable.",
            (figures.length_accuracy(summary, base=report.base),),
        ),
        table=headline_table(summary, base=report.base),
        caption="Mean and, in brackets, the paired difference from base (condition minus base) with its 95 % bootstrap interval over problems.",
        sections=sections,
        made=f"{judged_on(report)} All conditions answer the same problems with the same random numbers. Sampling: {settings}.",
        command=command,
    )


def _against_base(report: Report, summary: pd.DataFrame) -> list[Section]:
    """Return the sections of a page that compare conditions with base: differences, accuracy at token budgets, levels of difficulty."""
    metrics = [m for m in ("think_tokens", "accuracy", "shortest_20", "shortest_20_same") if m in set(summary["metric"])]
    effects = Section(
        "What changes",
        "Condition minus base, paired by problem. Filled dots: the interval excludes zero. Blue is better, brown is worse, dark grey is "
        "neither. Open dots: no effect detectable at this sample size. Grey crosses: random controls.",
        tuple(figures.differences(summary, m, base=report.base) for m in metrics),
    )
    budgets = Section(
        "Accuracy at token budgets",
        "A response that is longer than the budget counts as wrong. Budgets reach to twice base's mean response length.",
        (figures.accuracy_at_budgets(evaluate.accuracy_at_budgets(report), base=report.base),),
    )
    return [effects, budgets, *_by_difficulty(report)]


def _by_difficulty(report: Report) -> list[Section]:
    """Return the section on levels of difficulty; none if fewer than two levels have enough problems."""
    levels, origin = difficulty.levels_for(report)
    origin += f" Levels with fewer than {difficulty.assumed_problems} problems are left out."
    table = difficulty.by_level(report, levels)
    if table["level"].nunique() < 2:
        return []
    if difficulty.HARDER in set(table["level"]):
        origin += (
            " The last column holds the values on hard problems minus those on easy ones. In brackets: how much larger the difference from base "
            "is on hard problems."
        )
    drawn = figures.by_level(table, base=report.base)
    return [Section("By difficulty", origin, (drawn,), table_html(difficulty.text_table(table, base=report.base)))]


def claims_page(title: str, effects: Sequence[Claim], *, made: str, command: str = "") -> Page:
    """Return the web page of published effects: verdict, figure, table of claims, and how it was made.

    Args:
        title: Heading of the page.
        effects: Claims with their measurements.
        made: How the effects were measured.
        command: Command that makes the page again; "" if no single command does.
    """
    main = Section(
        "Effects",
        "Right of 0: in the direction that the paper claims. The dotted line is the smallest effect that matters, which is our choice. Blue: "
        "reproduced. Brown: contradicted. Open: neither. Grey crosses: larger than with a random control?",
        (figures.claimed(effects),),
    )
    caption = f"+ is the direction that the paper claims, with 95 % intervals; shares are in percentage points. {claims.CONTROLS}"
    table = claims.verdict_table(effects)
    return Page(
        title=title, verdict=verdicts.of_claims(effects), main=main, table=table, caption=caption, made=made, command=command
    )


def transcripts(
    lms: Mapping[str, LM], report: Report, problems: Sequence[Problem], rollouts: str | Path, *, count: int = 3
) -> Section:
    """Return a section with responses of base and of up to three other conditions, side by side.

    It shows the first problems on which the first sample of base differs from that of another condition; they are not selected for what
    they show. Random controls are left out.

    Args:
        lms: Name of a condition -> its model, whose tokenizer made its tokens.
        report: Results of ``evaluate.compare``.
        problems: Problems of the comparison.
        rollouts: Directory of rollouts, the argument ``out`` of ``evaluate.compare``.
        count: Largest number of problems.
    """
    names = [report.base, *(n for n in report.conditions if n != report.base and not verdicts.is_control(n))][:4]
    first = {
        name: {r.problem_id: r for r in store.load_rollouts(evaluate.rollout_folder(rollouts, name)) if r.sample == 0}
        for name in names
    }
    differ = [p for p in problems if len({first[name][p.id].text for name in names}) > 1] if len(names) > 1 else list(problems)
    shown = [side_by_side(lms, p, {name: first[name][p.id] for name in names}) for p in differ[:count]]
    which = "The first problems on which the conditions respond differently" if len(names) > 1 else "The first problems"
    text = f"{which}, sample 0 of each; not selected for what they show."
    return Section("Transcripts", text if shown else "All conditions give the same first responses.", html="".join(shown))


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
edit other heads of the same layers, or the same heads along directions between random groups of responses.

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
