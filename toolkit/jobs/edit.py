"""Edit the attention heads that ``find_heads`` chose, and compare the edit with random controls. The command ``thinkedit`` uses this module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from toolkit import directions, edits, evaluate, report, store, tensors, vectors
from toolkit.edits import steering
from toolkit.engines import OWN_LOOP, Engine
from toolkit.jobs.controls import random_controls, random_groups, random_heads
from toolkit.jobs.finding import EditSettings, Finding, plan_table
from toolkit.jobs.study import Say, Study
from toolkit.lm import LM, Condition
from toolkit.types import Direction, Plan, Report


def edit_conditions(lm: LM, findings: Mapping[str, Finding], settings: EditSettings = EditSettings()) -> dict[str, Condition]:
    """Return a dict from name to condition: base, the edited models, and random controls of each edit.

    An edit with the name NAME has two kinds of controls. ``NAME: random heads 1``, ``2``, ... make the same edit on other heads of the same
    layers (see ``random_heads``). ``NAME: random direction 1``, ``2``, ... edit the same heads, along directions between random groups of
    responses (see ``random_groups``).

    Args:
        lm: The base model.
        findings: Name of the edit -> result of ``find_heads``.
        settings: Seed of the controls, and number of controls of each kind per edit.
    """
    result = {"base": Condition(lm, note="unchanged")}
    for name, f in findings.items():
        plans = {name: f.plan}
        for kind, draw in (("heads", random_heads), ("direction", random_groups)):
            drawn = random_controls(lm, f, f.plan, draw, settings.draws, seed=settings.seed)
            plans |= {f"{name}: random {kind} {i + 1}": plan for i, plan in enumerate(drawn)}
        result |= {label: edited(lm, plan) for label, plan in plans.items()}
    return result


def edited(lm: LM, plan: Plan) -> Condition:
    """Return the edited model as a condition.

    The condition holds a model with changed weights. If the weights are quantised or offloaded, it holds ``lm`` and an intervention that
    makes the same change in every forward pass.

    Args:
        lm: The base model; it is not changed.
        plan: Heads to edit, strength of each edit, and the direction to remove from their outputs.
    """
    if tensors.storage(lm.model):
        return Condition(lm, (edits.RuntimeEdit(plan),), note=plan.name)
    return Condition(edits.apply(lm, plan), note=plan.name)


def edit_and_measure(
    lm: LM,
    finding: Finding,
    study: Study,
    settings: EditSettings,
    *,
    engine: Engine = OWN_LOOP,
    out: Path | None = None,
    say: Say = lambda text: None,
) -> tuple[pd.DataFrame, Report]:
    """Compare base, the edited model and random controls on the study's test problems.

    Args:
        lm: The base model.
        finding: Result of ``find_heads``; its plan is the edit.
        study: Task, numbers of problems and samples, and seed.
        settings: Seed of the controls, and number of controls of each kind.
        engine: Program that samples the tokens.
        out: Directory for rollouts, ``report.json`` and ``rows.parquet``; ``None`` writes nothing.
        say: Function that is called with one line of progress at a time.

    Returns:
        The table of ``evaluate.summary`` (one row per condition and metric), and the report with every response.
    """
    say(f"measuring base, edited model and random controls on the test split of {study.task}")
    measured = evaluate.compare(
        edit_conditions(lm, {"edited": finding}, settings), study.load("test", lm), study.sampling, engine=engine,
        out=out and out / "rollouts" / "test",
        allow_overlap=study.allow_overlap,
    )  # fmt: skip
    summary = evaluate.summary(measured, seed=study.seed) if out is None else report.write(out, measured, seed=study.seed)
    return summary, measured


def is_saved(lm: LM, finding: Finding, directory: str | Path) -> bool:
    """Return True if ``save_edited`` has already saved this edit in a directory, False if the directory is empty or missing.

    ``edit.json`` in the directory records a hash of the edited weights. It is compared with the hash for the edit in ``finding``.

    Raises:
        FileExistsError: the directory holds another model, or other files.
        DamagedFileError: the file ``edit.json`` in it is damaged.
    """
    if not Path(directory).is_dir() or not any(Path(directory).iterdir()):
        return False
    about = Path(directory) / "edit.json"
    remedy = "Choose another directory, or remove it first."
    expected = _fingerprint(lm, finding.plan)
    if not about.is_file() or store.read_json(about, {"fingerprint": str}, remedy=remedy)["fingerprint"] != expected:
        raise FileExistsError(f"{directory} is not empty and holds another model. {remedy}")
    return True


def _fingerprint(lm: LM, plan: Plan) -> str:
    """Return a hash of the edited model: the fingerprint of its weights.

    Quantised or offloaded weights cannot be edited. The hash is then that of the unchanged weights together with the plan.
    """
    condition = edited(lm, plan)
    return store.key([lm.fingerprint, str(condition.during[0])]) if condition.during else condition.lm.fingerprint


def save_edited(lm: LM, finding: Finding, measured: Report, summary: pd.DataFrame, directory: str | Path) -> Path:
    """Save an edited copy of ``lm`` as a Hugging Face directory, and return the directory's path.

    If the weights of ``lm`` are quantised or offloaded, a PEFT adapter of rank 1 is saved instead (see ``vectors.save_adapter``). The
    directory also holds:

    * ``edit.json``: the plan, hashes of the base and of the edited weights, and for each edited head the norm of its columns of W_O before
      and after the edit (not for an adapter).
    * ``direction.safetensors``: the length direction, ``finding.direction``.
    * ``plan.safetensors``: the plan, ``finding.plan``, for ``toolkit export --plan``.
    * ``README.md``: model card with the edited heads and the measured effects.

    If saving fails, no directory is left behind.

    Args:
        lm: The base model; it is not changed.
        finding: Result of ``find_heads``.
        measured: Report that ``edit_and_measure`` returned.
        summary: Table that ``edit_and_measure`` returned, for the card.
        directory: Directory to write, new or empty.
    """
    condition = edited(lm, finding.plan)
    norms = [] if condition.during else edits.column_norms(lm, condition.lm, finding.plan)
    about = {"plan": finding.plan, "norms": norms, "parent": lm.fingerprint, "fingerprint": _fingerprint(lm, finding.plan)}
    card = report.model_card(
        lm.name, finding.plan, plan_table(finding), report.headline_table(summary), on=report.judged_on(measured)
    )
    with store.atomic_directory(directory) as partial:
        if condition.during:
            vectors.save_adapter(lm, finding.plan, partial)
        else:
            condition.lm.save(partial)
        store.write_json(about, partial / "edit.json")
        store.save(finding.direction, partial / "direction.safetensors")
        store.save(finding.plan, partial / "plan.safetensors")
        store.write_text(card, partial / "README.md")
    return Path(directory)


# Steering strengths of the demo, from -1.5 to 1.5: ours. Strength 1 adds the whole direction, long minus short thinking.
STRENGTHS = tuple(3 * i / 8 for i in range(-4, 5))


DOSE = 0.5  # steering strength of ``steering_conditions``: ours


"""Settings of the demo. 6 % of the heads are edited: 2 of the 32 heads of the tiny reasoner. ThinkEdit's authors edited 3.9 to 6.3 %."""


def steering_conditions(lm: LM, v: Direction, settings: EditSettings) -> dict[str, Condition]:
    """Return a dict from name to condition, with three conditions that steer a model in all layers at every position.

    ``steered shorter`` and ``steered longer`` add -0.5 and +0.5 times the direction; ``steered randomly`` adds +0.5 times a random
    direction of equal norm, as a control.

    Args:
        lm: Model to steer.
        v: Length direction; adding it lengthens thinking.
        settings: Its ``seed`` is the seed of the random direction. Its other fields are not used.
    """
    noise = directions.random_like(v, seed=settings.seed)
    doses = {"steered shorter": (v, -DOSE), "steered longer": (v, DOSE), "steered randomly": (noise, DOSE)}
    return {name: Condition(lm, (steering(d, a),), note=str(steering(d, a))) for name, (d, a) in doses.items()}
