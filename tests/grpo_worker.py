"""One process of a distributed run, started by ``test_grpo_processes.py``: trains and writes what it saw."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from toolkit import lm as lms
from toolkit import tasks
from toolkit.generate import Sampling
from toolkit.grpo import draws, log, policies, recipes, run
from toolkit.grpo.plan import TrainingPlan
from toolkit.grpo.run import Run
from toolkit.grpo.trainer import Extras, Trainer
from toolkit.rewards import WeightedSum
from toolkit.rewards.grpo_lambda import GRPOLambda
from toolkit.rewards.hapo import HAPO
from toolkit.rewards.laser import LaserD
from toolkit.rewards.laser_targets import TargetSettings


def main(out: Path) -> None:
    tiny = lms.load("tiny-reasoner", device="cpu")
    problems = tasks.arithmetic.load("train", 24, operands=(2, 4))
    recipe = replace(recipes.find("grpo_lambda").scaled(), problems=4, samples=4, max_tokens=64, dynamic=draws.Dynamic(rounds=3))
    plan = Run(out, steps=2, micro_batch=4, evaluate_every=0, save_every=100)
    targets = TargetSettings(base=8, step=4, longest=64, every=1, problems=4, samples=4)
    # One over the whole batch, and two that remember, one of them with a monitoring set.
    reward = WeightedSum(((1.0, GRPOLambda()), (0.2, HAPO()), (0.2, LaserD(targets=targets))))
    trainer = Trainer(tiny, recipe, problems, run.arguments(tiny, recipe, plan), Extras(reward=reward))
    how = Sampling(n=2, max_new_tokens=64)
    judged = log.Recorder(problems[:2], how, 1, None, lambda text: None, trainer.sampler.rollouts)
    trainer.add_callback(judged)
    trainer.train()
    seen = trainer.newest
    saved = {
        "problems": [d.rollout.problem_id for d in seen.drawn],
        "samples": [d.rollout.sample for d in seen.drawn],
        "rewards": seen.scored.values.tolist(),
        "advantages": [part["advantages"].tolist() for part in trainer._buffered_inputs],
        "rows": [part["row"].tolist() for part in trainer._buffered_inputs],
        "state": trainer.reward_state(),
        "logged": len(judged.rows),
        "weights": torch.cat([w.detach().flatten() for w in trainer.model.parameters()]),
    }
    torch.save(saved, out / f"rank-{os.environ.get('RANK', '0')}.pt")


def policy(out: Path) -> None:
    """Ask for a kept policy twice: the first call trains it, the second reads it."""
    tiny = lms.load("tiny-reasoner", device="cpu")
    plan = TrainingPlan(steps=1, pool=16, held_out=4, evaluate_every=0, micro_batch=4, changes=(("problems", 2), ("samples", 4)))
    said: list[str] = []
    asked = [policies.train_policy(tiny, recipes.plain("correctness"), 0, plan, out / "runs", say=said.append) for _ in range(2)]
    saved = [{"main": done.main, "rows": len(done.log), "fingerprint": done.lm.fingerprint} for done in asked]
    torch.save({"asked": saved, "base": tiny.fingerprint}, out / f"rank-{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    {"main": main, "policy": policy}[sys.argv[2]](Path(sys.argv[1]))
