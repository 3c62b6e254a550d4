"""Steering along a direction, for the commands ``dose``, ``export`` and ``steer``.

``dose_report`` measures length, accuracy and damage at several strengths (the dose-response). ``vector_folder`` writes a folder for the
Hugging Face Hub. ``steered_responses`` samples responses at several strengths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from toolkit import directions, doses, evaluate, figures, identity, pages, report, store, strengths, tasks, vectors, verdicts
from toolkit.edits import Steering
from toolkit.generate import Sampling, rollouts
from toolkit.jobs.study import Say, Study
from toolkit.lm import LM, Condition
from toolkit.metrics import described, with_interval
from toolkit.pages import Page, Section
from toolkit.types import Direction, Problem, Rollout

IN_DOSES = {"direction": str, "strength": float, "metric": str, "mean": float, "low": float, "high": float}
"""Field of a row in ``doses.json`` -> its type. A row is one metric, measured at one steering strength along one direction."""
TEXTS = ("judged_on", "fingerprint", "direction", "steering")
"""Fields of ``doses.json`` that say how it was measured; files of earlier versions lack some of them. ``read_doses`` describes them."""


def dose_report(
    lm: LM,
    v: Direction,
    study: Study,
    plan: doses.DoseSweep,
    directory: str | Path,
    *,
    say: Say = lambda text: None,
    command: str = "",
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure length, accuracy and damage at several steering strengths on the study's dev problems, with one random direction as control.

    Three numbers show damage: the share of responses that close their thinking, the share that end in a loop, and the perplexity of base's
    responses under the steered model.

    After a stop, call it again with the same arguments: finished rollouts are reused.

    Args:
        lm: Model to steer.
        v: Direction to steer along; adding it lengthens thinking.
        study: Task, numbers of problems and samples, and seed.
        plan: Strengths, layers, and positions of steering.
        directory: Directory to write to: ``report.html``, ``doses.json``, ``targets.json`` and ``rollouts/``.
        say: Function that is called with one line of progress at a time.
        command: Command that makes the report again, to be shown in it.

    Returns:
        Two tables:

        * Means: one row per direction (``length direction``, ``random direction``) and strength, one column per metric (see
          ``doses.Doses``).
        * The strength that comes closest to each target length, one row per target (see ``doses.targets``).
    """
    out = store.writable(directory)
    name = "length direction"
    both = {name: v, doses.RANDOM: directions.random_like(v, seed=study.seed)}
    say(f"steering along {v.estimator} at {len(plan.strengths)} strengths, and along a random direction")
    swept = doses.sweep(lm, both, study.load("dev", lm), study.sampling, plan, out=out / "rollouts")
    dial = doses.targets(swept, name)
    low, high = doses.usable_range(swept, name)
    on = report.judged_on(swept.report)
    about = {
        "judged_on": on,
        "fingerprint": lm.fingerprint,
        "direction": identity.hash_of(v.vector),
        "steering": str(plan.act(v, 1.0)),
    }
    store.write_json({"usable": [low, high], **about, "doses": swept.table.to_dict("records")}, out / "doses.json")
    store.write_json(dial.to_dict("records"), out / "targets.json")
    wide = swept.table.pivot(index=["direction", "strength"], columns="metric", values="mean").loc[[name, doses.RANDOM]]
    shaded = {name: (low, high)}
    sections = [
        Section(
            "Length and accuracy",
            "Shaded: the usable range of strengths, at which responses still close their thinking and do not loop. In every layer, the random direction has the same norm as the length direction. It is one draw: other random directions may have other effects.",
            (figures.dose_response(swept.table, usable=shaded),),
        ),
        Section(
            "Damage",
            "Share of responses that close their thinking, share of responses that end in a loop, and perplexity per token of the base model's responses under the steered model.",
            (figures.damage(swept.table, usable=shaded),),
        ),
        Section(
            "Target lengths",
            "For each target length: mean think length at the strength that comes closest, and share of responses within 20 % of the target.",
            (figures.target_lengths(dial),),
        ),
    ]
    page = Page(
        title=f"Dose-response of steering {lm.name}",
        verdict=_verdict(swept, name, low, high),
        main=sections[0],
        table=dose_table(swept.table, (name, doses.RANDOM)),
        caption="Means with 95 % intervals over problems; 10 to 90 %: quantiles of the think tokens. The relative dose is the norm of the "
        "added vector, in percent of that of the activations.",
        sections=sections[1:],
        made=f"{lm.name}, direction {v.estimator}. {on} {study.samples} samples each. {plan.act(v, 1.0)}.",
        command=command,
    )
    pages.write(page, out / "report.html")
    return wide, dial


