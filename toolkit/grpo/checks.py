"""Checks of a training run. Settings that cannot be combined are refused before the first step. A NaN or infinite reward stops the run."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from transformers.integrations import is_deepspeed_zero3_enabled

from toolkit import rewards
from toolkit.grpo import parts
from toolkit.grpo.draws import Drawn
from toolkit.grpo.extras import Extras
from toolkit.grpo.losses import ModeSwitch
from toolkit.grpo.recipes import Recipe
from toolkit.lm import LM
from toolkit.rewards import RewardBatch

TRUNCATING = frozenset({"truncation", "think_prune", "dler", "da_dler", "dot"})  # rewards that punish long responses

OF_TRLS_LOSS = (
    "loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "sapo_temperature_neg", "sapo_temperature_pos",
    "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "top_entropy_quantile", "off_policy_mask_threshold",
    "entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target",
    "use_bias_correction_kl", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "reward_weights",
)  # fmt: skip
"""Fields of TRL's config that only TRL's loss and advantages read: without effect if the recipe has a loss of its own."""


class NonFiniteError(ValueError):
    """Raised if a reward, loss or gradient is NaN or infinite, before the weights are updated with it."""


def check_args(args: Any, recipe: Recipe, extras: Extras, reward: Any) -> None:
    """Raise ValueError if TRL's config, the recipe, the extras and the reward cannot be combined.

    Examples: the batch size would split the responses to one problem over two processes; or TRL samples the responses, but the recipe has
    dynamic sampling (problems whose responses all get the same reward are replaced), which only the toolkit's sampler can do.

    Args:
        args: TRL's config.
        recipe: Recipe to train with.
        extras: Settings that the recipe does not have: the engine and the part to train are checked.
        reward: Reward object of the run.
    """
    samples, world = args.num_generations, args.world_size
    local = args.per_device_train_batch_size * args.steps_per_generation  # responses that each process samples per generation
    if args.max_steps < 1:
        raise ValueError(f"max_steps={args.max_steps}: give the number of training steps.")
    if local % samples:
        raise ValueError(
            f"Each of {world} processes samples {local} responses per step, which splits groups of {samples}: make "
            "per_device_train_batch_size * steps_per_generation a multiple of num_generations."
        )
    if recipe.loss and args.per_device_train_batch_size % samples:
        raise ValueError(
            f"{recipe.name} needs whole groups in each micro-batch: per_device_train_batch_size={args.per_device_train_batch_size} is not "
            f"a multiple of num_generations={samples}."
        )
    if recipe.loss and args.beta:
        raise ValueError(f"{recipe.name}'s loss has its own KL term: beta={args.beta} would have no effect, set it to 0.")
    if args.sync_ref_model:
        raise ValueError(
            "sync_ref_model=True would change the reference model during training. Checkpoints do not hold that model, so a resumed run would "
            "differ from one that was not stopped: leave it out."
        )
    if args.bf16 and args.use_transformers_continuous_batching:
        raise ValueError(
            "use_transformers_continuous_batching casts the weights to bfloat16 in place, which rounds away the updates: leave it out, or "
            "train in float32."
        )
    if args.multi_objective_aggregation != "sum_then_normalize":
        raise ValueError(
            f"multi_objective_aggregation={args.multi_objective_aggregation!r} has no effect, since TRL gets one reward, the sum of its "
            "components: use the advantage gdpo (recipes.gdpo)."
        )
    punishing = [name for name in _names(reward) if name in TRUNCATING]
    if args.mask_truncated_completions and punishing:
        raise ValueError(
            f"mask_truncated_completions=True leaves out the rollouts that the reward {punishing[0]} punishes: set it to false."
        )
    if {"logprob", "logprob_without"} <= set(reward.needs) and (args.top_p < 1 or args.top_k > 0):
        raise ValueError(
            f"{reward.name} compares log-probabilities with and without the question. With top_p={args.top_p} and top_k={args.top_k}, the "
            "first are those after the cut and the second are not: set top_p=1 and top_k=0."
        )
    _check_unused(args, recipe, extras)
    unsupported = [name for name in ("dynamic", "modes") if getattr(recipe, name)]
    if args.use_vllm and isinstance(extras.train, parts.Vectors | parts.Heads):
        raise ValueError("vLLM gets weights only, so it would sample without the trained vectors or heads: leave use_vllm out.")
    if extras.engine == "trl" and unsupported:
        raise ValueError(f'{recipe.name} has {" and ".join(unsupported)}, which engine="trl" cannot do: use engine="toolkit".')


def _names(reward: Any) -> list[str]:
    """Return the name of a reward and those of the rewards that it combines, at any depth (see ``rewards.combine``)."""
    inside: list[Any] = []
    if isinstance(reward, rewards.WeightedSum | rewards.MeanOfAdvantages):
        inside = [part for _, part in reward.parts]
    elif isinstance(reward, rewards.Gated):
        inside = [reward.inner, *reward.gates]
    return [reward.name, *(name for part in inside for name in _names(part))]


def _check_unused(args: Any, recipe: Recipe, extras: Extras) -> None:
    """Raise ValueError if TRL's config sets a field that the run would not use."""
    neutral = {"min_p": (None, 0), "repetition_penalty": (None, 1), "generation_kwargs": (None, {})}
    unread = [name for name, values in neutral.items() if getattr(args, name) not in values]
    if extras.engine == "toolkit" and unread:
        raise ValueError(
            f"{unread[0]}={getattr(args, unread[0])!r} has no effect, since the toolkit samples with temperature, top_p and top_k alone: leave "
            'it out, or let TRL sample (--training-engine trl, Extras(engine="trl")).'
        )
    engines = [name for name in ("use_vllm", "use_transformers_continuous_batching") if getattr(args, name)]
    if extras.engine == "toolkit" and engines:
        raise ValueError(
            f"{engines[0]}=True has no effect, since the toolkit samples the responses: leave it out, or let TRL sample (--training-engine trl, "
            'Extras(engine="trl")).'
        )
    defaults = {f.name: f.default for f in fields(args)}
    idle = [name for name in OF_TRLS_LOSS if getattr(args, name) != defaults[name]]
    if recipe.loss and idle:
        raise ValueError(
            f"{idle[0]}={getattr(args, idle[0])!r} has no effect, since {recipe.name} has its own loss: leave it out, or choose a recipe with "
            "TRL's loss."
        )
    own = [name for name in ("advantage", "filter", "token_advantage", "loss") if getattr(recipe, name)]
    if own and args.scale_rewards != "group":
        raise ValueError(
            f"scale_rewards={args.scale_rewards!r} has no effect, since {recipe.name} has its own {own[0]}: leave it out, or choose "
            "another advantage, such as dr_grpo, which does not divide by the standard deviation."
        )


