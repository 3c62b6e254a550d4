"""A subclass of TRL's ``GRPOTrainer`` with features that papers on reasoning length need and TRL lacks.

A generation is a batch of responses sampled at once; a group is the responses of one generation to one problem; a row is one response.

* Sampling: responses come from ``toolkit.generate`` through TRL's ``rollout_func``, without a copy of the model. Finished rows leave the
  decoding batch. With ``engine="trl"`` TRL generates (also with vLLM), and its tokens are converted to ``Rollout`` objects.
* Rewards: a reward gets the batch of all processes with whole groups, including think spans, entropies and log-probabilities.
* Advantages: ``Recipe.advantage`` selects one of ``advantages.ALL``; ``None`` means TRL's. ``Recipe.filter`` leaves rollouts out, and
  ``Recipe.token_advantage`` gives every token its own.
* Losses: DRPO's loss over whole groups, and the mode-switching loss (see ``losses``).
* Dynamic sampling: groups whose rewards are all equal are replaced.
* Prompts can state a token budget, or request a mode: long or short thinking.
* Monitoring set: some rewards, such as LASER-D, measure the policy regularly on a fixed set of training problems. These responses are not
  trained on.
* Precision: trained weights are fp32, whatever dtype the model was loaded in. A bfloat16 model trains and samples under autocast.
* Speed: if one optimizer step uses a whole generation, its rows are sorted by length, micro-batches are trimmed, and rows with advantage 0
  are left out. The gradient stays the same. Rows stay in order if TRL averages over the tokens of each micro-batch (see
  ``batching.depends_on_parts``): the gradient would depend on the order.

Everything else (optimizer, schedules, clipping, LoRA, DeepSpeed, loggers) is TRL's and transformers', unchanged.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import compress
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback
from trl import GRPOConfig
from trl.models import prepare_deepspeed
from trl.trainer.utils import add_fused_lm_head

from toolkit import generate, rewards
from toolkit.grpo import advantages, decs, dense, draws, parts
from toolkit.grpo.batching import (
    BY_ROWS,
    BY_TOKENS,
    depends_on_parts,
    has_router_loss,
    micro_batches,
    nonzero_micro_batches,
    written_mask,
)
from toolkit.grpo.checks import NonFiniteError as NonFiniteError
from toolkit.grpo.checks import check_args, check_finite, check_unsharded, describe_rollout, first_tokens
from toolkit.grpo.draws import Drawn, budget_prompt, prompted_messages
from toolkit.grpo.extras import Extras as Extras
from toolkit.grpo.filters import filtered
from toolkit.grpo.losses import ModeSwitch, drpo_objective, kl_estimate, kl_hinge, preference, switch_hinge
from toolkit.grpo.measures import batch_measures
from toolkit.grpo.recipes import Recipe
from toolkit.grpo.redundant import redundant_span
from toolkit.grpo.resuming import STATE as STATE
from toolkit.grpo.resuming import ResumableTrainer
from toolkit.grpo.sampler import Sampler, view_of
from toolkit.lm import LM
from toolkit.rewards import RewardBatch
from toolkit.types import Problem, Rollout


@dataclass(frozen=True)
class ScoredBatch:
    """The rollouts of one generation, of all processes, with their rewards and advantages.

    Attributes:
        drawn: The ``n`` rollouts with their prompts.
        batch: The data that the rewards were computed from: arrays with one value per rollout, by name.
        scored: Rewards of the rollouts and their components.
        advantages: Advantages of the rollouts, ``[n]``, or of their tokens, ``[n, positions]``; ``None`` if TRL computes the advantages.
    """

    drawn: list[Drawn]
    batch: RewardBatch
    scored: rewards.RewardValues
    advantages: np.ndarray | None


class Trainer(ResumableTrainer):
    """TRL's GRPO trainer with a recipe. It trains ``lm.model`` in place, so pass a copy if you still need the weights.

    A recipe holds the training settings of one paper (see ``recipes.Recipe``).

    Args:
        lm: The model to train, with its tokenizer and think tags.
        recipe: The recipe. Its numbers must already be in ``args``, as ``run.arguments`` puts them there.
        problems: Training problems.
        args: TRL's config; ``max_steps`` must be set.
        extras: Parts of the run that the recipe does not set, such as your own reward or the part to train.
        identity: Dict of settings that must be the same when the run is resumed; saved in each checkpoint.

    Attributes:
        origin: The argument ``lm``. Its tokenizer, think tags and template are used during training.
        problems: Problem id -> training problem.
        reward: The reward object.
        newest: Rollouts of the last generation with their rewards, as a ``ScoredBatch``; ``None`` before the first generation.
        sampler: Object that samples the responses.
        attached: Trained vectors or heads with their hooks; ``None`` if weights or an adapter are trained.

    Raises:
        ValueError: the responses to one problem would be split across processes; they would be split across micro-batches, and the
            recipe's loss does not allow this; weights would be sharded over processes; or the options cannot be combined (see
            ``checks.check_args`` and ``checks.first_tokens``).
    """

    # TRL and transformers leave these types open or too narrow.
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
        check_args(args, recipe, extras, self.reward)
        if recipe.loss and has_router_loss(vars(args), lm.model.config):
            raise ValueError(
                f"{lm.name} is a mixture of experts, whose loss for balance between experts {recipe.name}'s own loss leaves out: set "
                "router_aux_loss_coef to 0 to train without it, or choose a recipe with TRL's loss."
            )
        if recipe.advantage in advantages.STEPS and not hasattr(self.reward, "steps"):
            raise ValueError(
                f"The advantage {recipe.advantage!r} needs a reward per step, which {self.reward.name!r} has not: use ppr or reseek, or give "
                "the reward a method steps(batch)."
            )
        if recipe.advantage in advantages.TOKENS and not hasattr(self.reward, "segments"):
            raise ValueError(
                f"The advantage {recipe.advantage!r} needs a reward per segment, which {self.reward.name!r} has not: use fine_grained or "
                "page_llm, or give the reward a method segments(batch)."
            )
        self._begins = first_tokens(lm, recipe.switch) if recipe.switch else None
        self.newest: ScoredBatch | None = None
        self._drawn: list[Drawn] | None = None  # this process's rollouts of the newest batch; None if TRL samples
        self._log_probs: Tensor | None = None  # log-probabilities that TRL computed last, for ``_note_gap``
        self.identity = identity
        if extras.train is None:
            learn_in_fp32(lm.model)  # before the reference is copied and the optimizer is made
        beta, reference = args.beta, None
        if beta and not parts.is_adapter(extras.train):
            reference = deepcopy(lm.model)
            args.beta = 0.0  # TRL would load the reference from the config's path, which may be that of a parent model
        self.attached = parts.attach(extras.train, lm)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'", category=UserWarning)
            super().__init__(
                model=lm.model,
                reward_funcs=_named_reward(self.reward.name),
                args=args,
                train_dataset=self._dataset(list(problems), args),
                processing_class=lm.dated_tokenizer(),
                callbacks=list(extras.callbacks),
                # A copy: peft changes it, so a second run with it would train another adapter.
                peft_config=deepcopy(extras.train) if parts.is_adapter(extras.train) else None,
                rollout_func=_rollouts if extras.engine == "toolkit" else None,
            )
        check_unsharded(self)
        if not self.is_deepspeed_enabled:  # DeepSpeed keeps its own fp32 copies and needs one type
            learn_in_fp32(self.model)
        self.remove_callback(PrinterCallback)
        self.sampler = Sampler(view_of(self))
        self.beta = args.beta = beta  # the value that was hidden from TRL above
        if reference is not None:
            self.ref_model = self._reference(reference)

    def _dataset(self, problems: list[Problem], args: Any) -> Dataset:
        # One epoch of this dataset holds the prompts of all steps in order, so that a resumed run only has to skip those already used.
        args.shuffle_dataset = False
        # TRL's ``steps_per_generation`` counts micro-batches, and ``num_iterations`` counts passes over a generation.
        used = args.steps_per_generation * args.num_iterations  # micro-batches per generation
        generations = math.ceil(args.max_steps * args.gradient_accumulation_steps / used)
        order = draws.schedule(problems, args.generation_batch_size // args.num_generations, generations, args.seed)
        prompts = [[dict(m) for m in self.problems[i].messages] for i in order]
        return Dataset.from_dict({"prompt": prompts, "problem_id": order})

    def _reference(self, reference: Any) -> Any:
        add_fused_lm_head(reference, temperature=self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(reference, self.accelerator)
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    # --- sampling and scoring ------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        began = time.perf_counter()
        self._monitor()
        if self.extras.engine == "toolkit":
            self._drawn = self.sampler.draw([row["problem_id"] for row in inputs])
            inputs = [{"prompt": [dict(m) for m in d.prompt], "problem_id": d.rollout.problem_id} for d in self._drawn]
            self.sampler.metrics["seconds/rollouts"] = time.perf_counter() - began
        else:
            ask, _ = budget_prompt(self.recipe.curriculum, self.state.global_step)
            inputs = [
                {**row, "prompt": [dict(m) for m in prompted_messages(self.problems[row["problem_id"]], ask)]} for row in inputs
            ]
        output = super()._generate_and_score_completions(inputs)
        assert self.newest is not None
        # This process's rows of the batch of all processes.
        mine = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        device = self.accelerator.device
        output["row"] = torch.arange(mine.start, mine.stop, device=device)
        if self.newest.advantages is not None:
            own = self.newest.advantages[mine]
            if (
                own.ndim == 2
            ):  # one column per token of this process's longest response, with TRL's padding (``pad_to_multiple_of``)
                width = output["completion_ids"].shape[1]
                own = np.pad(own[:, :width], ((0, 0), (0, max(0, width - own.shape[1]))))
            output["advantages"] = torch.tensor(own, dtype=torch.float32, device=device)
        if self.recipe.loss:
            rows = self.newest.batch
            output["correct"] = torch.tensor(np.asarray(rows["correct"], bool)[mine], device=device)
            output["group"] = torch.tensor(rows.groups[mine], device=device)
        if self.recipe.switch:
            output.update(self._uninstructed(mine, self.recipe.switch))
        return output

    def _monitor(self) -> None:
        """If the reward asks for it now, sample responses to a monitoring set, and pass them to the reward. They are not trained on.

        A monitoring set is a fixed set of training problems. A reward uses the responses to measure the policy. LASER-D asks for them at
        intervals; most rewards never do.
        """
        due = self.reward.monitoring() if hasattr(self.reward, "monitoring") else None
        if due is not None:
            problems, samples = due
            rollouts = self.sampler.monitoring_rollouts(problems, samples)
            self.reward.monitor(self._batch(rollouts, self.state.global_step, "eval"))

    def _uninstructed(self, mine: slice, form: ModeSwitch) -> dict[str, Tensor]:
        """Return the inputs of the mode-switching loss for this process's rows of ``newest``, the last generation.

        This loss teaches the model to choose between long and short thinking when the prompt requests neither (see ``losses.ModeSwitch``).

        Args:
            mine: Slice of this process's rows among the rows of all processes.
            form: Parameters of the loss.

        Returns:
            Tensors by name, one row per response: ``group`` (index of the group), ``prefer`` (mode that the loss teaches for this
            problem: 1 long, -1 short, 0 none), and ``plain_ids`` and ``plain_mask`` (token ids and attention mask of the prompt without
            the request for a mode).
        """
        assert self.newest is not None
        rows, device = self.newest.batch, self.accelerator.device
        prefer = preference(np.asarray(rows["correct"], bool), rows["mode"] == "long", rows.groups, form)
        ids = [self.origin.prompt_ids(self.problems[i].messages) for i in rows["problem_id"][mine]]
        width, pad = max(map(len, ids)), self.origin.tokenizer.pad_token_id
        return {
            "group": torch.tensor(rows.groups[mine], device=device),
            "prefer": torch.tensor(prefer[mine], device=device),
            # Padded on the left, so that the last column predicts the first response token.
            "plain_ids": torch.tensor([[pad] * (width - len(p)) + p for p in ids], device=device),
            "plain_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in ids], device=device),
        }

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> Tensor:
        """Return the rewards of the rollouts of all processes, ``[n, 1]``, the same in every process. TRL calls this after sampling.

        The arguments hold the responses of this process. They are used only if TRL sampled the responses.
        """
        local = self._drawn or self._adopted(inputs, completion_ids_list)
        drawn = list(gather_object(local))
        batch = self.batch_of(drawn, local, self.state.global_step, "train")
        scored = self.reward(batch)
        check_finite(scored, batch, self.state.global_step)
        self.newest = ScoredBatch(drawn, batch, scored, self._advantages(drawn, batch, scored))
        for name, value in {**batch_measures(drawn, batch, scored), **self.sampler.metrics}.items():
            self._metrics["train"][name].append(value)
        return torch.tensor(scored.values, dtype=torch.float32, device=self.accelerator.device)[:, None]

    def _advantages(self, drawn: Sequence[Drawn], batch: RewardBatch, scored: rewards.RewardValues) -> np.ndarray | None:
        """Return the advantages of the rollouts of all processes, ``[n]``, or of their tokens, ``[n, positions]``. ``None``: TRL's."""
        recipe = self.recipe
        if recipe.token_advantage is not None:
            form, tokens = recipe.token_advantage, np.asarray(batch["tokens"])
            spans = [redundant_span(self.origin, d.rollout, self.problems[d.rollout.problem_id]) for d in drawn]
            longest = int(form.longest or self.max_completion_length or 1)
            correct = np.asarray(batch["correct"], bool)
            each = decs.token_rewards(correct, tokens, spans, int(tokens.max(initial=1)), form.bonus, longest)
            return decs.token_advantages(each, batch.groups)
        if recipe.advantage is not None and recipe.advantage in advantages.STEPS:
            steps = advantages.STEPS[recipe.advantage](self.reward.steps(batch), batch.groups)
            return advantages.per_token(steps, [d.rollout for d in drawn])
        if recipe.advantage is not None and recipe.advantage in advantages.TOKENS:
            rollouts = [d.rollout for d in drawn]
            each = dense.batch_rewards(self.origin, rollouts, self.reward.segments(batch))
            return advantages.TOKENS[recipe.advantage](each, batch.groups) * dense.own_tokens(rollouts)
        if recipe.advantage is None and recipe.filter is None:
            return None
        name = recipe.advantage or "grpo"
        by_component = name in advantages.BY_COMPONENT
        columns = np.stack(list(scored.components.values()), axis=1) if by_component else scored.values[:, None]
        if recipe.filter is not None:
            return filtered(advantages.ALL[name], recipe.filter, columns, batch)
        return advantages.ALL[name](columns, batch.groups, np.asarray(batch["written_tokens"]))

    def _adopted(self, inputs: Sequence[Mapping[str, Any]], completions: Sequence[Sequence[int]]) -> list[Drawn]:
        """Convert responses that TRL sampled on this process to rollouts with their prompts, and return them.

        Args:
            inputs: Row of the training data for each response, with the key ``problem_id``.
            completions: Token ids of each response.
        """
        ask, budget = budget_prompt(self.recipe.curriculum, self.state.global_step)
        drawn = []
        for i, (row, tokens) in enumerate(zip(inputs, completions, strict=True)):
            problem = self.problems[row["problem_id"]]
            messages = prompted_messages(problem, ask)
            prompt = self.origin.prompt_ids(messages)
            rollout = generate.rollout_from_tokens(self.origin, problem, prompt, list(tokens), sample=i % self.args.num_generations)
            drawn.append(Drawn(rollout, messages, budget))
        return drawn

    def batch_of(self, drawn: Sequence[Drawn], local: Sequence[Drawn], step: int, split: Any) -> RewardBatch:
        """Return the batch that is passed to the reward. Its columns come from the rollouts, their prompts and ``Extras.columns``.

        A column is an array with one value per rollout. ``Extras.columns`` are columns that the user's own functions compute.

        Args:
            drawn: Rollouts of all processes.
            local: Rollouts of this process. This process computes ``Extras.columns`` for them only; the values are then gathered.
            step: Number of optimizer steps done so far.
            split: ``"train"``, or ``"eval"`` if the reward must not change its state.
        """
        batch = self._batch([d.rollout for d in drawn], step, split)
        more: dict[str, Any] = {name: gather_object(list(f(local))) for name, f in self.extras.columns.items()}
        for name in ("budget", "mode", "logprob_without"):
            values = [getattr(d, name) for d in drawn]
            if values[0] is not None:
                more[name] = np.asarray(values)
        return batch.with_columns(**more)

    def _batch(self, rollouts: Sequence[Rollout], step: int, split: str) -> RewardBatch:
        """Return a batch for the reward with those columns that need only the rollouts, such as response lengths.

        ``batch_of`` adds columns about the prompts and those of ``Extras.columns``. The batch also gets the model's closing think tag,
        since some rewards read the text after it.
        """
        problems = [self.problems[i] for i in {r.problem_id for r in rollouts}]
        close = self.origin.tags.close if self.origin.tags else None
        return RewardBatch.from_rollouts(rollouts, problems, step=step, split=split, close=close)

    # --- loss ----------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Return the next micro-batch. If all responses of the last generation have been used, sample a new one and split it first.

        A generation is a batch of responses sampled at once; a row is one response. If one optimizer step uses a whole generation, rows (or
        whole groups, for DRPO's loss) are sorted by length, and each micro-batch is trimmed to its longest row. Rows stay in order if the
        order would change the gradient (``batching.depends_on_parts``). If several steps share a generation, TRL shuffles its rows over the
        steps. DRPO's loss needs whole groups, so its rows stay in order instead.
        """
        # True if one optimizer step uses a whole generation.
        together = self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) == 0
        if not (together or self.recipe.loss):
            return super()._prepare_inputs(generation_batch)
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0 or self._buffered_inputs is None:
            scored = self._generate_and_score_completions(generation_batch)
            size = self.args.num_generations if self.recipe.loss else 1
            parts = self.args.steps_per_generation
            if together and self._zero_rows_can_go(scored):
                # Largest number of nonzero rows on any process; every process keeps so many, since TRL gathers equally many from each.
                most = max(gather_object([int((scored["advantages"] != 0).sum())]))
                self._buffered_inputs = nonzero_micro_batches(scored, parts, self.loss_type, most)
            else:
                by_length = together and not depends_on_parts(vars(self.args), self.origin.model.config)
                self._buffered_inputs = micro_batches(scored, parts, size, by_length=by_length)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _zero_rows_can_go(self, scored: Mapping[str, Any]) -> bool:
        """Return True if rows (responses) with advantage 0 can be left out of the micro-batches.

        Three conditions must hold:

        * These rows add nothing to the gradient. This excludes losses with, for example, a KL term or an entropy bonus.
        * It is known by which number TRL divides the loss (rows or tokens), since this has to be corrected for the rows left out. So the
          loss is in ``batching.BY_ROWS`` or ``batching.BY_TOKENS``.
        * The entropies of all rows were computed during sampling. Their mean is logged, and it includes the rows left out.
        """
        assert self.newest is not None
        # ``plain``: the loss has no term that is nonzero at advantage 0. ``whole``: all tokens count, with one advantage per row.
        # ``known``: entropies are recorded.
        plain = not (self.recipe.loss or self.recipe.switch or self.beta or self._entropy_bonus_enabled or self.aux_loss_enabled)
        whole = self.top_entropy_quantile == 1.0 and scored["advantages"].ndim == 1
        known = all(d.rollout.entropies for d in self.newest.drawn)
        return plain and whole and known and self.loss_type in BY_ROWS | BY_TOKENS

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = self._drpo_loss(model, inputs) if self.recipe.loss else super()._compute_loss(model, inputs)
        if "share" in inputs:
            loss = loss * inputs["share"]
            # TRL's entropy covers only the rows in the micro-batch; this covers all rows.
            assert self.newest is not None
            self._metrics["train"]["entropy"][-1] = float(
                np.mean([h for d in self.newest.drawn for h in compress(d.rollout.entropies or (), d.rollout.written)])
            )
        self._note_gap(inputs)
        if self.recipe.switch:
            loss = loss + self._switch_loss(model, inputs, self.recipe.switch)
        if not torch.isfinite(loss):
            raise NonFiniteError(f"The loss of step {self.state.global_step} is {loss.item()}{self._culprit([inputs])}.")
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._log_probs = outputs[0].detach()
        return outputs

    def _note_gap(self, inputs: Mapping[str, Any]) -> None:
        """Log how far the log-probabilities of the same tokens differ between sampling and training, in nats per token.

        A token's difference is its log-probability in sampling minus that in training, both with the same weights. Two columns are logged:

        * ``sampler/kl``: the mean difference, an estimate of KL(sampler || trainer).
        * ``sampler/gap``: the mean absolute difference.

        In exact arithmetic both would be 0. They show rounding, or that the engine samples in another dtype. They are logged only until the
        first update with the batch, since the policy changes then. With top-k or top-p they are not logged, since these sample from another
        distribution.
        """
        sampled, a = inputs.get("sampling_per_token_logps"), self.args
        # True after the first update with a generation, when the policy is no longer the one that sampled.
        moved = self._step % (a.steps_per_generation * self.num_iterations) >= a.gradient_accumulation_steps
        if sampled is None or moved or a.top_k or a.top_p < 1:  # truncated sampling has another distribution
            return
        assert self._log_probs is not None
        gap = (sampled - self._log_probs)[written_mask(inputs).bool()]
        if len(gap):
            self._metrics["train"]["sampler/kl"].append(gap.mean().item())
            self._metrics["train"]["sampler/gap"].append(gap.abs().mean().item())

    def _drpo_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Return DRPO's loss of one micro-batch (see ``losses.DRPO``), divided by the number of micro-batches per optimizer step."""
        form = self.recipe.loss
        assert form is not None
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask, keep = written_mask(inputs), inputs["completion_ids"].shape[1]
        # [rows, response tokens] each.
        new, entropies, _ = self._get_per_token_logps_and_entropies(
            model, ids, torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1), keep, compute_entropy=True
        )
        tokens = mask.sum(dim=1)
        means = (new * mask).sum(dim=1) / tokens.clamp(min=1)
        capacity = form.capacity or self.max_completion_length
        objective = drpo_objective(means, inputs["correct"], tokens, inputs["group"], replace(form, capacity=capacity))
        # Without recorded values the policy is still the one that sampled, so KL is 0.
        old = inputs.get("old_per_token_logps")
        old = new.detach() if old is None else old
        loss = -objective + kl_hinge(new, old, mask, form)
        self._metrics["train"]["kl"].append(kl_estimate(new.detach(), old, mask).item())
        self._metrics["train"]["entropy"].append(((entropies * mask).sum() / mask.sum().clamp(min=1)).item())
        return loss / self.current_gradient_accumulation_steps

    def _switch_loss(self, model: Any, inputs: dict[str, Any], form: ModeSwitch) -> Tensor:
        """Return one micro-batch's part of the mode-switching loss, which ``losses.ModeSwitch`` defines.

        The parts of all micro-batches of an optimizer step add up to the loss of the step: the mean over its problems. The responses to a
        problem may be spread over several micro-batches. The problem's weight in each part is then the share of its responses that the
        micro-batch holds.
        """
        # For each group in the micro-batch: ``first`` is the index of its first row, ``rows`` the number of its rows.
        _, first, rows = np.unique(inputs["group"].cpu().numpy(), return_index=True, return_counts=True)
        ids, mask, prefer = (inputs[name][first.tolist()] for name in ("plain_ids", "plain_mask", "prefer"))
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits[:, -1]
        assert self._begins is not None
        hinge = switch_hinge(logits, prefer, self._begins, form)
        # A group may be spread over several micro-batches; each part counts by its number of rows. ``generation`` is the number of rows
        # that this process uses per optimizer step.
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
        """Find the response whose loss or gradient is NaN or infinite, and return the end of an error message that names it.

        Each row (response) of the micro-batches ``parts`` is run as a batch of its own. The message names the first row whose loss or
        gradient is not finite. If there is none, the message says so.
        """
        weights = [w for w in self.model.parameters() if w.requires_grad]
        for part in parts:
            for i, row in enumerate(part["row"].tolist()):
                one = {k: v[i : i + 1] if torch.is_tensor(v) and v.ndim else v for k, v in part.items()}
                with torch.enable_grad():
                    loss = super()._compute_loss(self.model, one)
                    grads = torch.autograd.grad(loss, weights, allow_unused=True)
                if not all(torch.isfinite(value).all() for value in (loss, *grads) if value is not None):
                    return f", from {describe_rollout(self.newest.drawn[row])}" if self.newest else ""
        return "; no sample alone causes it"


