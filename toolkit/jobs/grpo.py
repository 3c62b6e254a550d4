"""Train with a length reward (``grpo``), and sweep recipes over seeds (the curves in ``data/grpo``)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from toolkit import evaluate, merging, rewards, store, tasks
from toolkit.generate import Sampling
from toolkit.grpo import curves, policies, recipes
from toolkit.grpo.extras import Extras
from toolkit.grpo.log import Bar
from toolkit.grpo.plan import TrainingPlan
from toolkit.grpo.recipes import Recipe
from toolkit.grpo.run import MODEL, GRPOConfig, Run, Trained, check_free, train
from toolkit.jobs.study import Say, Study
from toolkit.lm import LM
from toolkit.types import Report

TESTED = "arithmetic"  # task on which a sweep compares finished models
HARD = (6, 7, 8)  # operands of the arithmetic problems called hard
RECIPE_NUMBERS = ("problems", "samples", "updates", "max_tokens", "learning_rate")


def catalogue() -> pd.DataFrame:
    """Return a table of all rewards and recipes: paper, whether a recipe has the paper's numbers (``own``), and what is rewarded."""
    rows = [(name, e.paper, "yes" if name in recipes.ALL else "", e.line) for name, e in rewards.ALL.items()]
    others = [(name, recipes.find(name)) for name in recipes.ALL if name not in rewards.ALL]
    rows += [(name, r.paper, "yes", f"{rewards.ALL[r.reward].line[:-1]}; its loss differs.") for name, r in others]
    return pd.DataFrame(rows, columns=["name", "paper", "own", "pays"]).set_index("name")


