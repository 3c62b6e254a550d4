"""Dose-response of a direction, its folder for the hub, and steered responses: what ``dose``, ``export`` and ``steer`` do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from toolkit import directions, doses, figures, report, store, vectors
from toolkit.edits import Steering
from toolkit.generate import Sampling, rollouts
from toolkit.jobs.study import Say, Study
from toolkit.lm import LM, Condition
from toolkit.report import Section
from toolkit.types import Direction, Problem, Rollout

IN_DOSES = {"direction": str, "strength": float, "metric": str, "mean": float, "low": float, "high": float}


def dose_report(
    lm: LM, v: Direction, study: Study, plan: doses.Sweep, directory: str | Path, *, say: Say = lambda text: None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What doses of a direction do on the study's dev problems, with a random direction beside it.

    Writes ``report.html``, ``doses.json``, ``targets.json`` and the rollouts into ``directory``; given again after a stop, finished
    rollouts are kept. Returns a table by strength, and the strength as a dial against target lengths (Ruler).
    """
    out = store.writable(directory)
    name = "length direction"
    both = {name: v, doses.RANDOM: directions.random_like(v, seed=study.seed)}
    say(f"steering along {v.estimator} at {len(plan.strengths)} strengths, and along a random direction")
    swept = doses.sweep(lm, both, study.load("dev", lm), study.sampling, plan, out=out / "rollouts")
    dial = doses.targets(swept, name)
    low, high = doses.usable(swept, name)
    on = report.judged_on(swept.report)
    store.write_json({"usable": [low, high], "judged_on": on, "doses": swept.table.to_dict("records")}, out / "doses.json")
    store.write_json(dial.to_dict("records"), out / "targets.json")
    wide = swept.table.pivot(index=["direction", "strength"], columns="metric", values="mean").loc[[name, doses.RANDOM]]
    shaded = {name: (low, high)}
    sections = [
        Section(
            "Length and accuracy",
            "Shaded: the usable range, in which responses still close and do not loop. The random direction has the same norm in every layer.",
            (figures.dose_response(swept.table, usable=shaded),),
        ),
        Section(
            "Damage",
            "Perplexity is that of the base model's own responses under the steered model, per token.",
            (figures.damage(swept.table, usable=shaded),),
        ),
        Section(
            "As a dial",
            "For each target length the strength whose mean comes nearest, and how single responses hit it.",
            (figures.targets(dial),),
        ),
    ]
    intro = f"{lm.name}. {on} {study.samples} samples each. {plan.act(v, 1.0)}."
    report.page(f"Dose-response: {v.estimator}", intro, _flat(wide.round(3)), sections, out / "report.html")
    return wide, dial


def _flat(table: pd.DataFrame) -> pd.DataFrame:
    """A table by direction and strength with one name a row."""
    return table.set_index(pd.Index([f"{name} {strength:+g}" for name, strength in table.index], name="dose"))


def kept_doses(directory: str | Path) -> tuple[pd.DataFrame, str]:
    """The table that :func:`dose_report` wrote into ``directory``, one row per direction, strength and metric, and the sentence on the
    problems it was measured on ("" in files of 0.1.0).

    Raises:
        FileNotFoundError: no ``doses.json`` there.
        store.DamagedFileError: it is not such a table; names the row.
    """
    path, remedy = Path(directory) / "doses.json", "Give the directory of a finished `toolkit dose`, or run it again."
    kept = store.read_json(path, {"doses": list[Mapping[str, Any]]}, remedy=remedy)
    found, on = kept["doses"], kept.get("judged_on", "")
    for i, row in enumerate(found):
        store.checked(row, IN_DOSES, f"{path}, doses[{i}]", remedy)
    table = pd.DataFrame(found)
    if table.empty or table.duplicated(["direction", "strength", "metric"]).any():
        raise store.DamagedFileError(f"{path} holds no dose, or one of them twice. {remedy}")
    return table, str(on)


def vector_folder(
    lm: LM, v: Direction, directory: str | Path, measured: str | Path | None = None, *, drop_layer_0: bool = False
) -> Path:
    """A folder for the hub: vector files, a card, and if ``measured`` is a directory of :func:`dose_report` its numbers and figures."""
    table, on, drawn = None, "", {}
    if measured is not None:
        kept, on = kept_doses(measured)
        wanted = kept[kept["metric"].isin(["think_tokens", "accuracy", "closed", "perplexity", "relative_dose"])]
        table = wanted.pivot(index=["direction", "strength"], columns="metric", values="mean").round(3)
        table = _flat(table)
        drawn = {
            "doses.html": figures.dose_response(kept).to_html(include_plotlyjs="cdn"),
            "damage.html": figures.damage(kept).to_html(include_plotlyjs="cdn"),
        }
    card = report.vector_card(v, table=table, on=on, figures=tuple(drawn))
    return vectors.save_folder(v, directory, lm=lm, card=card, figures=drawn, drop_layer_0=drop_layer_0)


def steered_responses(
    lm: LM, acts: Mapping[float, Steering], prompts: Sequence[str], sampling: Sampling, *, out: Path | None = None
) -> list[tuple[str, float, Rollout]]:
    """``(prompt, strength, response)`` to plain prompts under several interventions, prompt by prompt; kept in ``out``."""
    problems = [Problem(f"prompt {i}", ({"role": "user", "content": text},), "") for i, text in enumerate(prompts)]
    found = {
        a: rollouts(Condition(lm, (act,)), problems, sampling, out=out and out / f"{a:+g}", progress=False)
        for a, act in acts.items()
    }
    n = sampling.n
    return [
        (text, a, r) for i, text in enumerate(prompts) for a, responses in found.items() for r in responses[i * n : (i + 1) * n]
    ]
