"""Train one policy with a length reward (command ``grpo``), or many policies to compare their learning curves (``sweep``).

A recipe is the training setup of a paper: reward, loss, and numbers such as batch size and learning rate.
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from toolkit import evaluate, figures, merging, rewards, store, tasks, verdicts
from toolkit.figures.training import HELD_OUT
from toolkit.generate import Sampling
from toolkit.grpo import curves, policies, saved
from toolkit.grpo.extras import Extras
from toolkit.grpo.log import Bar
from toolkit.grpo.plan import TrainingPlan
from toolkit.grpo.recipe import with_defaults
from toolkit.grpo.recipes import Recipe
from toolkit.grpo.run import GRPOConfig, Run, Trained, check_free, train
from toolkit.jobs.study import Say, Study
from toolkit.lm import LM
from toolkit.pages import Page, Section
from toolkit.types import Report

TESTED = "arithmetic"  # task on which a sweep compares finished policies with base
IN_TRAINING = ("accuracy", "think_tokens", "truncated")  # measures of a training batch
HARD = (6, 7, 8)  # numbers of operands of the arithmetic problems that are called hard
RECIPE_NUMBERS = {"problems": int, "samples": int, "updates": int, "max_tokens": int, "learning_rate": float}
"""Number of a recipe that ``adjust_recipe`` can change by name -> its type."""
JSON_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
"""Type -> name of its values in an error about a setting."""


def adjust_recipe(recipe: Recipe, settings: Mapping[str, str]) -> tuple[Recipe, dict[str, Any]]:
    """Change settings of a recipe by name. Return the changed recipe, and a dict of the settings that are not part of a recipe.

    The settings in the dict are fields of ``GRPOConfig``, the configuration of TRL (the library that trains). Pass them as
    ``Run(overrides=...)``.

    Args:
        recipe: Recipe to change; the original is not modified.
        settings: Name -> value as text, which is read as JSON, or as plain text if it is not JSON. Names: ``problems`` (per batch),
            ``samples`` (per problem), ``updates`` (optimizer steps per batch), ``max_tokens`` (per response) and ``learning_rate`` change
            the recipe; ``reward.NAME`` changes the option NAME of its reward; any other name must be a field of ``GRPOConfig``.

    Raises:
        ValueError: a name is unknown, a value is of another type than the setting, or the name is that of a field of ``GRPOConfig`` that
            the toolkit sets itself.
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
    make = rewards.ALL[recipe.reward].make
    known = list(inspect.signature(make).parameters)
    if unknown := sorted(set(options) - set(known)):
        takes = f"its options are {', '.join(f'reward.{name}' for name in known)}" if known else "it has no options"
        raise ValueError(f"Unknown setting 'reward.{unknown[0]}' of the reward {recipe.reward!r}: {takes}.")
    _check_types(numbers, RECIPE_NUMBERS)
    _check_types(options, typing.get_type_hints(make), "reward.")
    # TRL also takes true and false for ``scale_rewards``, against its own annotation.
    _check_types(rest, typing.get_type_hints(GRPOConfig) | {"scale_rewards": str | bool})
    if "learning_rate" in numbers:
        numbers["learning_rate"] = float(numbers["learning_rate"])
    return replace(recipe, options={**recipe.options, **options}, **numbers), rest


