"""Run the analysis of ``why`` for two models, and write its tables and its page (command ``toolkit why``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from toolkit import evaluate, figures, pages, report, store
from toolkit.jobs import verdicts
from toolkit.jobs.finding import DEMO, DirectionRecipe, extract_direction
from toolkit.jobs.study import Say, Study, extraction_rollouts
from toolkit.jobs.why import Why, WhySettings, find_reasons
from toolkit.lm import LM, Condition
from toolkit.metrics import with_interval
from toolkit.pages import Page, Section
from toolkit.patching import check_shapes

UNITS = {"think_tokens": "tokens", "correct": "share"}
LABELS = {"think_tokens": "think tokens", "correct": "right answers, points"}


def why_report(
    base: LM,
    changed: LM,
    study: Study,
    settings: WhySettings,
    directory: str | Path,
    *,
    say: Say = lambda text: None,
    command: str = "",
) -> Why:
    """Run the whole analysis of ``why`` for two models, and write its tables and its page.

    After a stop, call it again with the same arguments: finished responses are reused.

    Args:
        base: The base model.
        changed: The changed model, of the same architecture.
        study: Task, numbers of problems and samples, and seed. The length direction is found on its train problems, the heads on its dev
            problems, and all else is measured on its test problems.
        settings: Sizes of the analysis.
        directory: Directory to write to: ``why.json`` (tables and verdict with provenance), ``report.html``, and ``rollouts/``.
        say: Function that is called with one line of progress at a time.
        command: Command that makes the page again, to be shown in it.

    Raises:
        store.WrongModelError: the models differ in their width, or in the number or size of their heads.
        evaluate.OverlapError: a model was made from a dev or test problem, and ``study.allow_overlap`` is False.
        ValueError: the models have the same weights.
    """
    check_shapes(base, changed)
    if base.fingerprint == changed.fingerprint:
        raise ValueError(
            f"{base.name} and {changed.name} have the same weights, so nothing changed that could be explained: name a model and an edited or "
            "trained copy of it."
        )
    out = store.writable(directory)
    problems = {split: study.load(split, base) for split in ("dev", "test")}
    conditions = {"base": Condition(base), "changed": Condition(changed)}
    judged = [*problems["dev"], *problems["test"]]
    overlap = evaluate.check_held_out(conditions, judged, allow=study.allow_overlap)
    responses = extraction_rollouts(base, study, out=out / "rollouts" / "train", say=say)
    recipe = DirectionRecipe(site="resid_post")
    direction, _ = extract_direction(base, responses, DEMO, recipe, origin=study.origin("train"))
    found = find_reasons(
        conditions["base"], conditions["changed"], direction, problems, study.sampling, settings,
        out=out / "rollouts", allow_overlap=study.allow_overlap, say=say,
    )  # fmt: skip
    said = verdicts.of_reasons(found.tables)
    about = {
        "study": study,
        "settings": settings,
        "heads_chosen": found.chosen,
        "verdict": said,
        "changed": changed.provenance(study.seed),
        "overlap": overlap,
    }
    records = {name: report.json_records(table) for name, table in found.tables.items()}
    store.write_json({**about, "provenance": base.provenance(study.seed), **records}, out / "why.json")
    title = f"Why {changed.name} differs from {base.name}"
    page = reasons_page(title, found.tables, said, study, command)
    pages.write(replace(page, made=f"{_not_held_out(overlap, len(judged))}{page.made}"), out / "report.html")
    return found


def _not_held_out(overlap: Mapping[str, int], count: int) -> str:
    """Return a sentence on the dev and test problems that a model was made from; "" if there are none."""
    made = [f"{name} was made from {n}" for name, n in overlap.items() if n]
    return f"NOT held out: of the {count} dev and test problems, {' and '.join(made)}. " if made else ""


def undo_table(undo: pd.DataFrame) -> pd.DataFrame:
    """Return the table of ``why.undo`` as text cells: one row per set of heads and way, with intervals."""
    rows: dict[str, dict[str, str]] = {}
    for (heads, way, which), part in undo.groupby(["heads", "way", "which"], sort=False):
        name = f"{heads} ({which}), {way}" if way else heads
        cells = part.set_index("measure")
        rows[name] = {}
        for m, unit in UNITS.items():
            mean, low, high = (float(cells.loc[m, column]) for column in ("change", "change_low", "change_high"))
            rows[name][LABELS[m]] = with_interval(mean, low, high, unit, sign="+")
    return pd.DataFrame(rows).T


def reasons_page(title: str, tables: Mapping[str, pd.DataFrame], said: list[str], study: Study, command: str = "") -> Page:
    """Return the page: verdict, figure, table of the heads that were put back, heads with the largest effects, and how it was made."""
    main = Section(
        "Which heads, which direction, which steps",
        "Effect: how much each head's change raises the preference for long thinking, by patching it both ways (+ means longer). Cosine: of "
        "the change of the residual stream with the length direction, by layer; between the dotted lines lie all layers for 95 % of random "
        "directions. These point everywhere alike, activations do not, so a cosine beyond them is a weak sign. Bars are 95 % intervals. "
        "Share: blue heads are put back to base, brown ones changed alone, random ones are grey.",
        (figures.reasons(tables, title),),
    )
    top = tables["heads"].head(8)
    effects = pd.DataFrame(
        {
            "effect, nats": [with_interval(r.effect, r.effect_low, r.effect_high, "nats", sign="+") for r in top.itertuples()],
            "share of the whole, %": [
                with_interval(r.share, r.share_low, r.share_high, "share", digits=0) for r in top.itertuples()
            ],
        },
        index=[f"{r.layer}.{r.head}" for r in top.itertuples()],
    )
    return Page(
        title=title,
        verdict=said,
        main=main,
        table=undo_table(tables["undo"]),
        caption="Part of the change that some heads make: changed minus 'put back', or 'alone' minus base, paired by problem, with 95 % "
        "intervals. Random sets of other heads of the same layers are the control.",
        sections=[
            Section(
                "Heads with the largest effects",
                "Effect of the head's change on the preference for long thinking.",
                html=pages.table_html(effects),
            )
        ],
        made=f"Length direction from train problems, heads from dev problems, all else on {study.problems} test problems of {study.task}, "
        f"{study.samples} samples each, with the same random numbers in all conditions.",
        command=command,
    )
