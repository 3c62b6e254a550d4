"""Training with a length reward: what ``grpo`` does, and the sweep of recipes over seeds whose curves are in ``data/grpo``."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from toolkit import evaluate, identity, rewards, stats, store, tasks
from toolkit.generate import Sampling
from toolkit.grpo import code, recipes
from toolkit.grpo.log import LOG, Bar, read
from toolkit.grpo.recipes import Recipe
from toolkit.grpo.run import MODEL, GRPOConfig, Run, Trained, check_free, train, who
from toolkit.grpo.saved import read_back
from toolkit.grpo.trainer import Extras
from toolkit.jobs.study import Say, Study
from toolkit.lm import LM, as_type, child
from toolkit.rounding import rounding
from toolkit.types import Report

TESTED = "arithmetic"  # what a sweep compares finished models on
HARD = (6, 7, 8)  # operands of the arithmetic problems called hard
IN_CURVE: dict[str, dict[str, Any]] = {
    "about": {"recipe": {"name": str}, "seed": int},
    "step": {"step": int},
    "test": {"problems": str, "condition": str, "metric": str, "mean": float, "low": float, "high": float},
    "outcomes": {"problem_id": list[str], "accuracy": list[float], "think_tokens": list[float]},
}
"""Fields of the lines of a learning curve, by kind."""
CURVE = (
    "step", "accuracy", "think_tokens", "tokens", "truncated", "zero_std", "entropy/think", "entropy/answer", "reward", "grad_norm",
    "answers/most_common", "step_time", "alarms",
)  # fmt: skip
"""Columns of a log kept in a curve; those of held-out problems are kept too."""


RECIPE_NUMBERS = ("problems", "samples", "updates", "max_tokens", "learning_rate")


def table() -> pd.DataFrame:
    """Every reward and recipe with its paper and one line; ``own`` says whether it has a recipe with its paper's numbers."""
    rows = [(name, e.paper, "yes" if name in recipes.ALL else "", e.line) for name, e in rewards.ALL.items()]
    others = [(name, recipes.find(name)) for name in recipes.ALL if name not in rewards.ALL]
    rows += [(name, r.paper, "yes", f"{rewards.ALL[r.reward].line[:-1]}; what is its own is in the loss.") for name, r in others]
    return pd.DataFrame(rows, columns=["name", "paper", "own", "pays"]).set_index("name")


def adjusted(recipe: Recipe, settings: Mapping[str, str]) -> tuple[Recipe, dict[str, Any]]:
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