def first_tokens(lm: LM, form: ModeSwitch) -> tuple[int, int]:
    """Return the ids of the tokens that begin a long and a short response, for the mode-switching loss (see ``losses.ModeSwitch``).

    Raises:
        ValueError: the two tokens are equal, so that the loss would have no gradient; or a text has no token.
    """
    long, short = (lm.tokenizer.encode(text, add_special_tokens=False) for text in (form.long, form.short))
    if not (long and short) or long[0] == short[0]:
        begins = " and ".join(repr(lm.text(ids[:1])) for ids in (long, short))
        raise ValueError(
            f"switch: a long response begins with {form.long!r} and a short one with {form.short!r}. Their first tokens, {begins}, must "
            "differ, or the loss has no gradient. Give texts from the first token on in which the modes differ; let the chat template write "
            "the tokens before it, such as an opening think tag."
        )
    return long[0], short[0]


def check_unsharded(trainer: Any) -> None:
    """Raise ValueError if the trainer shards weights over processes (FSDP, ZeRO stage 3).

    Sharding is not supported: the main process evaluates and saves the finished model alone, so it must hold all weights.
    """
    how = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed's ZeRO stage 3" if is_deepspeed_zero3_enabled() else ""
    if how:
        raise ValueError(
            f"{how} shards the weights over processes, so that no single process could evaluate and save the finished model: train without "
            "it, or with DeepSpeed and --zero_stage 2, which shards only gradients and the optimizer's state."
        )


def describe_rollout(d: Drawn) -> str:
    """Return a description of a rollout for an error message: problem id, sample index and first 80 characters of the response."""
    return f"problem {d.rollout.problem_id!r}, sample {d.rollout.sample}: {d.rollout.text[:80]!r}"


def check_finite(scored: rewards.RewardValues, batch: RewardBatch, step: int) -> None:
    """Raise NonFiniteError if a reward is NaN or infinite; the message names the step and the problem of the first such reward."""
    bad = np.flatnonzero(~np.isfinite(scored.values))
    if len(bad):
        i = int(bad[0])
        parts = {name: float(values[i]) for name, values in scored.components.items()}
        raise NonFiniteError(
            f"The reward of step {step} is {scored.values[i]} for problem {batch['problem_id'][i]!r}, row {i} of {len(scored.values)}; its "
            f"components are {parts}."
        )
