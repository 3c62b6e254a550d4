"""CPU seconds a step of our trainer and of TRL's own, with the same config, model and problems: ``python data/grpo/speed.py``.

Plain GRPO with correctness, 16 problems x 8 samples, responses of at most 200 tokens. CPU seconds, so that other work on the machine
counts little. TRL's is measured as configured here (no gradient checkpointing) and with its default (with it).
"""

from __future__ import annotations

import tempfile
import time
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from toolkit import generate, lm, store, tasks
from toolkit.grpo import recipes, run
from toolkit.grpo.run import Run
from toolkit.grpo.trainer import Extras, Trainer

STEPS = 4


class Clock(TrainerCallback):
    """CPU seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **_):
        self.began = time.process_time()

    def on_step_end(self, args, state, control, **_):
        self.seconds.append(time.process_time() - self.began)


def main() -> None:
    """Measure and write ``speed.json``."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, problems = lm.load("tiny-reasoner", device="cpu"), tasks.load("arithmetic", "train", 128)
    by_id = {p.id: p for p in problems}
    recipe = recipes.plain("correctness").scaled()

    def right(prompts, completion_ids, problem_id, **_):
        rows = zip(problem_id, completion_ids, strict=True)
        return [
            float(generate.rollout_from_tokens(model, by_id[i], model.prompt_ids(by_id[i].messages), ids).correct)
            for i, ids in rows
        ]

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, checkpointing in (("ours", False), ("trl", False), ("trl, its defaults", True)):
            plan = Run(
                Path(folder), STEPS, micro_batch=16, overrides={"gradient_checkpointing": checkpointing, "save_strategy": "no"}
            )
            args, clock, copy = run.arguments(model, recipe, plan), Clock(), deepcopy(model.model)
            ours = Trainer(replace(model, model=copy), recipe, problems, args, Extras(callbacks=(clock,)))
            trainer = ours if name == "ours" else GRPOTrainer(
                deepcopy(model.model), right, run.arguments(model, recipe, plan), ours.train_dataset, processing_class=model.tokenizer,
                callbacks=[clock],
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            tokens = [row["num_tokens"] for row in trainer.state.log_history if "num_tokens" in row]
            seconds = sum(clock.seconds[1:]) / (STEPS - 1)  # the first step also warms up
            found[name] = {"seconds_per_step": seconds, "tokens_per_second": (tokens[-1] - tokens[0]) / sum(clock.seconds[1:])}
    for name in found:
        found[name]["times_trl"] = found[name]["seconds_per_step"] / found["trl"]["seconds_per_step"]
    print(store.write_json(found, Path(__file__).with_name("speed.json")).read_text())


if __name__ == "__main__":
    main()