def dose_table(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Return the table of ``doses.Doses`` as text cells: one row per direction and strength, shares in percent.

    Args:
        table: The table.
        names: Directions, in the order of the rows.
    """
    rows: dict[str, dict[str, str]] = {}
    for (name, strength), part in table.groupby(["direction", "strength"]):
        cells = part.set_index("metric")[["mean", "low", "high"]]

        def text(metric: str, unit: str, digits: int | None = None, cells: pd.DataFrame = cells) -> str:
            mean, low, high = (float(value) for value in cells.loc[metric])
            return with_interval(mean, low, high, unit, digits=digits)

        shortest, longest = (f"{cells.loc[f'think_tokens_{q}', 'mean']:.0f}" for q in ("q10", "q90"))
        rows[f"{name} {strength:+g}"] = {
            "think tokens": text("think_tokens", "tokens"),
            "10 to 90 %": f"{shortest}–{longest}",
            **{described(m).label: text(m, "share", 0) for m in ("accuracy", "closed", "looping")},
            "perplexity": text("perplexity", "", 2),
            "relative dose": text("relative_dose", "share", 0),
        }
    order = [row for name in names for row in rows if row.startswith(f"{name} ")]
    return pd.DataFrame.from_dict(rows, orient="index").loc[order].rename_axis("dose")


def _verdict(swept: doses.Doses, name: str, low: float, high: float) -> list[str]:
    """Return the verdict on a direction: its effect at the ends of the usable range, and that of the random direction there."""
    ends = {f"{direction} {a:+g}" for direction in (name, doses.RANDOM) for a in (low, high) if a}
    if not ends:
        return ["No strength but 0 is usable: at every measured strength, responses do not close their thinking, or they loop."]
    summary = evaluate.summary(swept.report)
    usable = f"Usable strengths are from {low:+g} to {high:+g}."
    return [*verdicts.of_summary(summary[summary["condition"].isin({"base", *ends})]), usable]


def _flat(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with its index levels ``direction`` and ``strength`` joined into one, such as ``"length direction +0.5"``."""
    return table.set_index(pd.Index([f"{name} {strength:+g}" for name, strength in table.index], name="dose"))


def read_doses(directory: str | Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """Read the measurements that ``dose_report`` wrote into ``directory``.

    Returns:
        A table and texts. The table has one row per direction, strength and metric, with the columns ``direction, strength, metric, mean,
        low, high`` (95 % interval). The texts say how it was measured; each is "" in a file of an earlier version:

        * ``judged_on``: the problems.
        * ``fingerprint``: SHA-256 of the model's weights.
        * ``direction``: hash of the length direction (``identity.hash_of``).
        * ``steering``: the intervention at strength 1, with its site, layers and positions.

    Raises:
        FileNotFoundError: ``directory`` has no ``doses.json``.
        store.DamagedFileError: ``doses.json`` is damaged; the message names the row or the field.
    """
    path, remedy = Path(directory) / "doses.json", "Give the directory of a finished `toolkit dose`, or run it again."
    content = store.read_json(path, {"doses": list[Mapping[str, Any]]}, remedy=remedy)
    rows = content["doses"]
    for i, row in enumerate(rows):
        store.checked(row, IN_DOSES, f"{path}, doses[{i}]", remedy)
    about = store.checked({name: content.get(name, "") for name in TEXTS}, dict.fromkeys(TEXTS, str), path, remedy)
    table = pd.DataFrame(rows)
    if table.empty or table.duplicated(["direction", "strength", "metric"]).any():
        raise store.DamagedFileError(f"{path} holds no dose, or the same dose twice. {remedy}")
    return table, about


def _doses_of(lm: LM, v: Direction, directory: str | Path) -> tuple[pd.DataFrame, str]:
    """Return the measurements in ``directory`` and sentences for the card: problems, site, layers and positions of steering.

    Raises:
        store.WrongModelError: they were made with another model, or along another direction.
    """
    table, about = read_doses(directory)
    for name, has, of in (
        ("fingerprint", lm.fingerprint, f"other weights than those of {lm.name}"),
        ("direction", identity.hash_of(v.vector), "another direction"),
    ):
        if about[name] not in ("", has):
            raise store.WrongModelError(
                f"{Path(directory) / 'doses.json'} was measured with {of}: {about[name]!r} instead of {has!r}. Run `toolkit dose` with "
                "this model and this direction, or give the directory of its doses."
            )
    # The estimator's name may hold an underscore or an asterisk, which Markdown would take for emphasis.
    how = (
        f"Strength 1 is `{about['steering']}`."
        if about["steering"]
        else "The direction was not recorded, nor its layers and positions."
    )
    return table, f"{about['judged_on']} {how}".lstrip()


def vector_folder(
    lm: LM, v: Direction, directory: str | Path, measured: str | Path | None = None, *, drop_layer_0: bool = False
) -> Path:
    """Write a folder for the Hugging Face Hub with the direction in several file formats and a model card, and return its path.

    Args:
        lm: Model that the direction is for.
        v: Direction to write.
        directory: Folder to write.
        measured: Directory that ``dose_report`` wrote for this model and this direction; its numbers and figures go into the card.
            ``None`` writes a card without numbers.
        drop_layer_0: A GGUF file cannot hold a vector of layer 0. If this vector is not zero, True writes a GGUF file without it, and False
            writes no GGUF file. A direction at another site than ``resid_post`` never gets a GGUF file.

    Raises:
        store.WrongModelError: ``measured`` holds the doses of another model or direction; or the direction was made with another model.
    """
    table, on, drawn = None, "", {}
    if measured is not None:
        doses_table, on = _doses_of(lm, v, measured)
        chosen = doses_table[doses_table["metric"].isin(["think_tokens", "accuracy", "closed", "perplexity", "relative_dose"])]
        table = _flat(chosen.pivot(index=["direction", "strength"], columns="metric", values="mean").round(3))
        drawn = {
            "doses.html": figures.dose_response(doses_table).to_html(include_plotlyjs="cdn"),
            "damage.html": figures.damage(doses_table).to_html(include_plotlyjs="cdn"),
        }
    card = report.vector_card(v, table=table, on=on, figures=tuple(drawn))
    return vectors.save_folder(v, directory, lm=lm, card=card, figures=drawn, drop_layer_0=drop_layer_0)


def fitting_strengths(
    lm: LM,
    act: Callable[[float], Steering],
    sampling: Sampling,
    *,
    prompts: Sequence[str] = (),
    problems: Sequence[Problem] = (),
    out: Path | None = None,
) -> strengths.Fit:
    """Try steering strengths on a handful of prompts, so that the first strengths shown fit the model (see ``strengths.fit``).

    The prompts are filled up with ``problems``. If there are none, dev problems are taken of the task that the direction was made from, if
    it is a task that needs no download.

    Args:
        lm: Model to steer.
        act: Function from a strength to the intervention.
        sampling: Sampling settings.
        prompts: User messages.
        problems: Problems to try the strengths on.
        out: Directory to save the rollouts in, from which a repeated call resumes; ``None`` saves nothing.
    """
    task = str(act(1.0).direction.provenance.notes.get("task", ""))
    generated = task in tasks.NAMES and not any(".external." in module for module in tasks.modules(task))
    few, budget = strengths.assumed_handful, sampling.max_new_tokens
    others = problems or (tasks.load(task, "dev", few, lm=lm, max_new_tokens=budget) if generated else ())
    return strengths.fit(lm, act, strengths.handful(_as_problems(prompts), others), sampling, out=out)


def _as_problems(prompts: Sequence[str]) -> list[Problem]:
    return [Problem(f"prompt {i}", ({"role": "user", "content": text},), "") for i, text in enumerate(prompts)]


def steered_responses(
    lm: LM, acts: Mapping[float, Steering], prompts: Sequence[str], sampling: Sampling, *, out: Path | None = None
) -> list[tuple[str, float, Rollout]]:
    """Sample responses to prompts at several steering strengths.

    Args:
        lm: Model to steer.
        acts: Steering strength -> intervention that steers with this strength.
        prompts: User messages.
        sampling: Sampling settings.
        out: Directory to save the rollouts in, from which a repeated call resumes; ``None`` saves nothing.

    Returns:
        Tuples ``(prompt, strength, response)``, ordered by prompt, then in the order of ``acts``, then by sample.
    """
    problems = _as_problems(prompts)
    by_strength = {
        a: rollouts(Condition(lm, (act,)), problems, sampling, out=out and out / f"{a:+g}", progress=f"sampling at {a:+g}")
        for a, act in acts.items()
    }
    n = sampling.n
    return [
        (text, a, r)
        for i, text in enumerate(prompts)
        for a, responses in by_strength.items()
        for r in responses[i * n : (i + 1) * n]
    ]