def learn_in_fp32(model: Any) -> None:
    """Convert every trainable weight to fp32, in place. In bfloat16, most updates are so small that rounding would remove them."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def _rollouts(prompts: list, trainer: Any) -> dict[str, list]:
    """Return token ids and log-probabilities of the rollouts that the trainer's sampler has just sampled.

    TRL calls this function, as its ``rollout_func``, to sample responses to ``prompts``. The trainer has sampled them before this call, so
    the function only passes them on, and does not use ``prompts``.
    """
    drawn = [d.rollout for d in trainer._drawn or []]
    return {
        "prompt_ids": [list(r.token_ids[: r.prompt_len]) for r in drawn],
        "completion_ids": [list(r.token_ids[r.prompt_len :]) for r in drawn],
        "logprobs": [list(r.logprobs or ()) for r in drawn],
        # TRL's name of the mask that leaves tokens of tool results out of the loss.
        **({"env_mask": [[int(own) for own in r.written] for r in drawn]} if trainer.extras.tools else {}),
    }


def _named_reward(name: str) -> Callable[..., list[float | None]]:
    """Return a placeholder for the reward function that TRL requires. TRL uses its name in the log and never calls it here."""

    def reward(**columns: Any) -> list[float | None]:
        raise NotImplementedError("Rewards are computed over the whole batch in Trainer._calculate_rewards.")

    reward.__name__ = name
    return reward
