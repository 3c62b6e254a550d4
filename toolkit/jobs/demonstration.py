"""The command ``toolkit demo``: find the heads that shorten thinking, edit them, steer, compare with controls, and write a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from toolkit import directions, doses, evaluate, figures, pages, report, store
from toolkit.jobs.edit import STRENGTHS, edit_conditions, is_saved, save_edited, steering_conditions
from toolkit.jobs.finding import DEMO, FORMS, OURS, EditSettings, Finding, find_heads, plan_table, separation
from toolkit.jobs.study import Say, Study, extraction_rollouts
from toolkit.lm import LM
from toolkit.pages import Section
from toolkit.types import Rollout


def demo(
    lm: LM,
    study: Study,
    directory: str | Path,
    *,
    settings: EditSettings = DEMO,
    say: Say = lambda text: None,
    command: str = "",
) -> pd.DataFrame:
    """Edit and steer a model to change how long it thinks, compare the results with base and random controls, and write a report.

    The demo first computes a *length direction*: the mean residual stream of long thinking minus that of short thinking. It then edits
    the attention heads whose outputs point most towards short thinking. This is ThinkEdit (arXiv:2503.22048). The demo compares two forms
    of it, the published one and ours (see ``jobs.FORMS``). The saved model has the edit of our form. The demo steers along the
    direction that this edit removes. That is not the length direction in ``direction.safetensors``.

    After a stop, call it again with the same arguments: finished rollouts are reused.

    Args:
        lm: The base model; it is not changed.
        study: Task, number of problems per split, samples per problem, token budget, and seed.
        directory: Directory to write to: ``rollouts/``, ``direction.safetensors``, ``heads.json`` (scores and edited heads), ``edited/``
            (the saved model), ``report.json``, ``rows.parquet``, ``doses.json`` (effects by steering strength) and ``report.html``.
        settings: Share of heads to edit, strength of the edit, classes of short and long thinking, and random controls.
        say: Function that is called with one line of progress at a time.
        command: Command that makes the report again, to be shown in it.

    Returns:
        The table of ``evaluate.summary``: one row per condition and metric, with the difference from base.
    """
    out = store.writable(directory)
    rollouts = extraction_rollouts(lm, study, out=out / "rollouts" / "train", say=say)
    say("averaging activations, to compute directions and head scores")
    findings = {name: find_heads(lm, rollouts, settings, name, origin=study.origin("train")) for name in FORMS}
    saved = is_saved(lm, findings[OURS], out / "edited")  # raises for another model there, before the long part
    v = findings[OURS].plan.direction or findings[OURS].direction  # steer along what the edit removes
    store.save(findings[OURS].direction, out / "direction.safetensors")
    heads = {name: {"scores": f.scores, "edited": plan_table(f).reset_index().to_dict("records")} for name, f in findings.items()}
    store.write_json(heads, out / "heads.json")
    say("comparing base, edits, steering and random controls on held-out problems")
    compared = edit_conditions(lm, findings, settings) | steering_conditions(lm, v, settings)
    tests = study.load("test", lm)
    measured = evaluate.compare(compared, tests, study.sampling, out=out / "rollouts" / "test")
    summary = report.write(out, measured, seed=study.seed, settings=settings)
    if not saved:
        save_edited(lm, findings[OURS], measured, summary, out / "edited")
    say("measuring the dose-response of steering")
    both = {"length direction": v, doses.RANDOM: directions.random_like(v, seed=settings.seed)}
    few = study.load("dev", lm)[: max(40, study.problems // 4)]  # few, since 16 conditions are sampled
    swept = doses.sweep(lm, both, few, replace(study.sampling, n=4), doses.DoseSweep(STRENGTHS), out=out / "rollouts" / "doses")
    store.write_json(swept.table.to_dict("records"), out / "doses.json")
    sections = [
        *_sections(lm, findings, rollouts, settings, swept),
        report.transcripts(dict.fromkeys(measured.conditions, lm), measured, tests, out / "rollouts" / "test"),
    ]
    title = f"Editing the thinking length of {lm.name}"
    page = report.comparison_page(title, measured, summary, sections=sections, command=command)
    pages.write(page, out / "report.html")
    return summary


def _sections(
    lm: LM,
    findings: Mapping[str, Finding],
    rollouts: Sequence[Rollout],
    settings: EditSettings,
    swept: doses.Doses,
) -> list[Section]:
    apart = {name: separation(lm, rollouts, settings, f, name).tolist() for name, f in findings.items()}
    maps = tuple(
        figures.head_scores(f.scores, f.plan).update_layout(title_text=f"{name}: head scores; outlined: edited")
        for name, f in findings.items()
    )
    return [
        Section(
            "How long it thinks",
            "Think lengths of the rollouts that the direction was computed from. The direction is the difference between the classes long and short.",
            (figures.length_distribution(rollouts, settings.classes(rollouts)),),
        ),
        Section(
            "Where length shows",
            "Distance between the means of long and short thinking along each direction, by layer, in standard deviations of single positions within a class.",
            (figures.by_layer(apart, "Separation of long and short thinking", "distance in standard deviations (d')"),),
        ),
        Section(
            "Which heads write it",
            "Published form: a high score means that, in short thinking, the head writes towards short thinking. Our form: a high score means that the head does so more in short thinking than in long thinking.",
            maps,
        ),
        Section(
            "Steering",
            "The part of the length direction that the edited heads write is added at every position, with the given strength; so is a random direction of equal norm, as a control. Strength 1 adds the whole difference, long minus short thinking; + lengthens thinking.",
            (figures.dose_response(swept.table), figures.damage(swept.table)),
        ),
    ]
