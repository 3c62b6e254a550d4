"""One process of a distributed run, started by ``test_grpo_processes.py``: trains one step and writes what it saw."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from toolkit import lm as lms
from toolkit import tasks
from toolkit.grpo import draws, recipes, run
from toolkit.grpo.run import Run
from toolkit.grpo.trainer import Trainer


def main(out: Path) -> None:
    tiny = lms.load("tiny-reasoner", device="cpu")
    problems = tasks.arithmetic.load("train", 24, operands=(2, 4))
    recipe = replace(recipes.find("grpo_lambda").scaled(), problems=4, samples=4, max_tokens=64, dynamic=draws.Dynamic(rounds=3))
    plan = Run(out, steps=2, micro_batch=4, evaluate_every=0, save_every=100)
    trainer = Trainer(tiny, recipe, problems, run.arguments(tiny, recipe, plan))
    trainer.train()
    seen = trainer.newest
    saved = {
        "problems": [d.rollout.problem_id for d in seen.drawn],
        "samples": [d.rollout.sample for d in seen.drawn],
        "rewards": seen.scored.values.tolist(),
        "advantages": [part["advantages"].tolist() for part in trainer._buffered_inputs],
        "rows": [part["row"].tolist() for part in trainer._buffered_inputs],
        "weights": torch.cat([w.detach().flatten() for w in trainer.model.parameters()]),
    }
    torch.save(saved, out / f"rank-{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
