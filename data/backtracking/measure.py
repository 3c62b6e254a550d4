"""Train small models on traces with exactly k dead ends, then with reinforcement: ``python data/backtracking/measure.py``.

After "How Much Backtracking is Enough?" (arXiv 2505.24273). Writes ``results.json`` and the tables in ``README.md`` here. Models and answers
are kept in ``runs/backtracking``, so after a stop the same command goes on. About 15 minutes on one core.

Two tasks: Countdown with 3 small numbers, and Sudoku with 4 x 4 cells. For each, one small model is made with supervised training on traces
with 0, 1 and 2 dead ends, mixed; the paper begins with a language model instead. Every arm goes on from it, once per seed: supervised
training on one kind of traces of the same problems, then a short run of GRPO on correctness. The kinds are

- *k = 0, 1, 2*: correct traces with exactly k dead ends;
- *k = 1, shuffled* (control of the content): the traces with one dead end, each at another problem. The structure stays, the content is wrong.

Accuracy is measured on test problems before and after GRPO. Differences are paired by problem, with 95 % intervals over problems and seeds.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from toolkit import finetune, report, store
from toolkit.generate import Sampling, rollouts
from toolkit.grpo import recipes
from toolkit.grpo.run import MODEL as SAVED
from toolkit.grpo.run import Run, train
from toolkit.grpo.saved import read_back
from toolkit.lm import LM
from toolkit.metrics import with_interval
from toolkit.tasks import countdown, sudoku
from toolkit.tasks.generators import backtracking, detours
from toolkit.tasks.generators.backtracking import NoDeadEndError
from toolkit.types import Problem

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

CODE = store.code_of(
    "toolkit.finetune",
    "toolkit.generate",
    "toolkit.grpo.run",
    "toolkit.grpo.recipes:plain",
    "toolkit.rewards.correctness",
    "toolkit.tasks.countdown",
    "toolkit.tasks.sudoku",
    "toolkit.tasks.generators.backtracking",
    "toolkit.tasks.generators.detours",
)
COUNTS, SEEDS, TESTED, SAMPLES = (0, 1, 2), (0, 1, 2), 80, 2
# Few grids have two dead ends and few blanks, so Sudoku needs a larger pool; and it is learnt more slowly.
POOL = {"countdown": 1200, "sudoku": 4000}  # problems to write traces for
FIRST = {"countdown": 400, "sudoku": 1500}  # supervised steps of the first model
STEPS, BATCH, RATE = 60, 32, 3e-3  # supervised steps of each arm
GRPO, PROBLEMS, GROUP, GRPO_RATE = 8, 8, 8, 3e-4  # steps, problems per step, samples per problem
LARGEST, LONGEST = 199, 140  # largest number in a trace; tokens of a response
MODEL = {"layers": 2, "d_model": 96, "d_mlp": 192, "heads": 4, "head_dim": 24}
SHUFFLED = "k = 1, shuffled"
ARMS = (*(f"k = {k}" for k in COUNTS), SHUFFLED)
PIECES = r"\d+|[A-Za-z]+|\n|[^\w\s]"
TASKS = ("countdown", "sudoku")


def load(task: str, split: str, n: int) -> list[Problem]:
    """Return n problems of a task and split, of the size of this study."""
    if task == "sudoku":
        return sudoku.load(split, n, blanks=(7, 9))
    return countdown.load(split, n, numbers=(3, 3), values=(1, 12), targets=(10, 60))


def responses(task: str, p: Problem) -> list[str] | None:
    """Return one response per number of dead ends; ``None`` if a trace has too few dead ends or too large numbers."""
    try:
        traces = [(detours.trace if task == "sudoku" else backtracking.trace)(p, k) for k in COUNTS]
    except NoDeadEndError:
        return None
    texts = [f"<think>{trace.text}</think>{trace.answer}<|end|>" for trace in traces]
    return texts if all(int(n) <= LARGEST for text in texts for n in re.findall(r"\d+", text)) else None


def examples(lm: LM, pairs: Sequence[tuple[Problem, str]]) -> list[finetune.Example]:
    """Return problems and responses as training examples."""
    return [
        finetune.Example(problem=p.id, prompt=lm.prompt_ids(p.messages), response=lm.tokenizer.encode(text)) for p, text in pairs
    ]


def correct(lm: LM, tests: Sequence[Problem], seed: int) -> list[float]:
    """Return the share of correct responses to each test problem."""
    sampled = rollouts(lm, tests, Sampling(n=SAMPLES, max_new_tokens=LONGEST, seed=seed), progress=False)
    return np.array([r.correct for r in sampled], float).reshape(len(tests), SAMPLES).mean(1).tolist()


def reinforced(lm: LM, problems: Sequence[Problem], seed: int, out: Path) -> LM | None:
    """Return the model after a short run of GRPO on correctness; ``None`` if no response of its first problems is correct."""
    if store.is_whole(out / SAVED):
        return read_back(lm, out / SAVED)
    recipe = replace(
        recipes.find("correctness").scaled(), problems=PROBLEMS, samples=GROUP, max_tokens=LONGEST, learning_rate=GRPO_RATE
    )
    try:
        return train(lm, recipe, problems, Run(out, GRPO, seed, save_every=GRPO), resume=True).lm
    except ValueError as error:
        if "nothing to reinforce" not in str(error):
            raise
        return None


@cache
def begun(task: str, work: Path) -> tuple[list[Problem], list[tuple[Problem, list[str]]], LM]:
    """Return the training problems of a task, those that have all traces with their responses, and the first model."""
    problems = load(task, "train", POOL[task])
    written = [(p, texts) for p in problems if (texts := responses(task, p))]
    texts = [*(p.messages[0]["content"] for p in problems), *(text for _, texts in written for text in texts)]
    numbers = " ".join(map(str, range(LARGEST + 1)))
    start = publish.small_model([*texts, numbers], PIECES, MODEL, f"small {task} model", context=512)
    drawn = random.Random("first")
    mixed = examples(start, [(p, drawn.choice(texts)) for p, texts in written])
    settings = finetune.Settings(steps=FIRST[task], batch=BATCH, rate=RATE)
    return problems, written, finetune.train(start, mixed, settings, work / f"{task}-first", name=f"{task}, first")


def measured(task: str, arm: str, seed: int, work: Path) -> dict[str, Any]:
    """Return the shares of correct responses of an arm, before and after GRPO, and whether GRPO had anything to reinforce."""
    path = work / f"{task}-{store.safe_name(arm)}-{seed}.json"
    if path.is_file():
        return store.read_json(path, dict[str, Any])
    problems, written, first = begun(task, work)
    kept = [texts[1 if arm == SHUFFLED else ARMS.index(arm)] for _, texts in written]
    if arm == SHUFFLED:
        kept = backtracking.mismatched(kept, seed=seed)
    settings = finetune.Settings(steps=STEPS, batch=BATCH, rate=RATE / 3, seed=seed)
    pairs = examples(first, [(p, text) for (p, _), text in zip(written, kept, strict=True)])
    tuned = finetune.train(first, pairs, settings, work / f"{path.stem}-sft", name=f"{task}, {arm}, {seed}")
    tests = load(task, "test", TESTED)
    policy = reinforced(tuned, problems, seed, work / f"{path.stem}-grpo")
    before = correct(tuned, tests, seed)
    found = {
        "before GRPO": before,
        "after GRPO": before if policy is None else correct(policy, tests, seed),
        "reinforced": policy is not None,
        "training problems": len(written),
    }
    store.write_json(found, path)
    return found


def results(parts: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return accuracies of the arms of one task, and differences from one dead end, with intervals.

    Args:
        parts: Arm -> one result of ``measured`` per seed.
    """

    def values(arm: str, when: str) -> np.ndarray:
        return np.array([part[when] for part in parts[arm]])

    times = ("before GRPO", "after GRPO")
    return {
        "accuracy": {arm: {when: publish.estimate(values(arm, when)) for when in times} for arm in parts},
        "differences": {
            f"k = 1 minus {arm}": {when: publish.estimate(values("k = 1", when), values(arm, when)) for when in times}
            for arm in parts
            if arm != "k = 1"
        },
        "reinforced seeds": {arm: sum(part["reinforced"] for part in parts[arm]) for arm in parts},
    }


