"""Learning curves of GRPO recipes on the tiny reasoner, three seeds each: one small file a run, beside this script.

``python data/grpo/sweep.py [RECIPE ...]`` trains what has no curve yet, the most telling first, and goes on where it was when killed.
Checkpoints and rollouts go to ``runs/grpo``. About four minutes a run on one quiet core.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

from toolkit import lm
from toolkit.grpo import recipes
from toolkit.jobs.grpo import Sweep, sweep

NAMES = ("length_penalty", "hapo", "drpo", "correctness", "laser_d", "grpo_lambda", "dler", "pear", "sar", "length_penalty_mild")
SEEDS = (0, 1, 2)


def main() -> None:
    """Train the recipes named, or all, all of seed 0 first."""
    here = Path(__file__).parent
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore", FutureWarning)
    todo = [(recipes.find(name).scaled(), seed) for seed in SEEDS for name in sys.argv[1:] or NAMES]
    plan = Sweep(here, here.parent.parent / "runs" / "grpo", steps=100, every=20)
    sweep(lm.load("tiny-reasoner", device="cpu"), todo, plan, say=lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
