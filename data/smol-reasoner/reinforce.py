"""Second stage of the smol reasoner's training: a few steps of GRPO on the first stage's adapter, rewarded for correct answers.

    python data/smol-reasoner/reinforce.py --start runs/smol/checkpoint-2400 --out data/smol-reasoner

Rewarded for correct answers alone, the model stops skipping steps within eight optimizer steps, and then short thinking is no longer less
accurate, which is the effect this model exists to show. So most of the correlation of length with correctness is removed from the reward
(``Evened``). Seeded and resumable: the same command continues from the newest checkpoint in ``--work``. Writes to ``--out`` the adapter
of the last step in fp16, ``rewards.jsonl`` (one line per step), and its arguments in ``training.json`` beside those of the first stage.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from peft import PeftModel
from train import load_base

from toolkit import store, tasks
from toolkit.grpo import advantages, recipes
from toolkit.grpo.run import Run, train
from toolkit.grpo.trainer import Extras
from toolkit.lm import LM
from toolkit.rewards import RewardBatch, RewardValues

TASK = "wordproblems"
LOGGED = ("step", "accuracy", "think_tokens", "zero_std", "entropy", "grad_norm", "step_time")


@dataclass(frozen=True)
class Evened:
    """Correctness minus a ``share`` of its linear regression on think length within each problem.

    At a share of 1, the reward does not depend linearly on length.
    """

    share: float

    name: ClassVar[str] = "evened"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "think_tokens"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        correct, length = np.asarray(batch["correct"], float), np.asarray(batch["think_tokens"], float)
        length = length - advantages.group_mean(length, batch.groups)
        covariance, variance = (advantages.group_mean(length * v, batch.groups) for v in (correct, length))
        slope = np.divide(covariance, variance, out=np.zeros_like(covariance), where=variance > 0)
        return RewardValues.sum(correctness=correct, length=-self.share * slope * length)


def adapted(start: Path, base: LM) -> LM:
    """Return the base with the first stage's trainable adapter in its layers (fp32 adapter, bf16 base weights)."""
    model: Any = PeftModel.from_pretrained(base.model, start, is_trainable=True, autocast_adapter_dtype=True)
    return replace(base, model=model.get_base_model().eval(), name="smol-reasoner, first stage")


def publish(checkpoint: Path, log: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Write the adapter of a checkpoint, the log of its training, and the arguments."""
    adapter = {k: v for k, v in store.read_tensors(checkpoint / "model.safetensors")[0].items() if "lora_" in k}
    tensors = {f"base_model.model.{k.replace('.default.', '.')}": v.half() for k, v in adapter.items()}
    store.write_tensors(tensors, {"format": "pt"}, args.out / "adapter_model.safetensors")
    rows = [{k: row[k] for k in LOGGED if row.get(k) is not None} for row in log if row["step"]]
    store.write_text("".join(json.dumps(row) + "\n" for row in rows), args.out / "rewards.jsonl")
    arguments = {k: v for k, v in vars(args).items() if k not in ("out", "work", "start")}
    path = args.out / "training.json"
    store.write_json({**store.read_json(path), "reinforced": arguments}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="checkpoint of the first stage (train.py)")
    parser.add_argument("--out", type=Path, required=True, help="directory of the adapter")
    parser.add_argument("--work", type=Path, default=Path("runs/smol-reinforced"), help="directory of the resumable state")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--problems", type=int, default=6, help="problems per step")
    parser.add_argument("--samples", type=int, default=8, help="responses per problem")
    parser.add_argument("--pool", type=int, default=96, help="number of training problems")
    parser.add_argument("--even", type=float, default=0.9, help="share of the regression on length to remove from the reward")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", default=None, help="another base model for toolkit.lm.load, to test the script")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    lm = adapted(args.start, load_base(args.base, getattr(torch, args.dtype)))
    recipe = replace(
        recipes.plain("correctness"),
        advantage="dr_grpo",
        problems=args.problems,
        samples=args.samples,
        max_tokens=160,
        learning_rate=args.lr,
    )
    run = Run(args.work, args.steps, args.seed, save_every=2, micro_batch=8)
    done = train(lm, recipe, tasks.load(TASK, "train", args.pool), run, extras=Extras(Evened(args.even)), resume=True, say=print)
    publish(args.work / f"checkpoint-{args.steps}", done.log.to_dict("records"), args)


if __name__ == "__main__":
    main()
