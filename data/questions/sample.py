"""Train the policies of this study and sample responses from all its conditions: ``python data/questions/sample.py``.

``questions.toml`` was written before. Policies are trained on arithmetic only. Every condition answers held-out problems of arithmetic and of
two other tasks: lookup, and sums of more steps than base was trained on. Responses are kept in ``runs/questions``, so after a stop the same
command goes on; about 15 minutes on one idle core. Base solves 2 % of the word problems, so no question is about these.

Controls are random draws, one per seed: the edit in random heads, steering along random directions, a ban of another first token of steps,
and training with rewards that are drawn at random.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from toolkit import evaluate, store
from toolkit import lm as lms
from toolkit.board import rivals, spec
from toolkit.board.ground import Ground, Sizes
from toolkit.generate import Sampling, rollouts
from toolkit.grpo import parts, recipes
from toolkit.grpo.plan import TrainingPlan
from toolkit.grpo.policies import train_policy
from toolkit.lm import LM, Condition
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.tasks import arithmetic, lookup, running_sum
from toolkit.types import Problem

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

SEEDS, STEPS, BATCH, SAMPLES, LONGEST, STEERED = (0, 1, 2, 3), 10, 8, 2, 200, 0.5
VECTOR_RATE = 3e-2  # the best of the rates that data/why tried
HORIZONS = (8, 10)  # steps of the longer sums; base was trained on at most 7
TESTS = {"arithmetic": 240, "lookup": 160, "running_sum": 160}
BASE, EDIT, STEER, NOWAIT = "base", "edit (ours)", f"steered {STEERED:+g}", "NoWait"
PENALTY, CORRECT, VECTOR, RANDOM = (
    "GRPO: length penalty",
    "GRPO: correctness",
    "GRPO: correctness, vector",
    "control: GRPO, random reward",
)
HEADS, DIRECTION, BAN = "control: edit, random heads", "control: steered randomly", "control: other ban"
CODE = store.code_of(
    "toolkit.generate",
    "toolkit.board.spec",
    "toolkit.board.rivals",
    "toolkit.baselines",
    "toolkit.grpo.run",
    "toolkit.grpo.recipes:plain",
    "toolkit.rewards.correctness",
    "toolkit.tasks.arithmetic",
    "toolkit.tasks.lookup",
    "toolkit.tasks.running_sum",
)


@dataclass(frozen=True)
class RandomReward:
    """Reward 1 or 0, drawn at random for every response, whatever it says: the control of training itself."""

    seed: int

    name: ClassVar[str] = "random"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: RewardBatch) -> RewardValues:
        return RewardValues.sum(chance=np.random.default_rng([self.seed, batch.step]).integers(0, 2, len(batch)))


@lru_cache
def ground() -> Ground:
    """Return base with the problems from which the edit and the steering direction are found."""
    lm = lms.load("tiny-reasoner", device="cpu")
    sizes = Sizes(main=tuple(TESTS.items()), extraction=(200, 4), max_new_tokens=LONGEST)
    return Ground(lm, sizes, publish.work_folder(__file__, CODE, lm.fingerprint) / "ground")


def policy(name: str, seed: int) -> Condition:
    """Return a policy as a condition, trained if it is not kept."""
    recipe = recipes.plain("length_penalty" if name == PENALTY else "correctness")
    changes: tuple[tuple[str, Any], ...] = (("problems", BATCH),)
    train = None
    if name == VECTOR:
        train, changes = parts.Vectors(), (*changes, ("learning_rate", VECTOR_RATE))
    plan = TrainingPlan(steps=STEPS, evaluate_every=0, micro_batch=64, train=train, changes=changes)
    reward = RandomReward(seed) if name == RANDOM else None
    trained = train_policy(ground().lm, recipe, seed, plan, publish.ROOT / "runs" / "questions-policies", reward=reward).policy
    return trained if isinstance(trained, Condition) else Condition(trained)


def made(what: spec.Spec) -> Callable[[int], Condition]:
    """Return the function from a seed to the condition of a spec of the board."""
    return lambda seed: what.make(ground(), seed)


CONDITIONS: Mapping[str, tuple[int, Callable[[int], Condition]]] = {
    BASE: (1, lambda seed: Condition(ground().lm)),
    EDIT: (1, made(spec.edited(EDIT, 1.0))),
    STEER: (1, made(spec.steered(STEER, STEERED))),
    NOWAIT: (1, made(rivals.suppressed(NOWAIT))),
    HEADS: (len(SEEDS), made(spec.edited(HEADS, 1.0, control="heads"))),
    DIRECTION: (len(SEEDS), made(spec.steered(DIRECTION, STEERED, control=True))),
    BAN: (len(SEEDS), made(rivals.suppressed(BAN, others=rivals.STARTS))),
    **{name: (len(SEEDS), lambda seed, name=name: policy(name, seed)) for name in (PENALTY, CORRECT, VECTOR, RANDOM)},
}
"""Name -> number of seeds, and function from a seed to the condition."""


def problems_of(split: str) -> dict[str, list[Problem]]:
    """Return the problems of each task."""
    return {
        "arithmetic": arithmetic.load(split, TESTS["arithmetic"]),
        "lookup": lookup.load(split, TESTS["lookup"]),
        "running_sum": running_sum.load(split, TESTS["running_sum"], horizons=HORIZONS),
    }


def responses(name: str, seed: int) -> pd.DataFrame:
    """Return one row per response of a condition to the test problems of all tasks, sampled if they are not kept."""
    path = ground().out.parent / f"{store.safe_name(name)}-{seed}.parquet"
    if not path.is_file():
        lm: LM = ground().lm
        condition = CONDITIONS[name][1](seed)
        tables = [
            evaluate.rollout_table(rollouts(condition, problems, Sampling(SAMPLES, max_new_tokens=LONGEST)), problems, lm.tags)
            for problems in problems_of("test").values()
        ]
        store.save_table(pd.concat(tables, ignore_index=True), path)
    return store.read_table(path)


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    warnings.simplefilter("ignore", FutureWarning)
    for seed in SEEDS:
        for name, (seeds, _) in CONDITIONS.items():
            if seed < seeds:
                responses(name, seed)
                print(name, seed, flush=True)


if __name__ == "__main__":
    main()
