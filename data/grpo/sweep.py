"""Learning curves of GRPO recipes on the tiny reasoner, three seeds each: one small file per run, beside this script.

``python data/grpo/sweep.py [RECIPE ...]`` trains every recipe and seed that has no curve yet. After a stop, the same command resumes; two
processes share the work. Models, logs and rollouts go to ``runs/grpo``. A run takes about four minutes on one idle core.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

from toolkit import lm
from toolkit.grpo import recipes
from toolkit.grpo.plan import TrainingPlan
from toolkit.jobs.grpo import sweep

NAMES = (
    "correctness", "length_penalty", "grpo_lambda", "dler", "laser_d", "hapo", "drpo", "pear", "sar", "length_penalty_mild",
    "train_long_think_short", "adaptive_deep_reasoning", "da_dler", "laser", "slpo", "arora_zanette", "surrogate",
)  # fmt: skip
SEEDS = (0, 1, 2)


def main() -> None:
    """Train the named recipes (default: all), seed 0 of every recipe first."""
    here = Path(__file__).parent
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore", FutureWarning)
    todo = [(recipes.find(name), seed) for seed in SEEDS for name in sys.argv[1:] or NAMES]
    runs = here.parent.parent / "runs" / "grpo"
    model = lm.load("tiny-reasoner", device="cpu")
    sweep(model, todo, TrainingPlan(), out=here, runs=runs, say=lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
