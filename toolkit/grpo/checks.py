"""What cannot work is refused before a step, and what is not finite stops a run before anything is updated with it."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers.integrations import is_deepspeed_zero3_enabled

from toolkit import rewards
from toolkit.grpo.draws import Drawn
from toolkit.grpo.recipes import Recipe
from toolkit.rewards import RewardBatch


class NonFiniteError(ValueError):
    """A reward, loss or gradient is NaN or infinite; nothing was updated with it."""


def check_args(args: Any, recipe: Recipe, engine: str) -> None:
    """Raise ValueError for a config of TRL that the recipe cannot be trained with."""
    samples, world = args.num_generations, args.world_size
    local = args.per_device_train_batch_size * args.steps_per_generation
    if args.max_steps < 1:
        raise ValueError(f"max_steps={args.max_steps}: say how many steps to train.")
    if local % samples:
        raise ValueError(
            f"Each of {world} processes draws {local} responses a step, which cuts groups of {samples}: make per_device_train_batch_size * "
            "steps_per_generation a multiple of num_generations."
        )
    if recipe.loss and args.per_device_train_batch_size % samples:
        raise ValueError(
            f"{recipe.name} needs whole groups: per_device_train_batch_size={args.per_device_train_batch_size} is no multiple of "
            f"num_generations={samples}."
        )
    if recipe.loss and args.beta:
        raise ValueError(f"{recipe.name} has a loss with a KL term of its own: beta={args.beta} would not act, set it to 0.")
    if args.bf16 and args.use_transformers_continuous_batching:
        raise ValueError(
            "use_transformers_continuous_batching casts the weights to bfloat16 in place, which rounds away what was learned: leave it out, "
            "or train in float32."
        )
    needs = [name for name in ("dynamic", "modes") if getattr(recipe, name)]
    if engine == "trl" and needs:
        raise ValueError(f'{recipe.name} has {" and ".join(needs)}, which engine="trl" cannot do: use engine="toolkit".')


def check_unsharded(trainer: Any) -> None:
    """Raise ValueError if weights would be sharded over processes: one of them judges and writes the finished model by itself."""
    how = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed's ZeRO stage 3" if is_deepspeed_zero3_enabled() else ""
    if how:
        raise ValueError(
            f"{how} shards the weights over processes, and the finished model could not be judged and written by one of them: train "
            "without it, or with DeepSpeed and --zero_stage 2, which shards gradients and the optimizer's state only."
        )


def describe_rollout(d: Drawn) -> str:
    """A rollout in words, for an error."""
    return f"problem {d.rollout.problem_id!r}, sample {d.rollout.sample}: {d.rollout.text[:80]!r}"


def check_finite(scored: rewards.Scored, batch: RewardBatch, step: int) -> None:
    """Raises NonFiniteError with the step and the first rollout whose reward is NaN or infinite."""
    bad = np.flatnonzero(~np.isfinite(scored.values))
    if len(bad):
        i = int(bad[0])
        parts = {name: float(values[i]) for name, values in scored.components.items()}
        raise NonFiniteError(
            f"The reward of step {step} is {scored.values[i]} for problem {batch['problem_id'][i]!r}, row {i} of {len(scored.values)}; its "
            f"components are {parts}."
        )