def _check_types(values: Mapping[str, Any], hints: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ValueError if a value that was read as JSON does not have the type of its setting.

    Args:
        values: Name -> value.
        hints: Name -> type, as ``typing.get_type_hints`` returns it.
        prefix: Text before the names in the error.
    """
    for name, value in values.items():
        kinds = _alternatives(hints[name])
        if not any(_has_type(value, kind) for kind in kinds):
            named = [kind for kind in kinds if not (kind is int and float in kinds)]
            wanted = " or ".join(JSON_NAMES.get(kind, f"a {getattr(kind, '__name__', kind)}") for kind in named)
            raise ValueError(f"{prefix}{name}={value!r}: expected {wanted}.")


def _alternatives(hint: Any) -> list[Any]:
    """Return the types of a type hint: the members of a union, at any depth, else the hint itself."""
    # The origins of ``X | Y`` and of a union that names one type by a string are two classes, of equal names.
    if getattr(typing.get_origin(hint), "__name__", "") in ("Union", "UnionType"):
        return [kind for part in typing.get_args(hint) for kind in _alternatives(part)]
    return [hint]


def _has_type(value: Any, kind: Any) -> bool:
    """Return True if a value that was read as JSON may be given where ``kind``, which is not a union, is expected.

    A list may be given for a tuple, and a whole number for any number. The elements of a list or dict are not checked.
    """
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    base = typing.get_origin(kind) or kind
    if base is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if base is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, list if base is tuple else base)


def _value(text: str) -> Any:
    """Return the value of a text in JSON, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def grpo(
    lm: LM, recipe: Recipe, study: Study, run: Run, *, extras: Extras = Extras(), resume: bool = False, say: Say = lambda text: None
) -> Trained:
    """Train a copy of ``lm`` on the study's train split, and save it in ``run.out / "model"``, or in ``run.out / "vector"`` for vectors.

    The file ``grpo.json`` there describes the run.

    Evaluations during training, if ``run.evaluate_every`` requests them, use problems of the dev split. The number of these problems is a
    quarter of the number of training problems, but at least 16. The train and the dev split have no problem in common, even if the task is
    a file of problems.

    Args:
        lm: Model to start from; it is not changed.
        recipe: Training setup: reward, loss, and numbers such as batch size and learning rate.
        study: Task, number of training problems, and seed of the problems.
        run: Output directory, training steps, checkpoints and evaluations. The problems in ``run.held_out`` are not used: the dev split
            replaces them.
        extras: Optional parts, such as the part to train or another engine that generates responses.
        resume: True to continue from the last checkpoint in ``run.out``, if there is one.
        say: Function that is called with one line of progress at a time.

    Returns:
        The trained model and its log.

    Raises:
        FileExistsError: that directory already holds a finished policy or other files.
    """
    folder = saved.folder_of(run.out, extras.train)
    if saved.is_finished(run.out, extras.train):
        raise FileExistsError(f"{folder} exists: this run is finished. Choose another directory.")
    store.new_directory(folder)
    held_out = replace(study, problems=max(16, study.problems // 4)).load("dev", lm) if run.evaluate_every else []
    say(f"training {lm.name} with {recipe.name}: {run.steps} steps of {recipe.problems} problems x {recipe.samples} samples")
    bars = () if extras.callbacks else (Bar(recipe.name),)  # no progress bar if the caller watches training with callbacks
    plugged = replace(extras, callbacks=(*bars, *extras.callbacks))
    run = replace(run, held_out=tuple(held_out))
    return train(lm, recipe, study.load("train", lm), run, extras=plugged, resume=resume, say=say)


def before_and_after(done: Trained) -> pd.DataFrame:
    """Return a table of measures before and after training, one row per measure.

    There are two columns, each named by the number of an optimizer step. If the log has evaluations on held-out problems, the columns are
    the first evaluation (step 0 is before training) and the last. Otherwise they are the first and the last training batch, or one column
    if there was one batch. ``compared`` says which. Accuracy and
    ``truncated`` (responses that the token budget cut off) are shares, 0 to 1; lengths are in tokens.

    Args:
        done: Trained model with its log.
    """
    rows = done.log.dropna(subset=["held_out/accuracy"]) if "held_out/accuracy" in done.log else done.log[done.log["step"] > 0]
    columns = [c for c in rows.columns if c.startswith("held_out/")] or ["accuracy", "think_tokens", "tokens", "truncated"]
    table = rows.iloc[sorted({0, len(rows) - 1})].set_index("step")[columns].astype(float)
    return table.rename(columns=lambda name: name.removeprefix("held_out/").replace("_", " ")).T.rename_axis("step")


def compared(done: Trained) -> str:
    """Return words for the columns of ``before_and_after``.

    Args:
        done: Trained model with its log.
    """
    if "held_out/accuracy" in done.log:
        return "before and after training, by step"
    return "first and last training batch, by step" if len(before_and_after(done).columns) > 1 else "the only training batch"


def training_page(done: Trained, recipe: Recipe, base: str, *, judging: str, command: str = "") -> Page:
    """Return the web page of a training run: verdict, learning curves, measures before and after, and how it was made.

    Args:
        done: Trained model with its log.
        recipe: Its recipe.
        base: Name of the model before training.
        judging: Command that evaluates the trained policy.
        command: Command that makes the page again; "" if no single command does.
    """
    table = before_and_after(done)
    measured = table.rename(index=lambda name: name.replace(" ", "_"))
    held_out = "held_out/accuracy" in done.log
    metrics = tuple(m for m in (HELD_OUT if held_out else IN_TRAINING) if m in done.log)
    where = "held-out problems (dev split)" if held_out else "training problems"
    return Page(
        title=f"{recipe.name} on {base}",
        verdict=verdicts.of_training(measured.iloc[:, 0].to_dict(), measured.iloc[:, -1].to_dict(), steps=int(table.columns[-1]))
        if len(table.columns) > 1
        else ["One training batch was measured, and no held-out problems, so nothing is compared."],
        main=Section("Learning curves", f"Measured on {where}.", (figures.learning_curves({recipe.name: done.log}, metrics),)),
        table=table.map(lambda value: f"{value:.3g}"),
        caption=f"{compared(done).capitalize()}; on {where}. Accuracy and truncated are shares, 0 to 1; lengths are in tokens.",
        made=f"{recipe.name}: reward {recipe.reward}, {recipe.problems} problems x {recipe.samples} samples per batch, learning rate "
        f"{recipe.learning_rate:g}. To evaluate the result on the test split, with intervals: {judging}",
        command=command,
    )


def sweep(
    lm: LM, todo: Sequence[tuple[Recipe, int]], plan: TrainingPlan, *, out: Path, runs: Path, tested: int = 200, say: Say
) -> list[Path]:
    """Train a policy for every pair of recipe and seed, compare it with base on test problems, and write its learning curve to a file.

    To resume, call it again: a policy whose curve exists is not trained again. Several processes may run the same call to share the work.

    A curve is outdated if the code, the model, the recipe or the plan has changed since it was written. It is then moved to
    ``runs / "stale"``, and the policy is trained again. Curves written by version 0.1.0 of the toolkit do not record the code. They are
    outdated only if the model, the recipe or the seed differs.

    Args:
        lm: Model to start each training from; it is also the base of the comparison.
        todo: Pairs ``(recipe, seed)``, in the order of training. Give recipes as their papers publish them. If ``plan.tiny`` is
            True, they are scaled down to the tiny reasoner (see ``Recipe.scaled``).
        plan: Training settings that all policies share.
        out: Directory of the learning curves, one small file per policy.
        runs: Directory of policies, logs and rollouts.
        tested: Number of arithmetic test problems for the comparison with base, 8 samples each.
        say: Function that is called with one line of progress at a time.

    Returns:
        Paths of the curve files, one per pair, in the order of ``todo``. A file may not exist yet if another process trains its policy.
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
    """Return True if the curve file exists and is up to date. An outdated file is moved to the directory ``stale``.

    A curve is outdated if ``basis`` (everything it depends on, from ``_curve_basis``) differs from the basis that its file records. If the
    file records none, since version 0.1.0 of the toolkit wrote it, the curve is current if its recipe, seed and model are the same.
    """
    if not file.exists():
        return False
    about, *rows = curves.lines(file)
    same = json.loads(json.dumps(recipe, default=store.jsonable))  # the recipe as it would be read back from a file
    if "depends" in about:
        store.checked(about, store.RECORD, f"{file}, line 1", "Remove the file: the run is made again.")
    elif "stale" not in about and (with_defaults(about["recipe"]), about["seed"], about.get("fingerprint")) == (
        same,
        seed,
        lm.fingerprint,
    ):
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
    """Return everything that a learning curve depends on: model, recipe, seed, plan, test problems, and the code of training and test."""
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
    """Compare a policy with base, and return the lines of its curve file (``grpo.curves`` describes the kinds of lines).

    Args:
        lm: Base, from which the policy was trained.
        done: The policy with its training log.
        about: First line of the file: recipe, seed, and what the curve depends on.
        runs: Directory whose subdirectory ``test`` receives the rollouts.
        tested: Number of test problems.
    """
    policy = replace(done.policy, lm=merging.in_type_of(lm, done.lm))  # trained weights are fp32; compare them in the dtype of base
    # The folder of rollouts gets this name too. It depends on weights and vectors, so that rollouts of another policy do not conflict.
    mark = store.key([policy.lm.fingerprint, *map(str, policy.during)]) if policy.during else policy.lm.fingerprint
    name = f"{about['recipe'].name}-seed{about['seed']}-{mark[:8]}"
    problems, sampling = tasks.load(TESTED, "test", tested), Sampling(n=8, max_new_tokens=400)
    where = runs / "test" / store.code_of("toolkit.generate", *tasks.modules(TESTED))
    report = evaluate.compare({"base": lm, name: policy}, problems, sampling, out=where, progress=False)
    seconds = round(float(done.log["step_time"].sum()), 1)
    models = {"model": lm.name, "fingerprint": lm.fingerprint, "trained": done.lm.fingerprint, "seconds": seconds}
    steps = [{"kind": "step", **row} for row in curves.steps(done.log)]
    tests = [{"kind": "test", **row} for row in _summaries(report)]
    return [{**about, **models}, *steps, *tests, {"kind": "outcomes", **outcomes(report, name)}]


def _summaries(report: Report) -> list[dict[str, Any]]:
    """Return rows of ``evaluate.summary`` as dicts, for all arithmetic problems and for the hard ones (6 to 8 operands).

    The field ``problems`` is ``"all"`` or ``"hard"``. The metrics are accuracy, think length, and the shares of responses that close their
    thinking and that end in a loop.
    """
    rows = []
    for name, part in (("all", report), ("hard", report.only(difficulty=HARD))):
        summary = evaluate.summary(part)
        summary = summary[summary["metric"].isin(["accuracy", "think_tokens", "closed", "looping"])]
        rows += [{"problems": name, **row} for row in summary.to_dict("records")]
    return rows


def outcomes(report: Report, condition: str) -> dict[str, list]:
    """Return the accuracy and think length of one condition, per problem, for paired comparisons between policies.

    Args:
        report: Report of ``evaluate.compare``.
        condition: Name of the condition.

    Returns:
        Three lists with one entry per problem, in the same order: ``problem_id`` (sorted), ``accuracy`` (share of right samples, 0 to 1)
        and ``think_tokens`` (mean over samples).
    """
    rows = report.rows[report.rows["condition"] == condition]
    means = rows.groupby("problem_id")[["correct", "think_tokens"]].mean().rename(columns={"correct": "accuracy"})
    return {"problem_id": list(means.index), **{name: [float(v) for v in means[name]] for name in means}}
