"""Train a model with GRPO from start to end: ``train(lm, recipe, problems, run) -> Trained``. ``resume=True`` continues a killed run.

Files in a run's directory:

* ``log.jsonl``: the log, one line per optimizer step; a finished run adds the same table as ``log.parquet``.
* ``checkpoint-N``: ordinary Hugging Face folders, with the states of optimizer, scheduler, random numbers and reward. N is the step.
* ``conciseness.json``: the head that scores conciseness, only for rewards that read such scores, as CRF does (see ``judge``).
* ``model`` and, with an adapter, ``adapter``; or ``vector``: the result, written by a finished run (see ``saved``).
* Files of the tracker, if ``Extras.track`` names one (see ``tracking``).

Precision. Trained weights are fp32, whatever dtype the model was loaded in. At a usual learning rate, one AdamW step changes a weight by
less than half the distance to the next bfloat16 number, so most bfloat16 weights would never change. A model that was loaded in bfloat16
samples and trains under autocast to bfloat16.

Rollouts are sampled from the weights in training, without a copy. Sampling and training may still give a token different
log-probabilities. The columns ``sampler/kl`` and ``sampler/gap`` of the log show how much they differ. The held-out results in the last row
of the log are those of the saved model.

Memory, in bytes per weight of the model, besides activations:

* 16 for the weights in training: 4 each for weight, gradient and Adam's two moments. If only a
  part is trained: 2 (bfloat16) or 4 (fp32) for each frozen weight instead, plus 16 for each weight of the part.
* 2 for a bfloat16 copy of the weights, under autocast.
* 2 (bfloat16) or 4 (fp32) for the initial model, which stays in memory.
* 4 for a reference model, if TRL's ``beta`` (the weight of its KL term) is not 0.

To use less, set ``Run.overrides``. ``{"gradient_checkpointing": True}`` saves activations; ``{"optim": "adamw_bnb_8bit"}`` stores Adam's
moments in 1 byte each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers.trainer import TRAINER_STATE_NAME

try:
    from trl import GRPOConfig
except ImportError as error:
    raise ImportError("Training needs TRL: pip install 'reasoning-length-toolkit[rl]'.") from error

from toolkit import finetune, generate, store, templates
from toolkit import identity as identities
from toolkit.engines import OWN_LOOP, CannotSampleError, Engine, OwnLoop
from toolkit.generate import Sampling
from toolkit.grpo import code, draws, judge, log, parts, saved, tracking
from toolkit.grpo.batching import depends_on_parts
from toolkit.grpo.extras import Extras
from toolkit.grpo.recipes import Recipe
from toolkit.grpo.resuming import EARLIER, STATE, last_checkpoint, remove_old, state_of, step_of
from toolkit.grpo.saved import MODEL as MODEL
from toolkit.grpo.trainer import Trainer
from toolkit.lm import LM, Condition
from toolkit.rewards import RewardBatch
from toolkit.types import Ask, Problem

KWARGS = "chat_template_kwargs"  # TRL's name for the switches of a chat template
TOKENIZED = 1024  # number of prompts that ``check_context`` tokenizes at a time
PROBED = 8  # number of problems that ``probe`` samples
OWNED = {
    "output_dir": "--out",
    "max_steps": "--steps",
    "num_train_epochs": "--steps",
    "seed": "--seed",
    "data_seed": "--seed",
    "shuffle_dataset": "--seed, which sets the order of problems",
    "resume_from_checkpoint": "--resume",
    "save_steps": "--save-every",
    "save_strategy": "--save-every",
    "save_only_model": "--save-every (a checkpoint without the optimizer's state cannot be resumed)",
    "per_device_train_batch_size": "--micro-batch",
    "gradient_accumulation_steps": "--micro-batch and updates",
    "steps_per_generation": "--micro-batch and updates",
    "generation_batch_size": "problems and samples",
    "num_generations": "samples",
    "max_completion_length": "max_tokens",
    "logging_steps": "the log, which has one line per step",
    "logging_strategy": "the log, which has one line per step",
    "bf16": "--dtype bfloat16",
    "use_cpu": "--device cpu",
    "report_to": "--track",
}
"""Field of TRL's ``GRPOConfig`` that may not be set directly -> the command-line option or recipe field to set instead.

