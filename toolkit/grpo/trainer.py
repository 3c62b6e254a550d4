"""A thin subclass of TRL's ``GRPOTrainer``: exactly what papers on thinking length need and TRL lacks.

* Responses come from ``toolkit.generate`` through ``rollout_func``, on the weights being trained (no copy); finished rows leave the batch.
  With ``engine="trl"`` TRL generates (vLLM included) and its tokens become the same :class:`~toolkit.types.Rollout`.
* A reward sees the whole batch of all processes (groups intact), with spans, entropies and log-probabilities.
* Advantages from ``advantages.ALL``, written over TRL's; with ``advantage=None`` TRL's own stand.
* Dynamic sampling, DRPO's loss with whole groups, long and short modes, budgets in the prompt, a monitoring set for a reward that
  asks for one.
* Weights that learn are fp32, whatever the model was loaded in; a bfloat16 model runs and samples under autocast.
* Where one optimizer step uses all micro-batches, they are sorted by length and trimmed, and rows that nothing pushes (their whole group
  was paid the same) are left out: the same gradient, less work.

Everything else (optimizer, schedules, clipping, LoRA, DeepSpeed, loggers) is TRL's and transformers', untouched.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.models import prepare_deepspeed
from trl.trainer.utils import add_fused_lm_head

from toolkit import generate, rewards, store
from toolkit.grpo import advantages, draws, resuming
from toolkit.grpo.batching import BY_ROWS, BY_TOKENS, micro_batches, pushed_micro_batches
from toolkit.grpo.checks import NonFiniteError as NonFiniteError
from toolkit.grpo.checks import check_args, check_finite, check_whole, named
from toolkit.grpo.draws import Drawn, asked, asking
from toolkit.grpo.losses import ModeSwitch, drpo_objective, kl_hinge, kl_of, preference, switch_hinge
from toolkit.grpo.measures import measures
from toolkit.grpo.recipes import Recipe
from toolkit.grpo.resuming import STATE as STATE
from toolkit.grpo.sampler import Sampler, policy_of
from toolkit.lm import LM
from toolkit.rewards import RewardBatch
from toolkit.types import Problem, Rollout

Column = Callable[[Sequence[Drawn]], Sequence[Any]]
"""Supplies a column that a reward needs and rollouts do not have: one value a rollout."""


@dataclass(frozen=True)
class Extras:
    """What may be plugged into a trainer beside its recipe.

    Attributes:
        reward: A reward object of one's own instead of the recipe's.
        columns: Suppliers of columns that rollouts do not have, e.g. ``{"conciseness": f}``.
        engine: ``"toolkit"``, or ``"trl"`` to let TRL generate (with ``use_vllm`` in the config: vLLM).
        lora: A ``peft`` config, or ``None`` to train every weight.
        callbacks: Callbacks of transformers.
    """

    reward: Any = None
    columns: Mapping[str, Column] = field(default_factory=dict)
    engine: str = "toolkit"
    lora: Any = None
    callbacks: tuple[TrainerCallback, ...] = ()

    def __post_init__(self) -> None:
        if self.engine not in ("toolkit", "trl"):
            raise ValueError(f'engine={self.engine!r}: choose "toolkit" or "trl".')


@dataclass(frozen=True)
class Scored:
    """The newest batch of all processes: what was drawn, paid, and pushed."""

    drawn: list[Drawn]
    batch: RewardBatch
    scored: rewards.Scored
    advantages: np.ndarray | None


class Trainer(GRPOTrainer):
    """GRPO with a recipe. ``lm.model`` is trained in place: give a model of which nobody else needs the weights.

    Args:
        lm: The model, its tokenizer and think tags.
        recipe: What to train with; its numbers are already in ``args`` (see ``run.arguments``).
        problems: Training problems.
        args: TRL's config; ``max_steps`` must be given.
        extras: See :class:`Extras`.
        identity: What a checkpoint belongs to; kept in each.

    Raises:
        ValueError: groups cut across processes or micro-batches, or a combination of options that cannot work.
    """

    # TRL and transformers leave these open or too narrow.
    args: Any
    model: Any
    _buffered_inputs: Any

    def __init__(
        self,
        lm: LM,
        recipe: Recipe,
        problems: Sequence[Problem],
        args: GRPOConfig,
        extras: Extras = Extras(),
        identity: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.recipe, self.extras, self.origin = recipe, extras, lm
        self.reward = extras.reward or rewards.ALL[recipe.reward].make(**recipe.options)
        self.problems = {p.id: p for p in problems}
        check_args(args, recipe, extras.engine)
        self.newest: Scored | None = None
        self._drawn: list[Drawn] | None = None
        self._log_probs: Tensor | None = None
        self.identity = identity
        if extras.lora is None:
            learn_in_fp32(lm.model)
        beta, reference = args.beta, None
        if beta and extras.lora is None:
            reference = deepcopy(lm.model)
            args.beta = 0.0  # TRL would read the reference from the config's path, which may be that of a parent
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'", category=UserWarning)
            super().__init__(
                model=lm.model,
                reward_funcs=_named(self.reward.name),
                args=args,
                train_dataset=self._dataset(list(problems), args),
                processing_class=lm.tokenizer,
                callbacks=list(extras.callbacks),
                peft_config=deepcopy(extras.lora),  # peft writes into it: a second run with it would be of another adapter
                rollout_func=_rollouts if extras.engine == "toolkit" else None,
            )
        check_whole(self)
        if not self.is_deepspeed_enabled:  # which keeps fp32 masters of its own, and wants one type
            learn_in_fp32(self.model)
        self.remove_callback(PrinterCallback)
        self.sampler = Sampler(policy_of(self))
        self.beta = args.beta = beta
        if reference is not None:
            self.ref_model = self._reference(reference)

    def _dataset(self, problems: list[Problem], args: Any) -> Dataset:
        # The order of all steps is decided here, in one epoch, so that resuming only has to skip.
        args.shuffle_dataset = False
        used = args.steps_per_generation * args.num_iterations  # micro-batches a generation serves
        generations = math.ceil(args.max_steps * args.gradient_accumulation_steps / used)
        order = draws.schedule(problems, args.generation_batch_size // args.num_generations, generations, args.seed)
        prompts = [[dict(m) for m in self.problems[i].messages] for i in order]
        return Dataset.from_dict({"prompt": prompts, "problem_id": order})

    def _reference(self, reference: Any) -> Any:
        add_fused_lm_head(reference, temperature=self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(reference, self.accelerator)
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    # --- drawing and scoring -------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        began = time.perf_counter()
        self._monitor()
        if self.extras.engine == "toolkit":
            self._drawn = self.sampler.draw([row["problem_id"] for row in inputs])
            inputs = [{"prompt": [dict(m) for m in d.prompt], "problem_id": d.rollout.problem_id} for d in self._drawn]
            self.sampler.noted["seconds/rollouts"] = time.perf_counter() - began
        else:
            ask, _ = asking(self.recipe.curriculum, self.state.global_step)
            inputs = [{**row, "prompt": [dict(m) for m in asked(self.problems[row["problem_id"]], ask)]} for row in inputs]
        output = super()._generate_and_score_completions(inputs)
        assert self.newest is not None
        mine = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        device = self.accelerator.device
        output["row"] = torch.arange(mine.start, mine.stop, device=device)
        if self.newest.advantages is not None:
            output["advantages"] = torch.tensor(self.newest.advantages[mine], dtype=torch.float32, device=device)
        if self.recipe.loss:
            rows = self.newest.batch
            output["correct"] = torch.tensor(np.asarray(rows["correct"], bool)[mine], device=device)
            output["group"] = torch.tensor(rows.groups[mine], device=device)
        if self.recipe.switch:
            output.update(self._uninstructed(mine, self.recipe.switch))
        return output

    def _monitor(self) -> None:
        """Show the reward new responses to its monitoring set, if it has one and they are due (LASER-D, arXiv 2505.15612)."""
        due = self.reward.monitoring() if hasattr(self.reward, "monitoring") else None
        if due is not None:
            problems, samples = due
            found = self.sampler.monitored(problems, samples)
            self.reward.monitor(self._batch(found, self.state.global_step, "eval"))

    def _uninstructed(self, mine: slice, form: ModeSwitch) -> dict[str, Tensor]:
        """For the mode-switching loss: each row's question asked without instruction, and the mode its group prefers."""
        assert self.newest is not None
        rows, device = self.newest.batch, self.accelerator.device
        prefer = preference(np.asarray(rows["correct"], bool), rows["mode"] == "long", rows.groups, form)
        ids = [self.origin.prompt_ids(self.problems[i].messages) for i in rows["problem_id"][mine]]
        width, pad = max(map(len, ids)), self.origin.tokenizer.pad_token_id
        return {
            "group": torch.tensor(rows.groups[mine], device=device),
            "prefer": torch.tensor(prefer[mine], device=device),
            "plain_ids": torch.tensor([[pad] * (width - len(p)) + p for p in ids], device=device),
            "plain_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in ids], device=device),
        }

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> Tensor:
        """The reward of the whole batch of all processes, ``[n, 1]``, equal on each of them."""
        local = self._drawn or self._adopted(inputs, completion_ids_list)
        drawn = list(gather_object(local))
        batch = self.batch_of(drawn, local, self.state.global_step, "train")
        scored = self.reward(batch)
        check_finite(scored, batch, self.state.global_step)
        pushed = None
        if self.recipe.advantage:
            parts = (
                np.stack(list(scored.components.values()), axis=1)
                if self.recipe.advantage == "decoupled"
                else scored.values[:, None]
            )
            pushed = advantages.ALL[self.recipe.advantage](parts, batch.groups, np.asarray(batch["tokens"]))
        self.newest = Scored(drawn, batch, scored, pushed)
        for name, value in {**measures(drawn, batch, scored), **self.sampler.noted}.items():
            self._metrics["train"][name].append(value)
        return torch.tensor(scored.values, dtype=torch.float32, device=self.accelerator.device)[:, None]

    def _adopted(self, inputs: Sequence[Mapping[str, Any]], completions: Sequence[Sequence[int]]) -> list[Drawn]:
        """What TRL drew, as rollouts."""
        ask, budget = asking(self.recipe.curriculum, self.state.global_step)
        found = []
        for i, (row, tokens) in enumerate(zip(inputs, completions, strict=True)):
            problem = self.problems[row["problem_id"]]
            messages = asked(problem, ask)
            prompt = self.origin.prompt_ids(messages)
            rollout = generate.rollout_from_tokens(self.origin, problem, prompt, list(tokens), sample=i % self.args.num_generations)
            found.append(Drawn(rollout, messages, budget))
        return found

    def batch_of(self, drawn: Sequence[Drawn], local: Sequence[Drawn], step: int, split: Any) -> RewardBatch:
        """The reward's view of a batch: columns of the rollouts, of how they were asked for, and supplied ones.

        Args:
            drawn: Over all processes.
            local: Of this process: each process supplies its own rows of the supplied columns.
        """
        batch = self._batch([d.rollout for d in drawn], step, split)
        more = {name: np.asarray(gather_object(list(f(local)))) for name, f in self.extras.columns.items()}
        for name in ("budget", "mode", "logprob_without"):
            values = [getattr(d, name) for d in drawn]
            if values[0] is not None:
                more[name] = np.asarray(values)
        return batch.having(**more)

    def _batch(self, found: Sequence[Rollout], step: int, split: str) -> RewardBatch:
        """The columns that rollouts of the model in training carry; their answers begin after its own closing tag."""
        problems = [self.problems[i] for i in {r.problem_id for r in found}]
        close = self.origin.tags.close if self.origin.tags else None
        return RewardBatch.of(found, problems, step=step, split=split, close=close)

    # --- loss ----------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """As TRL, but without its shuffle where one optimizer step uses all micro-batches: there, rows (or whole groups) are sorted by
        length and each micro-batch is trimmed to its longest. Where several steps share a generation, TRL's shuffle matters and stays,
        except for a loss over whole groups."""
        together = self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) == 0
        if not (together or self.recipe.loss):
            return super()._prepare_inputs(generation_batch)
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0 or self._buffered_inputs is None:
            scored = self._generate_and_score_completions(generation_batch)
            size = self.args.num_generations if self.recipe.loss else 1
            parts = self.args.steps_per_generation
            if together and self._pushes_alone(scored):
                most = max(gather_object([int((scored["advantages"] != 0).sum())]))
                self._buffered_inputs = pushed_micro_batches(scored, parts, self.loss_type, most)
            else:
                self._buffered_inputs = micro_batches(scored, parts, size, by_length=together)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _pushes_alone(self, scored: Mapping[str, Any]) -> bool:
        """Whether a row of advantage 0 adds nothing to the loss, and what the log says of it is known from sampling."""
        assert self.newest is not None
        plain = not (self.recipe.loss or self.recipe.switch or self.beta or self._entropy_bonus_enabled or self.aux_loss_enabled)
        whole = self.top_entropy_quantile == 1.0 and scored["advantages"].ndim == 1
        known = all(d.rollout.entropies for d in self.newest.drawn)
        return plain and whole and known and self.loss_type in BY_ROWS | BY_TOKENS

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = self._drpo_loss(model, inputs) if self.recipe.loss else super()._compute_loss(model, inputs)
        if "share" in inputs:
            loss = loss * inputs["share"]
            # TRL's is of the rows that passed; this is of all.
            assert self.newest is not None
            self._metrics["train"]["entropy"][-1] = float(
                np.mean([h for d in self.newest.drawn for h in d.rollout.entropies or ()])
            )
        self._note_gap(inputs)
        if self.recipe.switch:
            loss = loss + self._switch_loss(model, inputs, self.recipe.switch)
        if not torch.isfinite(loss):
            raise NonFiniteError(f"The loss of step {self.state.global_step} is {loss.item()}{self._culprit([inputs])}.")
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._log_probs = found[0].detach()
        return found

    def _note_gap(self, inputs: Mapping[str, Any]) -> None:
        """Log how far the log-probabilities of the policy in training are from those it sampled with, until its first update.

        ``sampler/kl`` is their mean difference (an estimate of KL(sampler || trainer)), ``sampler/gap`` its mean size, nats per token.
        Both would be 0 in exact arithmetic: they show rounding, and an engine that samples in another number type.
        """
        sampled, a = inputs.get("sampling_per_token_logps"), self.args
        moved = self._step % (a.steps_per_generation * self.num_iterations) >= a.gradient_accumulation_steps
        if sampled is None or moved or a.top_k or a.top_p < 1:  # truncated, the sampler's are of another distribution
            return
        assert self._log_probs is not None
        gap = (sampled - self._log_probs)[inputs["completion_mask"].bool()]
        if len(gap):
            self._metrics["train"]["sampler/kl"].append(gap.mean().item())
            self._metrics["train"]["sampler/gap"].append(gap.abs().mean().item())

    def _drpo_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        form = self.recipe.loss
        assert form is not None
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask, keep = inputs["completion_mask"], inputs["completion_ids"].shape[1]
        new, entropies, _ = self._get_per_token_logps_and_entropies(
            model, ids, torch.cat([inputs["prompt_mask"], mask], dim=1), keep, compute_entropy=True
        )
        tokens = mask.sum(dim=1)
        means = (new * mask).sum(dim=1) / tokens.clamp(min=1)
        capacity = form.capacity or self.max_completion_length
        objective = drpo_objective(means, inputs["correct"], tokens, inputs["group"], replace(form, capacity=capacity))
        old = inputs.get("old_per_token_logps")
        old = new.detach() if old is None else old
        loss = -objective + kl_hinge(new, old, mask, form)
        self._metrics["train"]["kl"].append(kl_of(new.detach(), old, mask).item())
        self._metrics["train"]["entropy"].append(((entropies * mask).sum() / mask.sum().clamp(min=1)).item())
        return loss / self.current_gradient_accumulation_steps

    def _switch_loss(self, model: Any, inputs: dict[str, Any], form: ModeSwitch) -> Tensor:
        """This micro-batch's part of the mean hinge over the generation's problems, so that the parts add up to it."""
        _, first, rows = np.unique(inputs["group"].cpu().numpy(), return_index=True, return_counts=True)
        ids, mask, prefer = (inputs[name][first.tolist()] for name in ("plain_ids", "plain_mask", "prefer"))
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits[:, -1]
        begins = tuple(self.origin.tokenizer.encode(text, add_special_tokens=False)[0] for text in (form.long, form.short))
        hinge = switch_hinge(logits, prefer, (begins[0], begins[1]), form)
        generation = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        part = (hinge * torch.tensor(rows, device=hinge.device)).sum() / generation
        self._metrics["train"]["switch_loss"].append(part.item())
        return part

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"The gradient of step {self.state.global_step} has norm {float(norm)}{self._culprit(self._buffered_inputs or [])}."
            )
        return norm

    def _culprit(self, parts: Sequence[dict[str, Any]]) -> str:
        """Which sample alone gives a loss or gradient that is not finite, in words."""
        weights = [w for w in self.model.parameters() if w.requires_grad]
        for part in parts:
            for i, row in enumerate(part["row"].tolist()):
                one = {k: v[i : i + 1] if torch.is_tensor(v) and v.ndim else v for k, v in part.items()}
                with torch.enable_grad():
                    loss = super()._compute_loss(self.model, one)
                    grads = torch.autograd.grad(loss, weights, allow_unused=True)
                if not all(torch.isfinite(value).all() for value in (loss, *grads) if value is not None):
                    return f", from {named(self.newest.drawn[row])}" if self.newest else ""
        return "; no sample alone makes it so"

    # --- saving --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        checkpoint = resuming.checkpoint_of(self.args.output_dir, self.state.global_step)
        with resuming.writing(checkpoint, main=self.args.should_save):
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                store.write_json({"identity": dict(self.identity), "reward": self.reward_state()}, checkpoint / STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with resuming.reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with resuming.reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with resuming.reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def reward_state(self) -> dict:
        """State of a stateful reward, else empty."""
        return self.reward.state_dict() if hasattr(self.reward, "state_dict") else {}


def learn_in_fp32(model: Any) -> None:
    """Make every weight that is trained fp32, in place: in bfloat16 most steps of an optimizer are less than half a unit in the last
    place, and are lost."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def _rollouts(prompts: list, trainer: Any) -> dict[str, list]:
    """TRL's ``rollout_func``: hands over what the sampler drew."""
    drawn = [d.rollout for d in trainer._drawn or []]
    return {
        "prompt_ids": [list(r.token_ids[: r.prompt_len]) for r in drawn],
        "completion_ids": [list(r.token_ids[r.prompt_len :]) for r in drawn],
        "logprobs": [list(r.logprobs or ()) for r in drawn],
    }


def _named(name: str) -> Callable[..., list[float | None]]:
    """The reward function TRL asks for; it is never called, since ``_calculate_rewards`` is ours, but names the metrics."""

    def reward(**columns: Any) -> list[float | None]:
        raise NotImplementedError("Rewards are computed over the whole batch in Trainer._calculate_rewards.")

    reward.__name__ = name
    return reward