def page(found: dict[str, Any]) -> str:
    """Return the tables of the README."""

    def table(key: str, sign: str) -> pd.DataFrame:
        rows = {
            f"{task}, {arm}": {when: with_interval(e["mean"], e["low"], e["high"], "share", sign=sign) for when, e in row.items()}
            for task, result in found.items()
            for arm, row in result[key].items()
        }
        for task, result in found.items():
            for arm, seeds in result["reinforced seeds"].items():
                if not seeds:  # no response was right, so there was nothing to reinforce
                    name = f"{task}, {arm}" if key == "accuracy" else f"{task}, k = 1 minus {arm}"
                    rows[name]["after GRPO"] = "not run"
        return pd.DataFrame(rows).T

    first = report.markdown(table("accuracy", "").rename_axis("accuracy, %"))
    return f"{first}\n\n{report.markdown(table('differences', '+').rename_axis('difference, points'))}"


def main() -> None:
    torch.set_num_threads(1)
    work = publish.work_folder(__file__, CODE, scripts=("tiny-reasoner/train.py",))
    parts = {task: {arm: [measured(task, arm, seed, work) for seed in SEEDS] for arm in ARMS} for task in TASKS}
    settings = {"counts": COUNTS, "seeds": SEEDS, "pool": POOL, "tested": TESTED, "samples": SAMPLES, "first": FIRST, "steps": STEPS, "batch": BATCH,
                "rate": RATE, "grpo": [GRPO, PROBLEMS, GROUP, GRPO_RATE], "model": MODEL}  # fmt: skip
    found = {task: results(parts[task]) for task in TASKS}
    store.write_json({"made_by": store.made_by(CODE), "settings": settings, "tasks": found}, HERE / "results.json")
    publish.splice("backtracking", page(found), HERE / "README.md")


if __name__ == "__main__":
    main()
