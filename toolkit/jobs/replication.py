"""The command ``toolkit replicate``: run the plan of a replication in order, and put the paper's numbers beside the measured ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from toolkit import claims, evaluate, generate, pages, report, store
from toolkit.claims import Claim
from toolkit.engines import OWN_LOOP, Engine
from toolkit.jobs import edit
from toolkit.jobs.claims_ground import CONTROL, Comparison
from toolkit.jobs.claims_page import posting_table
from toolkit.jobs.finding import Finding, find_heads, form_named, plan_table
from toolkit.jobs.replication_plan import NOT_FOUND, Published, Replication, SamplingPart, said
from toolkit.jobs.study import Say, origin
from toolkit.lm import LM, Condition
from toolkit.methods import thinkedit
from toolkit.metrics import described, with_interval
from toolkit.pages import Section, table_html
from toolkit.tasks import load
from toolkit.types import Problem, Report

BASE, EDITED = "base", "edited"


def replicate(
    lm: LM, plan: Replication, directory: str | Path, *, engine: Engine = OWN_LOOP, say: Say = lambda text: None, command: str = ""
) -> pd.DataFrame:
    """Run a replication: rollouts, direction and heads, edit, comparison with random controls, report.

    After a stop, call it again with the same arguments: finished rollouts are reused; directions and scores are computed again.

    Args:
        lm: The model of the plan.
        plan: The plan.
        directory: Directory to write to: ``report.html``, ``replication.json``, ``report.md``, ``edited/`` (the model), and ``rollouts/``.
        engine: Program that samples the tokens.
        say: Function that is called with one line of progress at a time.
        command: Command that makes the report again, to be shown in it.

    Returns:
        The table of ``beside``.

    Raises:
        ValueError: the sizes of the model are not those of the plan.
        thinkedit.ClassTooSmallError: the problems of the train split are too few. Nothing is sampled then.
        FileExistsError: ``edited/`` holds a model that was edited in another way.
        engines.CannotSampleError: the engine cannot sample from an edited model. Nothing is sampled then.
    """
    check_sizes(lm, plan)
    engine.check_edits()
    out, seed = store.writable(directory), plan.run.seed
    settings = plan.edit.settings(seed)
    problems = {test.label: problems_of(test, seed, lm) for test in plan.tests}  # before the long part: a data set may be missing
    say(f"1 of 4: up to {plan.train.responses} rollouts of {plan.train.task}")
    about = origin(plan.train.task, plan.train.splits[0], seed)
    sampling, training = plan.train.sampling(seed, plan.run.batch_size), problems_of(plan.train, seed, lm)
    thinkedit.check_enough(len(training) * sampling.n)
    rollouts = generate.rollouts(lm, training, sampling, engine=engine, out=out / "rollouts" / "train", about=about)
    say("2 of 4: direction, head scores and edit")
    finding = find_heads(lm, rollouts, settings, form_named(plan.edit.form), origin=about)
    saved = edit.is_saved(lm, finding, out / "edited")  # raises for another model there, before the long part
    conditions = conditions_of(lm, finding, plan)
    reports: dict[str, Report] = {}
    for i, test in enumerate(plan.tests, 1):
        say(f"3 of 4: {len(conditions)} conditions on {test.label}, test {i} of {len(plan.tests)}")
        where = out / "rollouts" / store.safe_name(test.label)
        sampling = test.sampling(seed, plan.run.batch_size)
        reports[test.label] = evaluate.compare(conditions, problems[test.label], sampling, engine=engine, out=where)
    say("4 of 4: report")
    summaries = {name: evaluate.summary(measured, seed=seed) for name, measured in reports.items()}
    if not saved:
        first = plan.tests[0].label
        edit.save_edited(lm, finding, reports[first], summaries[first], out / "edited")
    table = beside(plan.published, summaries)
    judged = [claim for name, measured in reports.items() for claim in judged_claims(name, Comparison(measured, seed), plan)]
    _write(lm, plan, finding, table, judged, reports, out, command)
    return table


def check_sizes(lm: LM, plan: Replication) -> None:
    """Raise ValueError unless the layers and heads of the model are those of the plan, from which its memory was computed."""
    found = (lm.layout.n_layers, lm.layout.n_heads)
    if found != (plan.model.layers, plan.model.heads):
        raise ValueError(
            f"{lm.name} has {found[0]} layers with {found[1]} heads, but the plan says {plan.model.layers} with {plan.model.heads}: correct "
            "[model] in the plan, or load the plan's model."
        )


def problems_of(part: SamplingPart, seed: int, lm: LM | None = None) -> list[Problem]:
    """Return the problems of a part of the plan: those of each of its splits, one split after the other."""
    return [
        p for split in part.splits for p in load(part.task, split, part.problems, seed, lm=lm, max_new_tokens=part.max_new_tokens)
    ]


def conditions_of(lm: LM, finding: Finding, plan: Replication) -> dict[str, Condition]:
    """Return base, the edited model, and ``draws`` random controls of each kind: random heads, and random directions in the heads."""
    return edit.edit_conditions(lm, {EDITED: finding}, plan.edit.settings(plan.run.seed))


def judged_claims(name: str, c: Comparison, plan: Replication) -> list[Claim]:
    """Return the claims of the paper on one test, each with its random controls.

    Args:
        name: Name of the test.
        c: The comparison of the conditions on it.
        plan: The plan.
    """
    controls = [[n for n in c.report.conditions if kind in n] for kind in ("random heads", "random direction")]
    metrics = {"think_tokens": "thinks longer", "accuracy": "more accurate", "shortest_20": "its shortest 20 % more accurate"}
    found = []
    for metric, text in metrics.items():
        found.append(c.claim(f"{name}: {text}", plan.paper, metric, [EDITED]))
        for noise, what in zip(controls, ("random heads", "random directions in the heads"), strict=True):
            found.append(c.claim(f"{name}: {text}, more than with {what}", CONTROL, metric, [EDITED], noise))
    return found


def beside(published: Sequence[Published], summaries: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the paper's numbers beside the measured ones, one row per published number.

    Columns: ``paper, base``, ``paper, edited``, ``paper, change`` and ``base``, ``edited``, ``change`` (measured, with 95 %
    intervals), in percent and points; and ``agrees``. This is ``no`` if the paper's change lies outside the measured interval, ``undecided`` if
    the interval contains both the paper's change and 0, ``yes`` if it contains the paper's change and not 0. A number that the plan does not
    have is NOT FOUND.

    Args:
        published: Numbers of the paper.
        summaries: Name of a test -> table of ``evaluate.summary``.
    """
    rows = {}
    for p in published:
        table = summaries[p.test].set_index(["condition", "metric"])
        base, changed = table.loc[(BASE, p.metric)], table.loc[(EDITED, p.metric)]
        low, high = 100 * changed["difference_low"], 100 * changed["difference_high"]
        change = None if p.base is None or p.edited is None else p.edited - p.base
        unit = described(p.metric).unit
        rows[f"{p.test}, {described(p.metric).label}, {p.version}"] = {
            "paper, base": said(p.base),
            "paper, edited": said(p.edited),
            "paper, change": NOT_FOUND if change is None else f"{change:+.2f}",
            "base": with_interval(base["mean"], base["low"], base["high"], unit),
            "edited": with_interval(changed["mean"], changed["low"], changed["high"], unit),
            "change": with_interval(changed["difference"], low / 100, high / 100, unit, sign="+"),
            "agrees": NOT_FOUND if change is None else _agreement(change, low, high),
        }
    columns = ["paper, base", "paper, edited", "paper, change", "base", "edited", "change", "agrees"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("number")


def _agreement(published: float, low: float, high: float) -> str:
    """Return ``yes``, ``no`` or ``undecided``, see ``beside``. All numbers are in percentage points."""
    if not low <= published <= high:
        return "no"
    return "undecided" if low <= 0 <= high else "yes"


def replication_verdict(plan: Replication, table: pd.DataFrame) -> list[str]:
    """Return the sentences of the verdict box: the number of changes that agree with the paper, and the parts that were never run."""
    counts = table["agrees"].value_counts()
    yes, undecided, no, missing = (int(counts.get(k, 0)) for k in ("yes", "undecided", "no", NOT_FOUND))
    sentences = [
        f"Of {yes + undecided + no} published changes, {yes} agree with the measured 95 % interval, {no} do not, and {undecided} are undecided, "
        f"since the interval contains both the paper's change and 0. {missing} published numbers were not found."
    ]
    return [*sentences, f"Untested: {plan.untested}"] if plan.untested else sentences


def _write(
    lm: LM, plan: Replication, finding: Finding, table: pd.DataFrame, judged: Sequence[Claim], reports: Mapping[str, Report], out: Path, command: str
) -> None:  # fmt: skip
    """Write page, JSON and Markdown."""
    first = plan.tests[0]
    notes = [f"{p.test}, {p.metric}, {p.version}: {p.note}" for p in plan.published if p.note]
    made = (
        f"{plan.paper}. {Path(lm.name).name} (weights {lm.fingerprint[:12]}), {plan.model.dtype}. {finding.plan.name}. "
        f"{' '.join(report.judged_on(measured) for measured in reports.values())} Deviations: {' '.join(plan.deviations) or 'none known.'}"
    )
    claim_page = report.claims_page(plan.title, judged, made=made, command=command)
    conditions = {name: lm for name in reports[first.label].conditions}
    shown = report.transcripts(
        conditions, reports[first.label], problems_of(first, plan.run.seed, lm), out / "rollouts" / store.safe_name(first.label)
    )
    beside_paper = Section(
        "The paper's numbers",
        "In percent and points. Measured numbers have 95 % intervals over problems. The paper's change agrees if the interval of the measured "
        "change contains it and not 0; if the interval contains both, agreement is undecided.",
        html=table_html(table),
    )
    sections = [beside_paper, shown]
    page = replace(claim_page, verdict=replication_verdict(plan, table), table=posting_table(judged), sections=sections)
    pages.write(page, out / "report.html")
    about: dict[str, Any] = {
        "plan": plan,
        "provenance": lm.provenance(plan.run.seed),
        "edited": plan_table(finding).to_dict("records"),
    }
    rows = report.json_records(table.reset_index())
    store.write_json({**about, "beside": rows, "claims": claims.json_records(judged)}, out / "replication.json")
    lines = [
        f"# {plan.title}",
        "",
        *(f"- {sentence}" for sentence in replication_verdict(plan, table)),
        "",
        report.markdown(table),
        "",
    ]
    lines += [
        *(f"- {note}" for note in notes),
        "",
        report.markdown(posting_table(judged)),
        "",
        made,
        "",
        f"Made again with `{command}`.",
    ]
    store.write_text("\n".join(lines) + "\n", out / "report.md")
