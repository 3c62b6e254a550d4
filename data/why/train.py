"""Train the policies of this study: ``python data/why/train.py``. After a stop, the same command goes on; about 10 minutes on one idle core.

One recipe, the naive length penalty, trains four parts of the tiny reasoner from three seeds each: every weight, one vector per layer, the two
heads of ThinkEdit (ours), and two random heads of the same layers (control). The learning rates of vectors and heads are ours: pilot runs with
another seed choose the one with the highest reward at their end. Besides, the recipes of the board's best and worst policies train every
weight, from one seed each. Policies are kept in ``runs/why-policies``; their folders have a key of everything that they depend on.
"""

from __future__ import annotations

import sys
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from toolkit import edits, store, tasks
from toolkit import lm as lms
from toolkit.generate import Sampling, rollouts
from toolkit.grpo import parts, recipes
from toolkit.grpo.plan import TrainingPlan
from toolkit.grpo.policies import train_policy
from toolkit.grpo.recipes import Recipe
from toolkit.grpo.run import Trained
from toolkit.jobs.finding import DEMO, OURS, Finding, find_heads
from toolkit.lm import LM

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

STEPS, BATCH, SEEDS, PILOT_STEPS, PILOT_SEED, LAST = 20, 8, (0, 1, 2), 10, 9, 4
ALL, VECTOR, HEADS, RANDOM = "every weight", "one vector per layer", "two heads", "two random heads (control)"
RATES = {VECTOR: (3e-3, 1e-2, 3e-2), HEADS: (1e-3, 3e-3, 1e-2)}
FOUND_FROM = (200, 4)  # train problems and samples of each, from which the direction and the heads are found
RECIPE = recipes.plain("length_penalty")
BEST = {"LASER-D": recipes.laser_d, "HAPO": recipes.hapo, "GRPO-lambda": recipes.grpo_lambda}
WORST = {"surrogate": recipes.surrogate}


@lru_cache
def base() -> LM:
    """Return the tiny reasoner."""
    return lms.load("tiny-reasoner", device="cpu")


@lru_cache
def responses() -> list[Any]:
    """Return the responses of base to train problems from which directions and heads are found."""
    work = publish.work_folder(__file__, store.code_of("toolkit.generate", "toolkit.tasks.arithmetic"), base().fingerprint)
    problems, samples = FOUND_FROM
    return rollouts(
        base(), tasks.load("arithmetic", "train", problems), Sampling(n=samples, max_new_tokens=200), out=work / "responses"
    )


@lru_cache
def finding() -> Finding:
    """Return direction, head scores and plan of ThinkEdit (ours)."""
    return find_heads(base(), responses(), DEMO, OURS)


def part(arm: str, seed: int) -> Any:
    """Return the part that an arm trains. The random heads differ between seeds."""
    plan = finding().plan
    match arm:
        case "one vector per layer":
            return parts.Vectors()
        case "two heads":
            return parts.plan_heads(plan)
        case "two random heads (control)":
            return parts.plan_heads(edits.random_heads(plan, base().layout, seed=seed))
    return None


def trained(recipe: Recipe, seed: int, trains: Any = None, rate: float | None = None, steps: int = STEPS) -> Trained:
    """Return a policy, trained if it is not kept."""
    changes = (("problems", BATCH), *(() if rate is None else (("learning_rate", rate),)))
    plan = TrainingPlan(steps=steps, evaluate_every=0, micro_batch=64, train=trains, changes=changes)
    return train_policy(base(), recipe, seed, plan, publish.ROOT / "runs" / "why-policies")


@lru_cache
def rate(arm: str) -> float | None:
    """Return the learning rate of an arm: of the rates tried, that with the highest mean reward in the last steps of its pilot run."""
    if arm == ALL:
        return None
    tried = HEADS if arm == RANDOM else arm
    rewards = {r: pilot(tried, r) for r in RATES[tried]}
    return max(rewards, key=rewards.__getitem__)


@lru_cache
def pilot(arm: str, rate: float) -> float:
    """Return the mean reward in the last steps of a pilot run."""
    log = trained(RECIPE, PILOT_SEED, part(arm, PILOT_SEED), rate, PILOT_STEPS).log
    return float(log["reward"].dropna().tail(LAST).mean())


def policy(arm: str, seed: int) -> Trained:
    """Return the policy of an arm and seed."""
    return trained(RECIPE, seed, part(arm, seed), rate(arm))


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    for seed in SEEDS:
        for arm in (ALL, VECTOR, HEADS, RANDOM):
            policy(arm, seed)
            print(arm, seed, flush=True)
    for name, recipe in (WORST | BEST).items():
        trained(recipe(), 0)
        print(name, flush=True)


if __name__ == "__main__":
    main()
