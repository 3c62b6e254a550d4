"""Training from start to end: ``train(lm, recipe, problems, run) -> Trained``; killed at any moment, ``resume=True`` goes on.

A run's directory holds ``log.jsonl`` (one line a step), ``checkpoint-N`` (ordinary Hugging Face folders with the optimizer's, the
scheduler's, the random numbers' and the reward's state), for CRF its judge, and, once finished, ``log.parquet``, ``model`` and, after
LoRA, ``adapter`` (see ``saved``).

Precision. Weights that are trained are fp32, whatever the model was loaded in: AdamW at a usual learning rate moves a weight by less
than bfloat16 can hold. A model loaded in bfloat16 runs forward and backward, and samples, under autocast to bfloat16. Rollouts and
updates see the same policy; the log's ``sampler/kl`` and ``sampler/gap`` say how far their log-probabilities are apart. The last row of
the log judges the saved model.

Memory, bytes per weight: 16 for every weight that is trained (4 each for weight, gradient and Adam's two moments), 2 for a bfloat16 copy
under autocast, 2 (bfloat16) or 4 for the model as given, which stays, 4 for a reference if ``beta`` is not 0. LoRA: 2 (bfloat16) or 4
for the frozen copy, and 16 for each weight of the adapter. ``overrides`` such as ``{"gradient_checkpointing": True}`` and ``{"optim":
"adamw_bnb_8bit"}`` (moments of 1 byte) lower it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers.trainer import TRAINER_STATE_NAME

try:
    from trl import GRPOConfig
except ImportError as error:
    raise ImportError("Training needs TRL: pip install 'reasoning-length-toolkit[rl]'.") from error

from toolkit import identity as identities
from toolkit import store
from toolkit.generate import Sampling
from toolkit.grpo import code, judge, log, saved
from toolkit.grpo.recipes import Recipe
from toolkit.grpo.resuming import EARLIER, STATE, last_checkpoint, state_of
from toolkit.grpo.saved import MODEL as MODEL
from toolkit.grpo.trainer import Extras, Trainer
from toolkit.lm import LM
from toolkit.types import Problem

KWARGS = "chat_template_kwargs"  # TRL's name for the switches of a chat template
PROBED = 8  # problems of the first probe
OWNED = {
    "output_dir": "--out",
    "max_steps": "--steps",
    "seed": "--seed",
    "save_steps": "--save-every",
    "save_strategy": "--save-every",
    "save_only_model": "--save-every (a checkpoint without the optimizer's state cannot be resumed)",
    "per_device_train_batch_size": "--micro-batch",
    "gradient_accumulation_steps": "--micro-batch and updates",
    "steps_per_generation": "--micro-batch and updates",
    "generation_batch_size": "problems and samples",
    "num_generations": "samples",
    "max_completion_length": "max_tokens",
    "logging_steps": "the log as it is, one line per step",
    "logging_strategy": "the log as it is, one line per step",
    "bf16": "--dtype bfloat16",
    "use_cpu": "--device cpu",
}
"""Fields of TRL's ``GRPOConfig`` that follow from a run, a recipe or the model, and what sets them."""


@dataclass(frozen=True)
class Run:
    """How long, from which seed, where to.

    Attributes:
        out: Directory of the run.
        steps: Optimizer steps.
        seed: Seed of the order of problems and of every rollout.
        save_every: Steps between checkpoints; the last two are kept.
        held_out: Problems to judge on.
        evaluate_every: Steps between judgements; 0 for never.
        evaluate: How held-out problems are sampled.
        micro_batch: Rows per forward and backward pass and process. Whole steps are the same whatever it is, except for a recipe with a
            loss of its own (DRPO) and several updates: its KL term is that of one micro-batch.
        overrides: Fields of TRL's ``GRPOConfig`` that win over the recipe's; none of ``OWNED``.
        save_dtype: Number type of the saved model. A narrower one than fp32 rounds what was learned; how much is said and kept.
    """

    out: Path
    steps: int = 100
    seed: int = 0
    save_every: int = 20
    held_out: tuple[Problem, ...] = ()
    evaluate_every: int = 10
    evaluate: Sampling = Sampling(n=4, max_new_tokens=200)
    micro_batch: int = 32
    overrides: Mapping[str, Any] = field(default_factory=dict)
    save_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Trained:
    """A trained model, read back from where it was saved, and the log of its training, one row a step (row 0: before); ``main``:
    whether this process is the one that writes (the others have no log, and the model as it is in memory)."""

    lm: LM
    log: pd.DataFrame
    main: bool = True