For the ``logging_...`` fields there is nothing to set.
"""


@dataclass(frozen=True)
class Run:
    """Settings of one training run: length, seed, directory, evaluation.

    Attributes:
        out: Directory of the run.
        steps: Number of optimizer steps.
        seed: Seed of the order of problems and of every rollout.
        save_every: Optimizer steps between checkpoints, rounded up to a multiple of the recipe's ``updates``. Only the newest two
            checkpoints stay on disk.
        held_out: Held-out problems on which the policy is evaluated; empty for no evaluation.
        evaluate_every: Optimizer steps between evaluations; 0 for no evaluation.
        evaluate: Sampling settings of the evaluation.
        evaluation_engine: Engine that samples the responses of the saved model for the last evaluation. If it is not the toolkit's own
            loop, it also samples the responses of the initial model before the first step. In the evaluations between, the toolkit samples
            from the policy in training. An engine other than the toolkit's own loop needs a run that trains an adapter, since it gets the
            trained weights as an adapter.
        micro_batch: Largest number of rows (responses) in each forward/backward pass, on each process. It does not change the result of a
            step, with two exceptions. DRPO's loss has a KL term that is computed for each micro-batch separately; it matters if a batch of
            responses is used for several optimizer steps. TRL computes the loss ``bnpo``, an entropy bonus, ``top_entropy_quantile`` and
            the balance between a mixture's experts for each micro-batch separately (``batching.depends_on_parts``).
        overrides: Fields of TRL's ``GRPOConfig`` by name; they override the recipe's. Fields named in ``OWNED`` are refused.
        save_dtype: Dtype of the saved model. A dtype narrower than fp32 rounds the trained weights; the rounding error is printed, and
            saved in ``model/grpo.json``.
    """

    out: Path
    steps: int = 100
    seed: int = 0
    save_every: int = 20
    held_out: tuple[Problem, ...] = ()
    evaluate_every: int = 10
    evaluate: Sampling = Sampling(n=4, max_new_tokens=200)
    evaluation_engine: Engine = OWN_LOOP
    micro_batch: int = 32
    overrides: Mapping[str, Any] = field(default_factory=dict)
    save_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Trained:
    """A trained model and its log.

    Attributes:
        policy: The trained policy. If vectors were trained, it is the initial model with the steering along them; else a new model. In the
            main process it was saved and read back from disk. In other processes it is the policy in memory, in fp32, without the rounding
            to ``Run.save_dtype``.
        log: One row per optimizer step; row 0 describes the model before training. ``measures`` describes the columns. Empty in processes
            other than the main one.
        main: True in the main process, which writes the files.
    """

    policy: Condition
    log: pd.DataFrame
    main: bool = True

    @property
    def lm(self) -> LM:
        """The model of the policy. If vectors were trained, it is the initial model, and ``policy.during`` holds their steering."""
        return self.policy.lm


def arguments(lm: LM, recipe: Recipe, run: Run) -> Any:
    """Return TRL's config for a recipe and a run.

    A generation (a batch of responses sampled at once) has ``recipe.problems * recipe.samples`` responses over all processes. It is used
    for ``recipe.updates`` optimizer steps. ``run.micro_batch`` does not change these two numbers.

    Raises:
        ValueError: a generation cannot be split into micro-batches of at most ``run.micro_batch`` rows; the model is in float16;
            ``recipe.config`` or ``run.overrides`` sets a field named in ``OWNED``, or ``chat_template_kwargs``; or TRL refuses the config.
    """
    check_free({**recipe.config, **run.overrides})
    if lm.model.dtype == torch.float16 or run.overrides.get("fp16"):
        raise ValueError(
            f"{lm.name} would be trained in float16, in which gradients underflow to zero: load it in bfloat16 or float32 (--dtype) and leave fp16 unset."
        )
    if KWARGS in {**recipe.config, **run.overrides}:
        raise ValueError(
            f"{KWARGS} would change TRL's prompts but not ours: set the template's switches when loading the model, with "
            "--template NAME=JSON or lm.load(..., template={...})."
        )
    # ``rows``: responses per generation, over all processes. ``micro``: rows per micro-batch, never more than one optimizer step has.
    _, world = process_of(run)
    rows = recipe.problems * recipe.samples
    micro = max(1, min(run.micro_batch, rows // (world * recipe.updates)))
    if rows % (micro * world * recipe.updates):
        raise ValueError(
            f"{recipe.problems} problems x {recipe.samples} samples = {rows} responses, used in {recipe.updates} updates, cannot be split "
            f"into micro-batches of {micro} on {world} processes: choose another micro_batch."
        )
    uses = _uses(recipe, run)
    fields = {
        "output_dir": str(run.out),
        "max_steps": run.steps,
        "seed": run.seed,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": rows // (micro * world * recipe.updates),
        "steps_per_generation": rows // (micro * world),
        "num_generations": recipe.samples,
        "max_completion_length": recipe.max_tokens,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "constant",
        "save_steps": math.ceil(run.save_every / uses) * uses,  # never in the middle of a generation
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,  # TRL's default is True, which only costs time if the model fits
        "bf16": lm.model.dtype == torch.bfloat16,
        "use_cpu": lm.device.type == "cpu",
        "dataloader_pin_memory": lm.device.type != "cpu",
        KWARGS: templates.without_date(lm.switches),  # the trainer's tokenizer has the date
        **recipe.config,
        **run.overrides,
    }
    return GRPOConfig(**fields)


def _uses(recipe: Recipe, run: Run) -> int:
    """Return the number of optimizer steps for which a generation is used: the recipe's updates, times TRL's ``num_iterations``."""
    return recipe.updates * {"num_iterations": 1, **recipe.config, **run.overrides}["num_iterations"]


def process_of(run: Run) -> tuple[int, int]:
    """Return ``(index, number)`` for this process: its index among the processes that train together, and their number.

    The main process has index 0. Both values come from accelerate, through a TRL config that is made for this purpose. The config needs a
    directory: ``run.out``. Nothing else of ``run`` is used.
    """
    config = GRPOConfig(str(run.out), bf16=False, report_to="none")
    return config.process_index, config.world_size


def check_free(settings: Iterable[str]) -> None:
    """Raise ValueError if ``settings`` contains a name in ``OWNED``: a field of TRL's config that may not be set directly."""
    if taken := sorted(set(settings) & set(OWNED)):
        raise ValueError(f"{taken[0]} cannot be set for TRL alone: it follows from the run. Use {OWNED[taken[0]]} instead.")


