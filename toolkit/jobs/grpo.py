"""Training with a length reward: what ``grpo`` does, and the sweep of recipes over seeds whose curves are in ``data/grpo``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

import toolkit
from toolkit import evaluate, rewards, store
from toolkit.generate import Sampling
from toolkit.grpo import recipes
from toolkit.grpo.recipes import Recipe
from toolkit.grpo.run import MODEL, Run, Trained, train
from toolkit.grpo.trainer import Extras
from toolkit.jobs.study import Say, Study
from toolkit.lm import LM
from toolkit.types import Problem, Report

HARD = (6, 7, 8)  # operands of the arithmetic problems called hard
CURVE = (
    "step", "accuracy", "think_tokens", "tokens", "truncated", "zero_std", "entropy/think", "entropy/answer", "reward", "grad_norm",
    "answers/most_common", "step_time", "alarms",
)  # fmt: skip
"""Columns of a log kept in a curve; those of held-out problems are kept too."""


def table() -> pd.DataFrame:
    """Every reward with its paper and one line, and whether it has a recipe of its own."""
    rows = [(name, e.paper, "yes" if name in recipes.ALL else "", e.line) for name, e in rewards.ALL.items()]
    rows += [(n, r.paper, "yes", f"{r.reward} rewarded, with a loss of its own") for n, r in _recipes() if n not in rewards.ALL]
    return pd.DataFrame(rows, columns=["name", "paper", "recipe", "what it pays"]).set_index("name")


def _recipes() -> Iterable[tuple[str, Recipe]]:
    return ((name, make()) for name, make in recipes.ALL.items())


def grpo(lm: LM, recipe: Recipe, study: Study, run: Run, *, extras: Extras = Extras(), resume: bool = False, say: Say) -> Trained:
    """Train ``lm`` on the study's train split and write the model into ``run.out / "model"``; held-out problems are the dev split.

    A finished run given again with ``resume`` is an error of the directory (nothing is left to do).
    """
    if (run.out / MODEL).exists():
        raise FileExistsError(f"{run.out / MODEL} exists: this run is finished. Choose another directory.")
    problems = study.load("train", lm)
    judged = study.load("dev", lm)[: max(16, study.problems // 4)] if run.evaluate_every else []
    say(f"training {lm.name} with {recipe.name}: {run.steps} steps of {recipe.problems} problems x {recipe.samples} samples")
    done = train(lm, recipe, problems, replace(run, held_out=tuple(judged)), extras=extras, resume=resume, say=say)
    done.lm.save(run.out / MODEL)
    return done


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
    """

    curves: Path
    runs: Path
    steps: int = 80
    pool: int = 256
    judged: int = 64
    tested: int = 200
    every: int = 10


def sweep(lm: LM, todo: Sequence[tuple[Recipe, int]], plan: Sweep, *, say: Say) -> list[Path]:
    """Train every (recipe, seed) that has no curve yet, in the order given, and compare each with base on held-out test problems.

    Killed and given again, it goes on in the run it was in. Returns the files of all curves.
    """
    files = []
    for recipe, seed in todo:
        file = plan.curves / f"{recipe.name}-seed{seed}.jsonl"
        files.append(file)
        if file.exists():
            continue
        say(f"{recipe.name}, seed {seed}")
        store.write_rows(_one(lm, recipe, seed, plan, say), file)
    return files


def _one(lm: LM, recipe: Recipe, seed: int, plan: Sweep, say: Say) -> list[dict[str, Any]]:
    began = time.perf_counter()
    study = Study("arithmetic", plan.pool)
    dev = replace(study, problems=plan.judged).load("dev")
    folder = plan.runs / f"{recipe.name}-seed{seed}"
    run = Run(folder, plan.steps, seed, save_every=20, held_out=tuple(dev), evaluate_every=plan.every, micro_batch=16)
    done = train(lm, recipe, study.load("train"), run, resume=True, say=say)
    seconds = time.perf_counter() - began
    measured = tested(
        lm, {f"{recipe.name}-seed{seed}": done.lm}, replace(study, problems=plan.tested).load("test"), plan.runs / "test"
    )
    about = {
        "kind": "about",
        "recipe": recipe,
        "seed": seed,
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        "trained": done.lm.fingerprint,
        "toolkit": toolkit.__version__,
        "pool": plan.pool,
        "seconds": round(seconds, 1),
    }
    steps = [{"kind": "step", **row} for row in curve(done.log)]
    return [about, *steps, *({"kind": "test", **row} for row in measured)]


def curve(log: pd.DataFrame) -> list[dict[str, Any]]:
    """The columns of a log worth keeping, numbers to four digits, what is missing left out."""
    kept = [c for c in log.columns if c in CURVE or c.startswith(("held_out/", "component/"))]
    rows = log[kept].to_dict("records")
    short = ({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return [{k: v for k, v in row.items() if v is not None and v == v} for row in short]


def tested(base: LM, trained: dict[str, LM], problems: list[Problem], out: Path) -> list[dict[str, Any]]:
    """Each model against base on the same problems and seeds, on all and on hard ones: rows of ``evaluate.summary`` with ``problems``."""
    sampling = Sampling(n=8, max_new_tokens=400)
    report = evaluate.compare({"base": base, **trained}, problems, sampling, out=out, progress=False)
    parts: dict[str, Callable[[], Report]] = {"all": lambda: report, "hard": lambda: report.only(difficulty=HARD)}
    rows = []
    for name, part in parts.items():
        summary = evaluate.summary(part())
        summary = summary[summary["metric"].isin(["accuracy", "think_tokens", "closed", "looping"])]
        rows += [{"problems": name, **row} for row in summary.to_dict("records")]
    return rows