def adjust_recipe(recipe: Recipe, settings: Mapping[str, str]) -> tuple[Recipe, dict[str, Any]]:
    """Apply ``name=value`` settings to a recipe; return the recipe and the settings that are for TRL's config.

    ``problems``, ``samples``, ``updates``, ``max_tokens`` and ``learning_rate`` change the recipe, ``reward.NAME`` an option of its reward.
    A value is read as JSON, or as text if it is not JSON.

    Raises:
        ValueError: an unknown setting, or one that the run decides.
    """
    values = {name: _value(text) for name, text in settings.items()}
    numbers = {k: v for k, v in values.items() if k in RECIPE_NUMBERS}
    options = {k.removeprefix("reward."): v for k, v in values.items() if k.startswith("reward.")}
    rest = {k: v for k, v in values.items() if k not in numbers and not k.startswith("reward.")}
    if unknown := sorted(set(rest) - {f.name for f in fields(GRPOConfig)}):
        raise ValueError(
            f"Unknown setting {unknown[0]!r}: give one of {', '.join(RECIPE_NUMBERS)}, reward.NAME, or a field of TRL's GRPOConfig."
        )
    check_free(rest)
    if "learning_rate" in numbers:
        numbers["learning_rate"] = float(numbers["learning_rate"])
    return replace(recipe, options={**recipe.options, **options}, **numbers), rest


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def grpo(
    lm: LM, recipe: Recipe, study: Study, run: Run, *, extras: Extras = Extras(), resume: bool = False, say: Say = lambda text: None
) -> Trained:
    """Train a copy of ``lm`` on the study's train split and save it in ``run.out / "model"``, with ``grpo.json`` beside the weights.

    Held-out problems come from the dev split, which shares no problem with the train split, even if the task is a file (see
    ``tasks.external.files``).

    Raises:
        FileExistsError: the run is finished; its model exists.
    """
    if store.is_whole(run.out / MODEL):
        raise FileExistsError(f"{run.out / MODEL} exists: this run is finished. Choose another directory.")
    store.new_directory(run.out / MODEL)
    held_out = replace(study, problems=max(16, study.problems // 4)).load("dev", lm) if run.evaluate_every else []
    say(f"training {lm.name} with {recipe.name}: {run.steps} steps of {recipe.problems} problems x {recipe.samples} samples")
    bars = () if extras.callbacks else (Bar(recipe.name),)
    plugged = replace(extras, callbacks=(*bars, *extras.callbacks))
    run = replace(run, held_out=tuple(held_out))
    return train(lm, recipe, study.load("train", lm), run, extras=plugged, resume=resume, say=say)


def before_and_after(done: Trained) -> pd.DataFrame:
    """Return measures before and after training, one column each: on held-out problems if there are any, else on training batches."""
    rows = done.log.dropna(subset=["held_out/accuracy"]) if "held_out/accuracy" in done.log else done.log[done.log["step"] > 0]
    columns = [c for c in rows.columns if c.startswith("held_out/")] or ["accuracy", "think_tokens", "tokens", "truncated"]
    table = rows.iloc[[0, -1]].set_index("step")[columns].astype(float)
    return table.rename(columns=lambda name: name.removeprefix("held_out/").replace("_", " ")).T.rename_axis("step")


def sweep(
    lm: LM, todo: Sequence[tuple[Recipe, int]], plan: TrainingPlan, *, out: Path, runs: Path, tested: int = 200, say: Say
) -> list[Path]:
    """Train every (recipe, seed) that has no curve yet, in the given order, and compare each policy with base on test problems.

    Call it again to resume; several processes may share the work. A curve of other code, another model, recipe or plan is moved to
    ``runs / "stale"`` and made again. A curve from before code was recorded is kept, with a message.

    Args:
        todo: Recipes with their papers' numbers (``plan`` scales them), and seeds.
        out: Directory of the learning curves, one small file per policy.
        runs: Directory of policies, logs and rollouts.
        tested: Number of arithmetic test problems for the comparison with base, 8 samples each.
        say: Called with one line of progress at a time.

    Returns:
        The files of all curves.
    """
    files = []
    for recipe, seed in todo:
        file = out / f"{store.safe_name(recipe.name)}-seed{seed}.jsonl"
        files.append(file)
        with store.locked(runs / file.stem) as mine:
            if not mine:  # another process makes this curve
                continue
            basis = _curve_basis(lm, recipe, seed, plan, tested)
            if not _is_current(file, basis, lm, plan.sized(recipe), seed, runs / "stale", say):
                say(f"{recipe.name}, seed {seed}")
                done = policies.train_policy(lm, recipe, seed, plan, runs, say=say)
                about = {"kind": "about", "recipe": plan.sized(recipe), "seed": seed, "pool": plan.pool, **basis.record}
                store.write_rows(_curve(lm, done, about, runs, tested), file)
    return files


def _is_current(file: Path, basis: store.Basis, lm: LM, recipe: Recipe, seed: int, stale: Path, say: Say) -> bool:
    """Return True if a curve exists and nothing it depends on has changed; otherwise move it to ``stale``."""
    if not file.exists():
        return False
    about, *rows = curves.lines(file)
    same = json.loads(json.dumps(recipe, default=store.jsonable))
    if "depends" in about:
        store.checked(about, store.RECORD, f"{file}, line 1", "Remove the file: the run is made again.")
    elif "stale" not in about and (about["recipe"], about["seed"], about.get("fingerprint")) == (same, seed, lm.fingerprint):
        say(
            f"{file.name}: kept, although its code is unknown ({about.get('made_by', store.BEFORE_HASHES)}); move the file away to train again"
        )
        return True
    if (about.get("depends"), about.get("code")) == (store.key(basis.depends), basis.code):
        return True
    changed = ", ".join(sorted(basis.changed([about]))) if "depends" in about else ""
    there = store.move(file, stale / f"{file.stem}-{store.key([about, rows])}.jsonl")
    say(f"{file.name} is stale ({changed or 'model, recipe or size'} changed): training again; the old curve is now {there}")
    return False


def _curve_basis(lm: LM, recipe: Recipe, seed: int, plan: TrainingPlan, tested: int) -> store.Basis:
    """Everything that a curve depends on: its policy and the test."""
    policy = policies.basis(lm, recipe, seed, plan)
    code = store.modules_of(
        "toolkit.evaluate",
        "toolkit.jobs.grpo:_curve",
        "toolkit.grpo.curves:steps",
        "toolkit.merging:in_type_of",
        *tasks.modules(TESTED),
    )
    return store.Basis({"run": policy.depends, "tested": [TESTED, tested]}, {**policy.modules, **code})


def _curve(lm: LM, done: Trained, about: Mapping[str, Any], runs: Path, tested: int) -> list[dict[str, Any]]:
    """Compare a policy with base; return the lines of its curve file."""
    policy = merging.in_type_of(lm, done.lm)
    # The name is also that of the folder of rollouts. With the fingerprint in it, rollouts of other weights do not conflict.
    name = f"{about['recipe'].name}-seed{about['seed']}-{policy.fingerprint[:8]}"
    problems, sampling = tasks.load(TESTED, "test", tested), Sampling(n=8, max_new_tokens=400)
    where = runs / "test" / store.code_of("toolkit.generate", *tasks.modules(TESTED))
    report = evaluate.compare({"base": lm, name: policy}, problems, sampling, out=where, progress=False)
    seconds = round(float(done.log["step_time"].sum()), 1)
    models = {"model": lm.name, "fingerprint": lm.fingerprint, "trained": done.lm.fingerprint, "seconds": seconds}
    steps = [{"kind": "step", **row} for row in curves.steps(done.log)]
    tests = [{"kind": "test", **row} for row in _summaries(report)]
    return [{**about, **models}, *steps, *tests, {"kind": "outcomes", **outcomes(report, name)}]


def _summaries(report: Report) -> list[dict[str, Any]]:
    """Rows of ``evaluate.summary`` for all problems and for hard ones."""
    rows = []
    for name, part in (("all", report), ("hard", report.only(difficulty=HARD))):
        summary = evaluate.summary(part)
        summary = summary[summary["metric"].isin(["accuracy", "think_tokens", "closed", "looping"])]
        rows += [{"problems": name, **row} for row in summary.to_dict("records")]
    return rows


def outcomes(report: Report, condition: str) -> dict[str, list]:
    """Return mean accuracy and think tokens per problem, for paired comparisons between policies."""
    rows = report.rows[report.rows["condition"] == condition]
    means = rows.groupby("problem_id")[["correct", "think_tokens"]].mean().rename(columns={"correct": "accuracy"})
    return {"problem_id": list(means.index), **{name: [float(v) for v in means[name]] for name in means}}
