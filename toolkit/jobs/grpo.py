"""Training with a length reward: what ``grpo`` does, and the sweep of recipes over seeds whose curves are in ``data/grpo``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from toolkit import evaluate, rewards, store, tasks
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

TESTED = "arithmetic"  # what a sweep compares finished models on
HARD = (6, 7, 8)  # operands of the arithmetic problems called hard
RECIPE_NUMBERS = ("problems", "samples", "updates", "max_tokens", "learning_rate")


def catalogue() -> pd.DataFrame:
    """Return every reward and recipe with its paper and one line; column ``own``: it has a recipe with its paper's numbers."""
    rows = [(name, e.paper, "yes" if name in recipes.ALL else "", e.line) for name, e in rewards.ALL.items()]
    others = [(name, recipes.find(name)) for name in recipes.ALL if name not in rewards.ALL]
    rows += [(name, r.paper, "yes", f"{rewards.ALL[r.reward].line[:-1]}; what is its own is in the loss.") for name, r in others]
    return pd.DataFrame(rows, columns=["name", "paper", "own", "pays"]).set_index("name")


def adjust_recipe(recipe: Recipe, settings: Mapping[str, str]) -> tuple[Recipe, dict[str, Any]]:
    """A recipe changed by ``name=value`` texts, and what of them is for TRL's config.

    ``problems``, ``samples``, ``updates``, ``max_tokens`` and ``learning_rate`` are the recipe's, ``reward.NAME`` an option of its reward;
    values are JSON, or else text.
    """
    values = {name: _value(text) for name, text in settings.items()}
    own = {k: v for k, v in values.items() if k in RECIPE_NUMBERS}
    options = {k.removeprefix("reward."): v for k, v in values.items() if k.startswith("reward.")}
    rest = {k: v for k, v in values.items() if k not in own and not k.startswith("reward.")}
    if unknown := sorted(set(rest) - {f.name for f in fields(GRPOConfig)}):
        raise ValueError(
            f"Unknown setting {unknown[0]!r}: give one of {', '.join(RECIPE_NUMBERS)}, reward.NAME, or a field of TRL's GRPOConfig."
        )
    check_free(rest)
    if "learning_rate" in own:
        own["learning_rate"] = float(own["learning_rate"])
    return replace(recipe, options={**recipe.options, **options}, **own), rest


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def grpo(
    lm: LM, recipe: Recipe, study: Study, run: Run, *, extras: Extras = Extras(), resume: bool = False, say: Say = lambda text: None
) -> Trained:
    """Train ``lm`` on the study's train split; the model is in ``run.out / "model"``, with ``grpo.json`` beside its weights.

    Held-out problems are from the dev split, which shares no problem with the train split, also of a file (see ``tasks.files``).

    Raises:
        FileExistsError: the run is finished: its model is there.
    """
    if store.is_whole(run.out / MODEL):
        raise FileExistsError(f"{run.out / MODEL} exists: this run is finished. Choose another directory.")
    store.new_directory(run.out / MODEL)
    held_out = replace(study, problems=max(16, study.problems // 4)).load("dev", lm) if run.evaluate_every else []
    say(f"training {lm.name} with {recipe.name}: {run.steps} steps of {recipe.problems} problems x {recipe.samples} samples")
    bars = () if extras.callbacks else (Bar(recipe.name),)
    plugged = replace(extras, callbacks=(*bars, *extras.callbacks))
    done = train(
        lm, recipe, study.load("train", lm), replace(run, held_out=tuple(held_out)), extras=plugged, resume=resume, say=say
    )
    return done


def before_and_after(done: Trained) -> pd.DataFrame:
    """Return one column for the model before training and one for after: held-out measures if there are any, else those of training."""
    rows = done.log.dropna(subset=["held_out/accuracy"]) if "held_out/accuracy" in done.log else done.log[done.log["step"] > 0]
    wanted = [c for c in rows.columns if c.startswith("held_out/")] or ["accuracy", "think_tokens", "tokens", "truncated"]
    shown = rows.iloc[[0, -1]].set_index("step")[wanted].astype(float)
    return shown.rename(columns=lambda name: name.removeprefix("held_out/").replace("_", " ")).T.rename_axis("step")


def sweep(
    lm: LM, todo: Sequence[tuple[Recipe, int]], plan: TrainingPlan, *, curves: Path, runs: Path, tested: int = 200, say: Say
) -> list[Path]:
    """Train every (recipe, seed) that has no curve yet, in the given order, and compare each policy with base on test problems.

    Rerun the same command to resume; two processes that run it at the same time share the policies. A curve that was made by other code,
    model, recipe or plan is moved to ``runs / "stale"`` and made again; a curve from before code was recorded is kept, with a message.

    Args:
        todo: Recipes with their papers' numbers (``plan`` sizes them), and seeds.
        curves: Directory of the learning curves, one small file per policy.
        runs: Directory of policies, logs and rollouts.
        tested: Arithmetic problems of the test split that each policy is compared with base on, 8 samples each.

    Returns:
        The files of all curves.
    """
    files = []
    for recipe, seed in todo:
        file = curves / f"{store.as_name(recipe.name)}-seed{seed}.jsonl"
        files.append(file)
        with store.claimed(runs / file.stem) as mine:
            basis = _curve_basis(lm, recipe, seed, plan, tested)
            if mine and not _is_current(file, basis, lm, plan.sized(recipe), seed, runs / "stale", say):
                say(f"{recipe.name}, seed {seed}")
                done = policies.train_policy(lm, recipe, seed, plan, runs, say=say)
                about = {"kind": "about", "recipe": plan.sized(recipe), "seed": seed, "pool": plan.pool, **basis.record}
                store.write_rows(_curve(lm, done, about, runs, tested), file)
    return files


def _is_current(file: Path, basis: store.Basis, lm: LM, recipe: Recipe, seed: int, stale: Path, say: Say) -> bool:
    """Whether a curve exists and is what would be made now; otherwise it is moved to ``stale``."""
    if not file.exists():
        return False
    about, *rows = curves.lines(file)
    same = json.loads(json.dumps(recipe, default=store.jsonable))
    if "depends" in about:
        store.checked(about, store.RECORD, f"{file}, line 1", "Remove the file: the run is made again.")
    elif "stale" not in about and (about["recipe"], about["seed"], about.get("fingerprint")) == (same, seed, lm.fingerprint):
        say(
            f"{file.name}: {about.get('made_by', store.BEFORE_HASHES)}, so kept without knowing its code; move it away to train it again"
        )
        return True
    if (about.get("depends"), about.get("code")) == (store.key(basis.depends), basis.code):
        return True
    changed = ", ".join(sorted(basis.changed([about]))) if "depends" in about else ""
    there = store.move(file, stale / f"{file.stem}-{store.key([about, rows])}.jsonl")
    say(f"{file.name} is stale ({changed or 'another model, recipe or size'} changed): trained again; the old one is {there}")
    return False


def _curve_basis(lm: LM, recipe: Recipe, seed: int, plan: TrainingPlan, tested: int) -> store.Basis:
    """Everything that a curve depends on: its policy, and how the policy is tested."""
    policy = policies.basis(lm, recipe, seed, plan)
    code = store.modules_of("toolkit.evaluate", "toolkit.jobs.grpo:_curve", *tasks.modules(TESTED))
    return store.Basis({"run": policy.depends, "tested": [TESTED, tested]}, {**policy.modules, **code})


def _curve(lm: LM, done: Trained, about: Mapping[str, Any], runs: Path, tested: int) -> list[dict[str, Any]]:
    """Test a policy beside base; return the lines of its curve file."""
    policy = policies.in_type_of(lm, done.lm)
    # The fingerprint is in the name because a folder of rollouts is named by it: those of other weights are not in the way.
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
    """Rows of ``evaluate.summary`` on all and on hard problems."""
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