def arguments(lm: LM, recipe: Recipe, run: Run) -> Any:
    """TRL's config of a recipe and a run; a generation is ``problems x samples`` responses over all processes,
    used in ``updates`` steps, whatever the micro-batch.

    Raises:
        ValueError: a step cannot be cut into micro-batches of that size, training in float16, a chat template's switch among the
            overrides, one of ``OWNED`` among them, or what TRL refuses.
    """
    check_free({**recipe.config, **run.overrides})
    if lm.model.dtype == torch.float16 or run.overrides.get("fp16"):
        raise ValueError(
            f"{lm.name} would be trained in float16, whose gradients underflow to zero: load it in bfloat16 or float32 (--dtype) and leave "
            "fp16 unset."
        )
    if KWARGS in {**recipe.config, **run.overrides}:
        raise ValueError(
            f"{KWARGS} would hold for TRL's prompts and not for ours: set the template's switches when the model is loaded, "
            "--template NAME=JSON or lm.load(..., template={...})."
        )
    world = GRPOConfig(str(run.out), bf16=False, report_to="none").world_size
    rows = recipe.problems * recipe.samples
    micro = max(1, min(run.micro_batch, rows // (world * recipe.updates)))
    if rows % (micro * world * recipe.updates):
        raise ValueError(
            f"{recipe.problems} problems x {recipe.samples} samples = {rows} responses, used in {recipe.updates} updates, cannot be cut into "
            f"micro-batches of {micro} on {world} processes: choose another micro_batch."
        )
    found = {
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
        "save_steps": math.ceil(run.save_every / recipe.updates) * recipe.updates,  # a generation is not cut in two
        "save_total_limit": 2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,  # TRL's default; on a model that fits it only costs time
        "bf16": lm.model.dtype == torch.bfloat16,
        "use_cpu": lm.device.type == "cpu",
        "dataloader_pin_memory": lm.device.type != "cpu",
        KWARGS: dict(lm.template),
        **recipe.config,
        **run.overrides,
    }
    return GRPOConfig(**found)


def check_free(settings: Iterable[str]) -> None:
    """Raise ValueError if a setting for TRL's config is one that the run, the recipe or the model decides."""
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
    """Train a copy of ``lm``; ``lm`` itself stays as it is.

    Args:
        resume: Go on from the last whole checkpoint in ``run.out``, from the start if there is none.
        say: Told of alarms and of what a first probe finds.

    Raises:
        ValueError: something that cannot work, found before any training: see :class:`Trainer` and :func:`probe`.
        FileExistsError: ``run.out`` holds a run already and ``resume`` is off.
        store.StoreError: another process trains into ``run.out`` now.
        store.WrongModelError: the run in ``run.out`` is of another model, recipe, seed, problem set or reward, or was begun by other code.
        checks.NonFiniteError: a reward, loss or gradient is NaN or infinite; names step and sample.
    """
    args = arguments(lm, recipe, run)
    check_context(lm, problems, args.max_completion_length)
    with _alone(run.out) if args.process_index == 0 else nullcontext():
        return _train(lm, recipe, problems, run, args, extras, resume, say)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Train into a directory as the only run: a second one would remove the first one's log, or write into it."""
    with store.locked(out / ".training") as mine:
        if not mine:
            raise store.StoreError(
                f"Another process is training into {out} now: wait until it is done, or choose another directory."
            )
        yield


def _train(
    lm: LM,
    recipe: Recipe,
    problems: Sequence[Problem],
    run: Run,
    args: Any,
    extras: Extras,
    resume: bool,
    say: Callable[[str], None],
) -> Trained:
    identity = {**who(lm, recipe, problems), **_how(recipe, run, extras)}
    checkpoint = _begin(run.out, identity, resume)
    store.writable(run.out)
    extras = judge.supplied(lm, recipe, problems, extras, run.out, run.seed, say)
    own = replace(lm, model=deepcopy(lm.model))
    trainer = Trainer(own, recipe, problems, args, replace(extras, callbacks=()), identity)
    recorder = log.Recorder(run.held_out, run.evaluate, run.evaluate_every, run.out / log.LOG, say, trainer.sampler.rollouts, lm)
    for callback in (recorder, *extras.callbacks):
        trainer.add_callback(callback)
    main = trainer.is_world_process_zero()
    if main:
        store.remove(run.out / MODEL)  # of fewer steps
    if checkpoint is None:
        probe(trainer, say)
    else:
        state = state_of(checkpoint)["reward"]
        if state:
            try:
                trainer.reward.load_state_dict(state)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise store.DamagedFileError(
                    f"{checkpoint / STATE}: its field 'reward' is no state of {trainer.reward.name}: {str(error)[:100]}. {EARLIER}"
                ) from error
        if main:
            recorder.resume(int(checkpoint.name.rpartition("-")[2]))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not main:
        return Trained(saved.policy_of(lm, trainer), pd.DataFrame(), main)
    about = {"recipe": recipe, **_facts(run, extras), "dtype": str(lm.model.dtype).removeprefix("torch.")}
    policy = saved.keep(trainer, recorder, run.out, run.save_dtype, about)
    return Trained(policy, pd.DataFrame(recorder.rows), main)


def who(lm: LM, recipe: Recipe, problems: Sequence[Problem]) -> dict[str, Any]:
    """What a trained policy belongs to: the model, by what decides its responses, recipe, problems."""
    return {
        **identities.of_lm(lm),
        "recipe": json.loads(json.dumps(asdict(recipe), default=store.jsonable)),
        "problems": identities.of_problems(problems),
    }


def _how(recipe: Recipe, run: Run, extras: Extras) -> dict[str, Any]:
    """What else a checkpoint belongs to. A reward or adapter that is not known by its values counts as far as it is."""
    own = {"reward": extras.reward, "adapter": extras.lora}
    known = {name: None if value is None else store.key(identities.of(value, strict=False).body) for name, value in own.items()}
    return {
        "seed": run.seed,
        "overrides": {k: str(v) for k, v in run.overrides.items()},
        "engine": extras.engine,
        "code": store.key(code.modules(recipe, reward=extras.reward)),
        **known,
        **({"micro_batch": run.micro_batch} if recipe.loss else {}),  # its KL term is that of one micro-batch
    }


def _facts(run: Run, extras: Extras) -> dict[str, Any]:
    """How a model was trained, for those who find it."""
    lora = (
        None if extras.lora is None else {name: getattr(extras.lora, name, None) for name in ("r", "lora_alpha", "target_modules")}
    )
    settings = {name: str(value) for name, value in run.overrides.items()}
    return {
        "seed": run.seed,
        "steps": run.steps,
        "overrides": settings,
        "engine": extras.engine,
        "lora": {k: sorted(v) if isinstance(v, set) else v for k, v in lora.items()} if lora else None,
    }


def _begin(out: Path, identity: Mapping[str, Any], resume: bool) -> Path | None:
    if not resume:
        if (out / log.LOG).exists() or last_checkpoint(out):
            raise FileExistsError(f"{out} holds a run already: resume it, or choose another directory.")
        return None
    found = last_checkpoint(out)
    if found is None:
        store.remove(out / log.LOG)
        return None
    store.read_json(found / TRAINER_STATE_NAME, {"global_step": int}, remedy=EARLIER)
    theirs = state_of(found)["identity"]
    ours = json.loads(json.dumps(identity, default=store.jsonable))
    differing = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
    if differing:
        there, now = (str({k: side.get(k) for k in differing})[:100] for side in (theirs, ours))
        raise store.WrongModelError(
            f"{found} is of another {', '.join(differing)}: {there} there, {now} now. Resume it as it was begun, or choose another directory."
        )
    return found


def check_context(lm: LM, problems: Sequence[Problem], max_tokens: int) -> None:
    """Raises ValueError if the longest prompt leaves no room for a response in the model's context."""
    if not problems:
        raise ValueError("No problems to train on: the list is empty.")
    context = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(problems, key=lambda p: sum(len(str(m["content"])) for m in p.messages))
    width = len(lm.prompt_ids(longest.messages))
    if context and width + max_tokens > context:
        raise ValueError(
            f"The longest prompt ({longest.id!r}) has {width} tokens; with max_completion_length={max_tokens} it does not fit the context of "
            f"{context}. Lower max_completion_length or leave that problem out."
        )


def probe(trainer: Trainer, say: Callable[[str], None]) -> None:
    """Draw a few groups once, before any training, and ask the reward about them (its state is not touched).

    Raises:
        rewards.MissingColumnError: the reward needs a column that nothing supplies.
        ValueError: not one response is correct, so no reward could tell them apart by it.
    """
    samples = trainer.args.num_generations
    few = list(trainer.problems)[:PROBED]
    drawn = trainer.sampler.draw([i for i in few for _ in range(samples)])
    if trainer.extras.engine == "trl":  # TRL's own generation gives tokens only
        bare = [replace(d.rollout, logprobs=None, entropies=None) for d in drawn]
        drawn = [replace(d, rollout=r, logprob_without=None) for d, r in zip(drawn, bare, strict=True)]
    batch = trainer.batch_of(drawn, drawn, 0, "eval")
    batch.check(trainer.reward)
    right = sum(d.rollout.correct for d in drawn)
    if not right:
        raise ValueError(
            f"None of {len(drawn)} responses to {len(few)} training problems is correct: there is nothing to reinforce. Give easier problems, "
            f"more than {trainer.max_completion_length} tokens, or a model that solves some."
        )
    if right == len(drawn):
        say(f"all {len(drawn)} responses of a first probe are correct: correctness alone will not move this model")