def train(
    lm: LM,
    recipe: Recipe,
    problems: Sequence[Problem],
    run: Run,
    *,
    extras: Extras = Extras(),
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Trained:
    """Train a copy of ``lm``, save it, and return it with its log; ``lm`` itself is unchanged.

    Args:
        lm: The initial model.
        recipe: Reward, loss and other settings of the method.
        problems: Training problems.
        run: Length, seed, directory and evaluation of this run.
        extras: Parts of the run that the recipe does not set, such as your own reward or the part to train. A reward with a state is
            copied, so that yours does not change and can be passed again. Checkpoints hold the state of the copy.
        resume: True to continue from the last complete checkpoint in ``run.out``, or to start anew if there is none.
        say: Function that is called with one line at a time: progress, alarms, a warning if all responses of the initial model to some
            training problems are correct, and the rounding error of the saved model.

    Raises:
        ValueError: the settings cannot be combined, a prompt is too long, no response of the initial model is better than another (see
            ``Trainer``, ``check_context``, ``probe``), a reward with a state cannot be copied, or the checkpoint is in the middle of a batch of
            responses or has more than ``run.steps`` steps. Raised before training.
        engines.EngineError: ``run.evaluation_engine`` cannot sample responses of the initial model, or will not be able to sample those of
            the trained one (see ``check_evaluation``). Raised before training.
        UnsupportedModelError: the weights are quantised or offloaded.
        FileExistsError: ``run.out`` already holds a run and ``resume`` is False.
        store.StoreError: another process is training into ``run.out``.
        store.WrongModelError: the heads to train were chosen for another model. Or ``resume`` is True, but the run in ``run.out`` has another model, recipe, seed, problem set, reward or column,
            was begun with a different version of the code, or is to have another number of steps although its learning rate depends on it.
        checks.NonFiniteError: a reward, loss or gradient is NaN or infinite; the message names the step and, if known, the response.
    """
    finetune.check_trainable(lm)
    parts.check_model(extras.train, lm)
    args = arguments(lm, recipe, run)
    check_context(lm, problems, args.max_completion_length, recipe, run.steps)
    check_evaluation(lm, run, extras)
    with finetune.training_lock(run.out) if args.process_index == 0 else nullcontext():
        # Settings that a checkpoint must share to be resumed, checked before anything is written.
        identity = {**policy_identity(lm, recipe, problems), **_training_identity(recipe, run, extras, lm.model.config)}
        checkpoint = _begin(run.out, identity, resume)
        if checkpoint:
            _check_whole(checkpoint, _uses(recipe, run))
            _check_steps(checkpoint, run.steps)
        store.writable(run.out)
        extras = replace(extras, reward=_own_reward(extras.reward))
        extras = judge.with_judge(lm, recipe, problems, extras, run.out, run.seed, say)
        copy = replace(lm, model=deepcopy(lm.model))
        trainer = Trainer(copy, recipe, problems, args, replace(extras, callbacks=()), identity)
        recorder = log.Recorder(
            run.held_out,
            run.evaluate,
            run.evaluate_every,
            run.out / log.LOG,
            say,
            trainer.sampler.rollouts,
            lm,
            run.evaluation_engine,
            extras.tools,
        )
        for callback in (recorder, *extras.callbacks):
            trainer.add_callback(callback)
        main = trainer.is_world_process_zero()
        if main:
            store.remove(saved.folder_of(run.out, extras.train))  # left by an earlier run with fewer steps, which is now resumed
            remove_old(run.out, args.save_total_limit)  # a killed process may have left a half-removed checkpoint
        done = step_of(checkpoint) if checkpoint else -1
        if checkpoint is None:
            if hasattr(trainer.reward, "warning") and (text := trainer.reward.warning(recipe.samples)):
                say(text)
            probe(trainer, say)
        else:
            _restore_reward(trainer, checkpoint)
            if main:
                recorder.resume(done)
        with tracking.opened(extras.track if main else None, run.out, done + 1) as recorder.note:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            (longer,) = broadcast_object_list([parts.length_change(recorder.rows)])
            if not main:
                return Trained(saved.in_memory(lm, trainer, longer), pd.DataFrame(), main)
            about = {"recipe": recipe, **_facts(run, extras), "dtype": str(lm.model.dtype).removeprefix("torch.")}
            policy = saved.save_policy(trainer, recorder, run.out, run.save_dtype, about)
        return Trained(policy, pd.DataFrame(recorder.rows), main)


def _own_reward(reward: Any) -> Any:
    """Return a copy of a reward that changes during training. A reward without a state never changes, and is returned as it is."""
    if not hasattr(reward, "state_dict"):
        return reward
    try:
        return deepcopy(reward)
    except Exception as error:  # a field that cannot be copied may raise anything
        raise ValueError(
            f"The reward {reward.name!r} has a state, which training changes, and it cannot be copied ({error}): give its class a method "
            "__deepcopy__, or leave out the field that cannot be copied, such as a lock or an open file."
        ) from error


def _restore_reward(trainer: Trainer, checkpoint: Path) -> None:
    """Load the state of a reward that changes during training from a checkpoint; do nothing for other rewards."""
    state = state_of(checkpoint)["reward"]
    if not state:
        return
    try:
        trainer.reward.load_state_dict(state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise store.DamagedFileError(
            f"{checkpoint / STATE}: its field 'reward' is not a state of {trainer.reward.name}: {str(error)[:100]}. {EARLIER}"
        ) from error


def policy_identity(lm: LM, recipe: Recipe, problems: Sequence[Problem]) -> dict[str, Any]:
    """Return a JSON dict that identifies a policy's initial model, recipe and training problems.

    It is part of the policy's cache key. It is also saved in checkpoints: a run with another model, recipe or problem set may not resume.
    """
    return {
        **identities.of_lm(lm),
        "recipe": json.loads(json.dumps(asdict(recipe), default=store.jsonable)),
        "problems": identities.of_problems(problems),
    }


def micro_batch_counts(recipe: Recipe, overrides: Mapping[str, Any], config: Any = None) -> bool:
    """Return True if the size of a micro-batch can change the result of training.

    DRPO's KL term is computed over one micro-batch; so are some terms of TRL's losses (``batching.depends_on_parts``).

    Args:
        recipe: Recipe of the run.
        overrides: Fields of TRL's ``GRPOConfig`` that override the recipe's.
        config: Config of the model; ``None`` for a model without experts.
    """
    return recipe.loss is not None or depends_on_parts({**recipe.config, **overrides}, config)


def _training_identity(recipe: Recipe, run: Run, extras: Extras, config: Any = None) -> dict[str, Any]:
    """Return a dict of further settings that must be the same when a run is resumed, such as seed, reward and code.

    ``policy_identity`` returns the others: initial model, recipe and training problems. Fields of a reward or of the part to train that cannot
    be hashed by their value are left out. The number of steps is included if the learning rate of a step depends on it.
    """
    plugged = {"reward": extras.reward, "train": extras.train}
    keys = {name: None if value is None else store.key(identities.of(value, strict=False).body) for name, value in plugged.items()}
    columns = {name: _function_key(function) for name, function in extras.columns.items()}
    return {
        "seed": run.seed,
        "overrides": {k: str(v) for k, v in run.overrides.items()},
        "engine": extras.engine,
        "code": store.key(code.modules(recipe, reward=extras.reward)),
        **keys,
        **({"micro_batch": run.micro_batch} if micro_batch_counts(recipe, run.overrides, config) else {}),
        **({"tools": identities.describe_tools(extras.tools)} if extras.tools else {}),
        **({"columns": columns} if columns else {}),
        **({"steps": run.steps} if _rate_depends_on_steps({**recipe.config, **run.overrides}) else {}),
    }


def _function_key(function: Any) -> str:
    """Return a hash of a function or callable object, with the code of the toolkit's modules that it uses."""
    identity = identities.of(function, strict=False)
    return store.key([identity.body, store.modules_of(*sorted(identity.modules))])


def _rate_depends_on_steps(settings: Mapping[str, Any]) -> bool:
    """Return True if the learning rate of a step depends on the number of steps of the run, as in a linear or cosine schedule.

    Args:
        settings: Fields of TRL's ``GRPOConfig`` by name. A missing schedule means the toolkit's, which is constant.
    """
    schedule = settings.get("lr_scheduler_type", "constant")
    if schedule == "constant_with_warmup":  # a warmup may be given as a share of all steps
        return bool(settings.get("warmup_ratio")) or 0 < (settings.get("warmup_steps") or 0) < 1
    return schedule != "constant"


def _facts(run: Run, extras: Extras) -> dict[str, Any]:
    """Return seed, steps, overrides, engine, part and tools of the run as a dict; ``grpo.json`` records them with the trained policy."""
    settings = {name: str(value) for name, value in run.overrides.items()}
    return {
        "seed": run.seed,
        "steps": run.steps,
        "overrides": settings,
        "engine": extras.engine,
        "evaluation": dict(run.evaluation_engine.header),
        "train": parts.describe(extras.train),
        **({"tools": identities.describe_tools(extras.tools)} if extras.tools else {}),
    }


def _begin(out: Path, identity: Mapping[str, Any], resume: bool) -> Path | None:
    """Return the checkpoint to resume from, or ``None`` to start anew.

    If ``resume`` is True but the directory holds no complete checkpoint, the earlier run was killed before its first checkpoint. Its log is
    then removed. A run that starts anew also trains a conciseness judge anew: a saved one may be that of another model or of other
    problems.

    Args:
        out: The run's directory.
        identity: Settings that must be the same when the run is resumed, such as model, recipe and seed.
        resume: True to resume if a checkpoint exists.

    Raises:
        FileExistsError: the directory holds a run and ``resume`` is False.
        store.WrongModelError: the newest checkpoint was written by a run with another ``identity``.
    """
    if not resume:
        if (out / log.LOG).exists() or last_checkpoint(out):
            raise FileExistsError(f"{out} holds a run already: resume it, or choose another directory.")
        store.remove(out / judge.FILE)
        return None
    checkpoint = last_checkpoint(out)
    if checkpoint is None:
        store.remove(out / log.LOG)
        store.remove(out / judge.FILE)
        return None
    store.read_json(checkpoint / TRAINER_STATE_NAME, {"global_step": int}, remedy=EARLIER)
    before = state_of(checkpoint)["identity"]
    # Through JSON, as the saved identity went, so that tuples equal lists.
    now = json.loads(json.dumps(identity, default=store.jsonable))
    differing = sorted(k for k in {*now, *before} if now.get(k) != before.get(k))
    if differing:
        saved_values, new_values = (str({k: side.get(k) for k in differing})[:100] for side in (before, now))
        raise store.WrongModelError(
            f"{checkpoint} belongs to another run, which differs in {', '.join(differing)}: {saved_values} there, {new_values} now. Resume "
            "it with the same settings, or choose another directory."
        )
    return checkpoint


def _check_whole(checkpoint: Path, uses: int) -> None:
    """Raise ValueError if a checkpoint is in the middle of a generation: a resumed run would use all of its responses again.

    The last checkpoint of a finished run is, if the number of steps is not a multiple of ``uses``. transformers would add a step even if
    none is left.

    Args:
        checkpoint: Checkpoint to resume from.
        uses: Number of optimizer steps for which a generation is used.
    """
    if (done := step_of(checkpoint)) % uses:
        raise ValueError(
            f"{checkpoint} is in the middle of a batch of responses, which is used for {uses} steps: {done} is not a multiple of {uses}, so "
            f"the run cannot go on from it. {EARLIER} To be able to go on later, end a run at a multiple of {uses} steps."
        )


def _check_steps(checkpoint: Path, steps: int) -> None:
    """Raise ValueError if a checkpoint has more optimizer steps than the run is to have: its model would be saved as one of fewer steps."""
    if (done := step_of(checkpoint)) > steps:
        raise ValueError(
            f"{checkpoint} has {done} steps, and the run is to end after {steps}: give at least {done} steps, or choose another directory."
        )


def check_evaluation(lm: LM, run: Run, extras: Extras) -> None:
    """Check that ``run.evaluation_engine`` can sample responses of the initial model, and will be able to sample those of the trained one.

    The toolkit's own loop always can. Nothing is checked if the run has no evaluations.

    Raises:
        engines.EngineError: the engine cannot sample the initial model's responses, or cannot answer its tool calls; or it is not the toolkit's own loop and either
            ``extras.train`` is not an adapter or the engine cannot load an adapter while it runs.
    """
    engine = run.evaluation_engine
    if isinstance(engine, OwnLoop) or not (run.held_out and run.evaluate_every):
        return
    condition = Condition(lm, tools=extras.tools)
    engine.check(condition, run.evaluate)
    engine.check_edits()
    if not parts.is_adapter(extras.train):
        raise CannotSampleError(
            f"{engine.name} can be given nothing but a trained adapter: train one (--train adapter), or leave out --engine and judge the "
            "trained model with toolkit compare while a server serves it."
        )
    if not engine.takes_adapters:
        raise CannotSampleError(
            f"{engine.name} cannot load an adapter while it runs: use vLLM or SGLang, or leave out --engine and judge the trained model with "
            "toolkit compare while a server serves it."
        )
    generate.begin_session(condition, run.held_out, run.evaluate, engine)


def check_context(lm: LM, problems: Sequence[Problem], max_tokens: int, recipe: Recipe | None = None, steps: int = 1) -> None:
    """Raise ValueError if there is no problem, or if the longest prompt plus ``max_tokens`` tokens do not fit the model's context.

    All prompts are tokenized, with the texts that the recipe adds to them. A curriculum states a token budget that falls during training;
    only the longest of these texts, in tokens, is tried.

    Args:
        lm: The initial model.
        problems: Training problems.
        max_tokens: Largest number of tokens of a response.
        recipe: Recipe whose modes or curriculum add text to the prompts; ``None`` adds none.
        steps: Number of optimizer steps of the run.
    """
    if not problems:
        raise ValueError("No problems to train on: the list is empty.")
    context = lm.context
    if not context:
        return
    longest, width = "", 0
    for ask in _prompt_changes(lm, recipe, steps):
        for start in range(0, len(problems), TOKENIZED):
            part = problems[start : start + TOKENIZED]
            texts = [lm.prompt_text(draws.prompted_messages(p, ask)) for p in part]
            for p, ids in zip(part, lm.tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
                longest, width = (p.id, len(ids)) if len(ids) > width else (longest, width)
    if width + max_tokens > context:
        raise ValueError(
            f"The longest prompt ({longest!r}) has {width} tokens; with max_completion_length={max_tokens} it does not fit the context of "
            f"{context}. Lower max_completion_length or leave that problem out."
        )


def _prompt_changes(lm: LM, recipe: Recipe | None, steps: int) -> list[Ask | None]:
    """Return functions that add a recipe's texts to a prompt, for a check of prompt lengths; ``None`` stands for unchanged prompts.

    A curriculum states a token budget that falls during training, so it may have as many texts as there are steps. Only the function of
    the longest text, in tokens, is returned.
    """
    if recipe is not None and recipe.modes is not None:
        return [recipe.modes.ask(mode) for mode in draws.MODES]
    if recipe is None or recipe.curriculum is None:
        return [None]
    budgets = dict.fromkeys(recipe.curriculum.at(step) for step in range(max(1, steps)))
    texts = [recipe.curriculum.text.format(budget=budget) for budget in budgets]
    sizes = [len(ids) for ids in lm.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return [draws.AppendedText(texts[sizes.index(max(sizes))])]


def probe(trainer: Trainer, say: Callable[[str], None]) -> None:
    """Sample responses to up to 8 problems before training; check that the reward can be computed and that there is something to learn.

    Every process samples; the responses of all are counted. The reward's state does not change.

    Args:
        trainer: The trainer, before its first step.
        say: Function that is called with a warning if all responses are correct, or if none is and the reward reads correctness.

    Raises:
        rewards.MissingColumnError: the reward reads a column that neither the rollouts nor ``Extras.columns`` supply.
        ValueError: no response is correct, and the rewards of the responses to each problem are equal, so there is nothing to reinforce.
    """
    samples = trainer.args.num_generations
    few = list(trainer.problems)[:PROBED]
    drawn = trainer.sampler.draw([i for i in few for _ in range(samples)])
    # The toolkit's sampler draws this probe even if TRL samples in training. TRL returns tokens only, so the rest is removed.
    if trainer.extras.engine == "trl":
        bare = [replace(d.rollout, logprobs=None, entropies=None) for d in drawn]
        drawn = [replace(d, rollout=r, logprob_without=None) for d, r in zip(drawn, bare, strict=True)]
    local, drawn = drawn, list(gather_object(drawn))
    batch = trainer.batch_of(drawn, local, 0, "eval")
    batch.check(trainer.reward)
    right = sum(d.rollout.correct for d in drawn)
    if not right:
        _check_wrong_responses(trainer, batch, len(few), say)
    if right == len(drawn):
        say(f"all {len(drawn)} responses of a first probe are correct: a reward for correctness alone will not change this model")


def _check_wrong_responses(trainer: Trainer, batch: RewardBatch, problems: int, say: Callable[[str], None]) -> None:
    """Raise ValueError if none of the wrong responses of a probe earns more than another response to the same problem.

    Some rewards do not read correctness, such as those of an open question's checklist: their problems have no right answer.

    Args:
        trainer: The trainer, before its first step.
        batch: The responses of the probe.
        problems: Number of their problems.
        say: Function that is called with a warning if the reward reads correctness, and yet varies.
    """
    learnt_from_right = trainer.recipe.loss or trainer.recipe.token_advantage  # both learn only from problems with a right response
    values = np.asarray(trainer.reward(batch).values)
    varies = any(draws.Dynamic.keeps(values[batch.groups == group]) for group in np.unique(batch.groups))
    if learnt_from_right or not varies:
        raise ValueError(
            f"None of {len(batch)} responses to {problems} training problems is correct: there is nothing to reinforce. Give easier problems, "
            f"more than {trainer.max_completion_length} tokens, or a model that solves some."
            if learnt_from_right or "correct" in trainer.reward.needs
            else f"The reward {trainer.reward.name!r} gives the {len(batch)} responses to {problems} training problems the same value within each "
            f"problem: there is nothing to reinforce. Give other problems, more than {trainer.max_completion_length} tokens, or another reward."
        )
    if "correct" in trainer.reward.needs:
        say(
            f"none of {len(batch)} responses of a first probe is correct: the reward {trainer.reward.name} only tells wrong ones apart"
        )