def adapter(rank: int) -> Any:
    """LoRA on every linear layer but the output, ``alpha`` twice the rank (ours)."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def board(done: Trained) -> pd.DataFrame:
    """Before and after: the held-out columns of the first and last row that have them, else the training columns."""
    rows = done.log.dropna(subset=["held_out/accuracy"]) if "held_out/accuracy" in done.log else done.log[done.log["step"] > 0]
    wanted = [c for c in rows.columns if c.startswith("held_out/")] or ["accuracy", "think_tokens", "tokens", "truncated"]
    shown = rows.iloc[[0, -1]].set_index("step")[wanted].astype(float)
    return shown.rename(columns=lambda name: name.removeprefix("held_out/").replace("_", " ")).T.rename_axis("step")


@dataclass(frozen=True)
class Sweep:
    """A sweep of recipes over seeds on arithmetic, in the size of the tiny reasoner.

    Attributes:
        curves: Where the learning curves go: one small file a run.
        runs: Where checkpoints, models and rollouts go.
        steps: Steps a run.
        pool: Training problems; fewer than a run asks, so that they come back (HAPO compares with earlier visits).
        judged: Dev problems a curve is measured on, 4 samples each.
        tested: Test problems the finished model is compared with base on, 8 samples each.
        task: Task trained and judged on.
        micro_batch: Rows of a forward and backward pass.
        lora: Rank of a LoRA adapter, merged at the end, or ``None`` to train every weight.
        engine: See ``grpo.trainer.Extras``.
        overrides: Fields of TRL's ``GRPOConfig``.
    """

    curves: Path
    runs: Path
    steps: int = 80
    pool: int = 256
    judged: int = 64
    tested: int = 200
    every: int = 10
    task: str = "arithmetic"
    micro_batch: int = 16
    lora: int | None = None
    engine: str = "toolkit"
    overrides: tuple[tuple[str, Any], ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """What a trained model depends on beside weights, recipe, problems and seed."""
        own = {"steps": self.steps, "judged": [self.judged, self.every]}
        more = {"lora": self.lora, "overrides": self.overrides} | ({"engine": self.engine} if self.engine != "toolkit" else {})
        return own | {name: value for name, value in more.items() if value}


def sweep(lm: LM, todo: Sequence[tuple[Recipe, int]], plan: Sweep, *, say: Say) -> list[Path]:
    """Train every (recipe, seed) that has no curve yet, in the order given, and compare each with base on held-out test problems.

    Killed and given again, it goes on in the run it was in; given twice at the same time, the two share the runs. A curve that was made by
    other code, or of something else, is moved to ``plan.runs / "stale"`` and made again; one from before code was recorded is kept, and
    said to be so. Returns the files of all curves.
    """
    files = []
    for recipe, seed in todo:
        file = plan.curves / f"{store.safe_name(recipe.name)}-seed{seed}.jsonl"
        files.append(file)
        with store.locked(plan.runs / file.stem) as mine:
            if mine and not _kept(lm, recipe, seed, plan, file, say):
                say(f"{recipe.name}, seed {seed}")
                store.write_rows(_one(lm, recipe, seed, plan, say), file)
    return files


def _kept(lm: LM, recipe: Recipe, seed: int, plan: Sweep, file: Path, say: Say) -> bool:
    """Whether a curve is there and is what would be made now; one that is not is moved out of the way."""
    if not file.exists():
        return False
    about, *rows = _curve_of(file)
    basis, same = _curve_basis(lm, recipe, seed, plan), json.loads(json.dumps(recipe, default=store.jsonable))
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
    there = store.move(file, plan.runs / "stale" / f"{file.stem}-{store.key([about, rows])}.jsonl")
    say(f"{file.name} is stale ({changed or 'another model, recipe or size'} changed): trained again; the old one is {there}")
    return False


def _curve_basis(lm: LM, recipe: Recipe, seed: int, plan: Sweep) -> store.Basis:
    """What a curve depends on: its run, and how the finished model is tested."""
    run = basis(lm, recipe, seed, plan)
    own = store.modules_of("toolkit.evaluate", "toolkit.jobs.grpo:_one", *tasks.modules(TESTED))
    return store.Basis({"run": run.depends, "tested": [TESTED, plan.tested]}, {**run.modules, **own})


def trained(lm: LM, recipe: Recipe, seed: int, plan: Sweep, *, reward: Any = None, say: Say) -> Trained:
    """``lm`` trained by a recipe from a seed as ``plan`` says; read back if that was done already, gone on with if it was begun.

    A run has a folder of its own in ``plan.runs`` for everything it depends on, and leaves its model there, without checkpoints. One
    process trains it; another that asks for it meanwhile waits.

    Args:
        reward: A reward object of one's own instead of the recipe's, as it is before training; its class and fields are part of what
            the run depends on.

    Raises:
        identity.UnknownIdentityError: the reward holds something that is not known by its values.
    """
    study, folder = Study(plan.task, plan.pool), run_of(lm, recipe, seed, plan, reward=reward)
    dev = replace(study, problems=plan.judged).load("dev", lm)
    run = Run(
        folder, plan.steps, seed, save_every=20, held_out=tuple(dev), evaluate_every=plan.every, micro_batch=plan.micro_batch,
        evaluate=Sampling(n=4, max_new_tokens=max(200, recipe.max_tokens)), overrides=dict(plan.overrides),
    )  # fmt: skip
    extras = Extras(reward=deepcopy(reward), engine=plan.engine, lora=adapter(plan.lora) if plan.lora else None)
    rests_on = basis(lm, recipe, seed, plan, reward=reward)
    with store.locked(folder, wait=True):
        if store.is_whole(folder / MODEL):
            model = replace(read_back(lm, folder / MODEL), parent=lm.fingerprint, name=f"{lm.name}, {recipe.name}")
            return Trained(model, pd.DataFrame(read(folder / LOG)))
        if not (folder / store.MADE_BY).exists():
            changed = rests_on.changed(store.records(plan.runs, f"{glob.escape(_name(recipe, seed))}-*"))
            if changed:
                say(
                    f"{recipe.name}, seed {seed}, was trained by other code ({', '.join(sorted(changed))} changed): training it again"
                )
            rests_on.write(folder)
        done = train(lm, recipe, study.load("train", lm), run, extras=extras, resume=True, say=say)
        if done.main:
            for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                store.remove(checkpoint)
    return done


def beside(base: LM, policy: LM) -> LM:
    """The policy in the number type of ``base``, so that a comparison of the two holds no difference of number types.

    A saved policy is fp32 as a rule. Where ``base`` is narrower, part of what was learned is rounded away: the new model's name says how
    much. The weights of ``policy`` are changed in place.
    """
    dtype = base.model.dtype
    if policy.model.dtype == dtype:
        return policy
    before, after = (dict(lm.model.named_parameters()) for lm in (base, policy))
    name = f"{policy.name}; {rounding(before, after, dtype)}"
    return child(base, as_type(policy.model, dtype), name, made_from=policy.made_from)


def run_of(lm: LM, recipe: Recipe, seed: int, plan: Sweep, *, reward: Any = None) -> Path:
    """Folder of a run, named by everything it depends on, the code included."""
    return plan.runs / f"{_name(recipe, seed)}-{basis(lm, recipe, seed, plan, reward=reward).key}"


def _name(recipe: Recipe, seed: int) -> str:
    return f"{store.safe_name(recipe.name)}-seed{seed}"


def basis(lm: LM, recipe: Recipe, seed: int, plan: Sweep, *, reward: Any = None) -> store.Basis:
    """What a trained policy depends on, and the code it passes through."""
    pool = Study(plan.task, plan.pool).load("train", lm)
    own = {} if reward is None else {"reward": identity.of(reward).body}
    lora = {} if plan.lora is None else {"adapter": identity.of(adapter(plan.lora)).body}
    # A loss of its own may be over the rows of a micro-batch, as DRPO's hinge is.
    rows = {"micro_batch": plan.micro_batch} if recipe.loss else {}
    depends = {**who(lm, recipe, pool), "seed": seed, **plan.identity, **own, **lora, **rows}
    return store.Basis(json.loads(json.dumps(depends, default=str)), code.modules(recipe, plan.task, reward))


def _one(lm: LM, recipe: Recipe, seed: int, plan: Sweep, say: Say) -> list[dict[str, Any]]:
    done = trained(lm, recipe, seed, plan, say=say)
    # Also the name of a folder: rollouts of other weights are not in the way.
    fingerprint, policy = done.lm.fingerprint, beside(lm, done.lm)
    name = f"{recipe.name}-seed{seed}-{policy.fingerprint[:8]}"
    study = Study(TESTED, plan.tested)
    problems, sampling = study.load("test"), Sampling(n=8, max_new_tokens=400)
    where = plan.runs / "test" / store.code_of("toolkit.generate", *tasks.modules(TESTED))
    report = evaluate.compare({"base": lm, name: policy}, problems, sampling, out=where, progress=False)
    about = {
        "kind": "about",
        "recipe": recipe,
        "seed": seed,
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        "trained": fingerprint,
        "pool": plan.pool,
        **_curve_basis(lm, recipe, seed, plan).record,
        "seconds": round(float(done.log["step_time"].sum()), 1),
    }
    steps = [{"kind": "step", **row} for row in curve(done.log)]
    return [about, *steps, *({"kind": "test", **row} for row in _summaries(report)), {"kind": "outcomes", **outcomes(report, name)}]


def curve(log: pd.DataFrame) -> list[dict[str, Any]]:
    """The columns of a log worth keeping, numbers to four digits, what is missing left out."""
    kept = [c for c in log.columns if c in CURVE or c.startswith(("held_out/", "component/"))]
    rows = log[kept].to_dict("records")
    short = ({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return [{k: v for k, v in row.items() if v is not None and v == v} for row in short]


def _summaries(report: Report) -> list[dict[str, Any]]:
    """Rows of ``evaluate.summary`` on all and on hard problems."""
    rows = []
    for name, part in (("all", report), ("hard", report.only(difficulty=HARD))):
        summary = evaluate.summary(part)
        summary = summary[summary["metric"].isin(["accuracy", "think_tokens", "closed", "looping"])]
        rows += [{"problems": name, **row} for row in summary.to_dict("records")]
    return rows


def outcomes(report: Report, condition: str) -> dict[str, list]:
    """Mean accuracy and think tokens of each problem, by ``problem_id``: what paired comparisons between runs need."""
    rows = report.rows[report.rows["condition"] == condition]
    means = rows.groupby("problem_id")[["correct", "think_tokens"]].mean().rename(columns={"correct": "accuracy"})
    return {"problem_id": list(means.index), **{name: [float(v) for v in means[name]] for name in means}}


def _curve_of(file: Path) -> list[dict[str, Any]]:
    """The rows of one run of a sweep: what it is, its steps, its tests, its outcomes; DamagedFileError names the line that is not."""
    remedy = "Run its sweep.py again for this run."
    rows = store.read_rows(file, {"kind": Literal["about", "step", "test", "outcomes"]})
    for number, row in enumerate(rows, 1):
        store.checked(row, IN_CURVE[row["kind"]], f"{file}, line {number}", remedy)
        if row["kind"] == "step":
            numbers = {name: value for name, value in row.items() if name != "kind"}
            store.checked(numbers, Mapping[str, float | list[str] | None], f"{file}, line {number}", remedy)
    kinds = [row["kind"] for row in rows]
    empty: dict[str, list] = {name: [] for name in IN_CURVE["outcomes"]}
    outcomes = next((row for row in rows if row["kind"] == "outcomes"), empty)
    if kinds[:1] != ["about"] or kinds.count("about") > 1 or kinds.count("outcomes") != 1 or not {"step", "test"} < set(kinds):
        raise store.DamagedFileError(
            f"{file} holds {len(rows)} lines: expected one of the run first, then steps, tests and one of outcomes. {remedy}"
        )
    if len({len(outcomes[name]) for name in IN_CURVE["outcomes"]}) > 1:
        raise store.DamagedFileError(f"{file}: its outcomes have columns of different lengths. {remedy}")
    return rows


def read_curves(folder: Path) -> tuple[dict[str, list[pd.DataFrame]], pd.DataFrame]:
    """What a sweep wrote: the logs of each recipe's seeds, and one table of all comparisons with base on the test problems.

    The table has the columns of ``evaluate.summary`` with ``problems`` (``all`` or ``hard``), ``name`` and ``seed`` (base: once, seed -1).

    Raises:
        FileNotFoundError: no curve there.
    """
    logs: dict[str, list[pd.DataFrame]] = {}
    tests = []
    for file in sorted(folder.glob("*-seed*.jsonl")):
        about, *rows = _curve_of(file)
        name, seed = about["recipe"]["name"], about["seed"]
        logs.setdefault(name, []).append(pd.DataFrame([row for row in rows if row["kind"] == "step"]))
        own = pd.DataFrame([row for row in rows if row["kind"] == "test"]).drop(columns="kind")
        base = own["condition"] == "base"
        tests.append(own.assign(name=own["condition"].where(base, name), seed=[-1 if b else seed for b in base]))
    if not logs:
        raise FileNotFoundError(f"No learning curves in {folder}: run its sweep.py.")
    return logs, pd.concat(tests, ignore_index=True).drop(columns="condition").drop_duplicates(ignore_index=True)


def against(folder: Path, name: str = "correctness") -> pd.DataFrame:
    """Paired differences of every trained model to that of one recipe (its lowest seed), on the same test problems and random numbers.

    Columns: ``name, seed, metric`` (``accuracy`` or ``think_tokens``), ``difference, low, high``: 95 % intervals over problems, not over
    seeds.

    Raises:
        FileNotFoundError: no curve of ``name``.
    """
    found: dict[tuple[str, int], dict] = {}
    for file in sorted(folder.glob("*-seed*.jsonl")):
        about, *rows = _curve_of(file)
        (found[about["recipe"]["name"], about["seed"]],) = (row for row in rows if row["kind"] == "outcomes")
    seeds = [seed for other, seed in found if other == name]
    if not seeds:
        raise FileNotFoundError(f"No learning curve of {name} in {folder}.")
    base, table = found[name, min(seeds)], []
    for (other, seed), own in found.items():
        if own["problem_id"] != base["problem_id"]:
            raise ValueError(f"{other}, seed {seed}, was tested on other problems than {name}.")
        for metric in ("accuracy", "think_tokens"):
            e = stats.mean_effect(*(np.array([values[metric]], float) for values in (own, base)))
            table.append((other, seed, metric, e.mean, e.low, e.high))
    return pd.DataFrame(table, columns=["name", "seed", "metric", "difference", "low", "high"])


def after_training(tests: pd.DataFrame, problems: str = "all") -> pd.DataFrame:
    """One row a trained model: accuracy and think tokens on the test problems with their intervals, and differences to base.

    Columns: ``name, seed``, and for ``accuracy`` and ``think_tokens`` the mean, ``_low``, ``_high``, ``_difference``,
    ``_difference_low``, ``_difference_high``.
    """
    columns = ["mean", "low", "high", "difference", "difference_low", "difference_high"]
    rows = tests[(tests["problems"] == problems) & tests["metric"].isin(["accuracy", "think_tokens"])]
    wide = rows.pivot(index=["name", "seed"], columns="metric", values=columns)
    wide.columns = [metric if kind == "mean" else f"{metric}_{kind}" for kind, metric in wide.columns]
    return wide.reset_index()
