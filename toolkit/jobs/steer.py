"""Dose-response of a direction (``dose``), its folder for the Hugging Face Hub (``export``), and steered responses (``steer``)."""

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
    lm: LM, v: Direction, study: Study, plan: doses.DoseSweep, directory: str | Path, *, say: Say = lambda text: None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure the dose-response of a direction on the study's dev problems, with a random direction as control.

    Writes ``report.html``, ``doses.json``, ``targets.json`` and the rollouts into ``directory``. After a stop, call it again with the same
    arguments: finished rollouts are reused.

    Args:
        plan: Strengths, layers and scope.

    Returns:
        Means by direction and strength, and the table of ``doses.targets``: the best strength for each target length.
    """
    out = store.writable(directory)
    name = "length direction"
    both = {name: v, doses.RANDOM: directions.random_like(v, seed=study.seed)}
    say(f"steering along {v.estimator} at {len(plan.strengths)} strengths, and along a random direction")
    swept = doses.sweep(lm, both, study.load("dev", lm), study.sampling, plan, out=out / "rollouts")
    dial = doses.targets(swept, name)
    low, high = doses.usable_range(swept, name)
    on = report.judged_on(swept.report)
    store.write_json({"usable": [low, high], "judged_on": on, "doses": swept.table.to_dict("records")}, out / "doses.json")
    store.write_json(dial.to_dict("records"), out / "targets.json")
    wide = swept.table.pivot(index=["direction", "strength"], columns="metric", values="mean").loc[[name, doses.RANDOM]]
    shaded = {name: (low, high)}
    sections = [
        Section(
            "Length and accuracy",
            "Shaded: the usable range, in which responses still close their thinking and do not loop. The random direction has the same norm in every layer.",
            (figures.dose_response(swept.table, usable=shaded),),
        ),
        Section(
            "Damage",
            "Perplexity per token of the base model's responses under the steered model.",
            (figures.damage(swept.table, usable=shaded),),
        ),
        Section(
            "Target lengths",
            "For each target length, the strength whose mean length is closest, and the share of responses that hit the target.",
            (figures.target_lengths(dial),),
        ),
    ]
    intro = f"{lm.name}. {on} {study.samples} samples each. {plan.act(v, 1.0)}."
    report.write_page(f"Dose-response: {v.estimator}", intro, _flat(wide.round(3)), sections, out / "report.html")
    return wide, dial


def _flat(table: pd.DataFrame) -> pd.DataFrame:
    """The same table with one index level: direction and strength as text."""
    return table.set_index(pd.Index([f"{name} {strength:+g}" for name, strength in table.index], name="dose"))


def read_doses(directory: str | Path) -> tuple[pd.DataFrame, str]:
    """Read the table that ``dose_report`` wrote into ``directory``.

    Returns:
        One row per direction, strength and metric, and the sentence that names the problems ("" in files of version 0.1.0).

    Raises:
        FileNotFoundError: ``directory`` has no ``doses.json``.
        store.DamagedFileError: the file is damaged; names the row.
    """
    path, remedy = Path(directory) / "doses.json", "Give the directory of a finished `toolkit dose`, or run it again."
    content = store.read_json(path, {"doses": list[Mapping[str, Any]]}, remedy=remedy)
    rows, on = content["doses"], content.get("judged_on", "")
    for i, row in enumerate(rows):
        store.checked(row, IN_DOSES, f"{path}, doses[{i}]", remedy)
    table = pd.DataFrame(rows)
    if table.empty or table.duplicated(["direction", "strength", "metric"]).any():
        raise store.DamagedFileError(f"{path} holds no dose, or the same dose twice. {remedy}")
    return table, str(on)


def vector_folder(
    lm: LM, v: Direction, directory: str | Path, measured: str | Path | None = None, *, drop_layer_0: bool = False
) -> Path:
    """Write a folder for the Hugging Face Hub with vector files and a card.

    Args:
        measured: Directory of ``dose_report`` whose numbers and figures go into the card.
        drop_layer_0: Leave out layer 0, which GGUF cannot steer.
    """
    table, on, pages = None, "", {}
    if measured is not None:
        doses_table, on = read_doses(measured)
        chosen = doses_table[doses_table["metric"].isin(["think_tokens", "accuracy", "closed", "perplexity", "relative_dose"])]
        table = _flat(chosen.pivot(index=["direction", "strength"], columns="metric", values="mean").round(3))
        pages = {
            "doses.html": figures.dose_response(doses_table).to_html(include_plotlyjs="cdn"),
            "damage.html": figures.damage(doses_table).to_html(include_plotlyjs="cdn"),
        }
    card = report.vector_card(v, table=table, on=on, figures=tuple(pages))
    return vectors.save_folder(v, directory, lm=lm, card=card, figures=pages, drop_layer_0=drop_layer_0)


def steered_responses(
    lm: LM, acts: Mapping[float, Steering], prompts: Sequence[str], sampling: Sampling, *, out: Path | None = None
) -> list[tuple[str, float, Rollout]]:
    """Sample responses to plain prompts under several steering strengths.

    Args:
        acts: Interventions by strength.
        out: Directory to keep the rollouts in.

    Returns:
        ``(prompt, strength, response)``, prompt by prompt.
    """
    problems = [Problem(f"prompt {i}", ({"role": "user", "content": text},), "") for i, text in enumerate(prompts)]
    by_strength = {
        a: rollouts(Condition(lm, (act,)), problems, sampling, out=out and out / f"{a:+g}", progress=False)
        for a, act in acts.items()
    }
    n = sampling.n
    return [
        (text, a, r)
        for i, text in enumerate(prompts)
        for a, responses in by_strength.items()
        for r in responses[i * n : (i + 1) * n]
    ]
