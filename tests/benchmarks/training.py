"""GRPO: seconds per step beside TRL's stock trainer, with the same config, model and problems. 16 problems x 8 samples."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import torch
from clock import QUICK, Row, median, now, profile, ratio, start, write
from models import tiny
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from toolkit import generate, tasks
from toolkit import lm as lms
from toolkit.grpo import recipes, run
from toolkit.grpo.run import Run
from toolkit.grpo.trainer import Trainer
from toolkit.lm import LM

STEPS = 3 if QUICK else 18  # the first two are not counted
NEVER = 10**6  # steps between checkpoints


class Turns:
    """Let two trainings in two threads make their steps in turns: A B A B."""

    def __init__(self) -> None:
        self.free, self.whose, self.left = threading.Condition(), 0, {0, 1}

    def take(self, me: int) -> None:
        with self.free:
            self.free.wait_for(lambda: self.whose == me or 1 - me not in self.left)

    def give(self, me: int, *, done: bool = False) -> None:
        with self.free:
            self.whose = 1 - me
            if done:
                self.left.discard(me)
            self.free.notify_all()


class Clock(TrainerCallback):
    """Processor seconds of each step, in turns with another training."""

    def __init__(self, shared: Turns, me: int) -> None:
        self.seconds: list[float] = []
        self.turns, self.me = shared, me

    def on_step_begin(self, args, state, control, **_):
        self.turns.take(self.me)
        self.began = now()

    def on_step_end(self, args, state, control, **_):
        self.seconds.append(now() - self.began)
        self.turns.give(self.me)


def in_turns(trainers: Sequence[GRPOTrainer]) -> list[list[float]]:
    """Seconds of every step of two trainings."""
    shared = Turns()
    clocks = [Clock(shared, me) for me in range(2)]

    def run(me: int) -> None:
        trainers[me].add_callback(clocks[me])
        try:
            trainers[me].train()
        finally:
            shared.give(me, done=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(run, range(2)))
    return [clock.seconds for clock in clocks]


def copied(lm: LM) -> LM:
    return lms.wrap(deepcopy(lm.model), lm.tokenizer, name=lm.name, tags=lm.tags)


def stock(lm: LM, dataset, args, right, rollout_func=None) -> GRPOTrainer:
    trainer = GRPOTrainer(
        deepcopy(lm.model), right, args, dataset, processing_class=lm.tokenizer,
        **({"rollout_func": rollout_func} if rollout_func else {}),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def gradient(trainer) -> torch.Tensor:
    """Of one whole step."""
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    for _ in range(trainer.args.gradient_accumulation_steps):
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).backward()
        trainer._step += 1
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def gate(lm: LM, problems, recipe, folder: Path) -> str:
    """The same rollouts handed to both: one gradient."""
    by_id = {p.id: p for p in problems}
    plan = Run(folder, 2, micro_batch=16, save_every=NEVER)
    ours = Trainer(copied(lm), recipe, problems, run.arguments(lm, recipe, plan))
    wanted = gradient(ours)
    drawn = [d.rollout for d in ours.newest.drawn]

    def replay(prompts, trainer):
        return {
            "prompt_ids": [list(r.token_ids[: r.prompt_len]) for r in drawn],
            "completion_ids": [list(r.token_ids[r.prompt_len :]) for r in drawn],
            "logprobs": None,
            "right": [float(r.correct) for r in drawn],
        }

    args = run.arguments(lm, recipe, plan)
    args.shuffle_dataset = False
    found = gradient(stock(lm, ours.train_dataset, args, lambda right, **_: right, replay))
    assert by_id
    cosine = torch.nn.functional.cosine_similarity(found.double(), wanted.double(), dim=0).item()
    assert cosine > 0.9999, cosine
    return f"gradient of a whole step on the same rollouts: cosine {cosine:.7f}, ratio of norms {wanted.norm() / found.norm():.4f}"


def main() -> None:
    start()
    lm, problems = tiny(), tasks.load("arithmetic", "train", 128)
    by_id, recipe = {p.id: p for p in problems}, recipes.plain("correctness").scaled()

    def right(prompts, completion_ids, problem_id, **_):
        rows = zip(problem_id, completion_ids, strict=True)
        return [float(generate.rollout_from_tokens(lm, by_id[i], lm.prompt_ids(by_id[i].messages), ids).correct) for i, ids in rows]

    with tempfile.TemporaryDirectory() as folder:
        passed = gate(lm, problems, recipe, Path(folder))
        plan = Run(Path(folder), STEPS, micro_batch=16, save_every=NEVER)
        trainer = Trainer(copied(lm), recipe, problems, run.arguments(lm, recipe, plan))
        theirs = stock(lm, trainer.train_dataset, run.arguments(lm, recipe, plan), right)
        seconds = [took[1 if QUICK else 2 :] for took in in_turns((trainer, theirs))]
        value = ratio(*seconds)

        def one() -> None:
            args = run.arguments(lm, recipe, Run(Path(folder), 1, micro_batch=16, save_every=NEVER))
            Trainer(copied(lm), recipe, problems, args).train()

        where = profile(one)
    row = Row(
        "GRPO, tiny reasoner, 16 x 8: seconds per step over TRL's stock trainer", *value, "<= 0.35", passed, where,
        f"{median(seconds[0]):.2f} s per step, TRL {median(seconds[1]):.2f} s",
    )  # fmt: skip
    write("grpo", [row])


if __name__ == "__main__":
    main()
