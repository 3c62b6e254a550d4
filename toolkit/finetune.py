"""Supervised fine-tuning: train a copy of a model on given responses, with TRL's ``SFTTrainer``. Needs the extra ``rl``.

    loss = mean over the response tokens of a batch of -log p(token | prompt, earlier tokens)    in nats per token

Prompt tokens are read but not predicted. All weights are trained, in fp32, with AdamW; the learning rate rises during the first tenth of
the steps, then falls linearly to 0.

Several methods begin with this step, such as Ruler, ORION, Adaptive Deep Reasoning and How Much Backtracking. They differ in the responses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from toolkit import checkpoints, origins, progress, store
from toolkit import lm as lms
from toolkit.lm import LM
from toolkit.types import Problem

MODEL, SETTINGS, PASSES = "model", "settings.json", "checkpoints"  # names in a run's directory
assumed_rate, assumed_batch, assumed_decay, assumed_warmup = 1e-3, 32, 0.0, 0.1  # ours: the first suits the shipped tiny models


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt and the response to train on.

    Attributes:
        problem: Id of the problem, so that the trained model is not judged on it.
        prompt: Token ids of the prompt, at least one. They are not predicted.
        response: Token ids of the response with its end-of-sequence token, at least one.
    """

    problem: str
    prompt: Sequence[int]
    response: Sequence[int]


def example(lm: LM, problem: Problem, response: str) -> Example:
    """Return a problem and the text of a response as an example for a model. The response ends with the end-of-sequence token.

    Args:
        lm: The model to train; its chat template and tokenizer are used.
        problem: The problem. If its last message is the assistant's, the response continues that message.
        response: Text of the response, think tags included.
    """
    ids = lm.tokenizer(response, add_special_tokens=False)["input_ids"]
    return Example(problem=problem.id, prompt=lm.prompt_ids(problem.messages), response=[*ids, int(lm.tokenizer.eos_token_id)])


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a fine-tuning run.

    Attributes:
        steps: Number of optimizer steps.
        batch: Number of examples per step.
        rate: Highest learning rate.
        seed: Seed of the order of the examples.
        save_every: Number of steps between checkpoints.
    """

    steps: int
    batch: int = assumed_batch
    rate: float = assumed_rate
    seed: int = 0
    save_every: int = 200


def train(lm: LM, examples: Sequence[Example], settings: Settings, out: str | Path, *, name: str) -> LM:
    """Train a copy of ``lm`` on the examples, save it in ``out/model`` and return it as read from there.

    A run that was stopped goes on from its last checkpoint. If the run is finished, its model is read and returned.

    Args:
        lm: The initial model; it is unchanged.
        examples: Examples to train on. Each pass over them is in another order.
        settings: Number of steps, batch, learning rate and seed.
        out: Directory of the run.
        name: Name of the trained model.

    Raises:
        ValueError: there are no examples, or an example has an empty prompt or response, an id that is not in the vocabulary, or more tokens
            than the model's context.
        UnsupportedModelError: ``trl`` is not installed, or the weights are quantised or offloaded.
        store.StoreError: another process is training into ``out``.
        store.WrongModelError: ``out`` holds a run with another model, other examples or settings, or of another version of the code.
    """
    checkpoints.require("trl", "supervised fine-tuning")
    check_trainable(lm)
    _check(lm, examples)
    identity = {"model": lm.fingerprint, "examples": store.key([asdict(e) for e in examples]), **asdict(settings)}
    out = claimed(out, identity)
    return finished(lm, out, lambda: _trained(lm, examples, settings, out), name, [e.problem for e in examples])


def finished(lm: LM, out: Path, fit: Callable[[], Any], name: str, problems: Iterable[str]) -> LM:
    """Return the trained model that is saved in ``out/model``; if there is none, train and save it first.

    Args:
        lm: The initial model.
        out: Directory of the run, from ``claimed``.
        fit: Function that trains and returns the model.
        name: Name of the trained model.
        problems: Ids of the problems that it is trained on.

    Raises:
        store.StoreError: another process is training into ``out``.
    """
    with training_lock(out):
        if not (out / MODEL).exists():
            policy = lms.child(lm, fit(), name, made_from=(origins.record(problems),))
            policy.save(out / MODEL)
            store.remove(out / PASSES)
    return replace(read_back(lm, out / MODEL), name=name, parent=lm.fingerprint)


def read_back(like: LM, folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> LM:
    """Load a trained model, and return it with the think tags and the chat-template variables (such as ``enable_thinking``) of ``like``.

    Custom code in the model's directory (``trust_remote_code``) runs only if ``like`` was loaded with custom code.

    Args:
        like: The initial model.
        folder: Directory of the trained model.
        dtype: Dtype of the loaded model.
        device: Device to load the model to; ``None`` means that of ``like``.
    """
    custom = type(like.model).__module__.startswith("transformers_modules")
    where = like.device if device is None else device
    return lms.load(folder, dtype=dtype, device=where, tags=like.tags, template=like.template, trust_remote_code=custom)


def check_trainable(lm: LM) -> None:
    """Raise ``UnsupportedModelError`` if the weights of a model are quantised or offloaded: training would not change them."""
    lms.check_plain(lm, "training", "Load the model without quantization and device_map.")


@contextmanager
def training_lock(out: Path) -> Iterator[None]:
    """Return a context manager that locks the directory of a run while its body is executed.

    Two processes that train into one directory would damage each other's files.

    Raises:
        store.StoreError: another process has locked the directory.
    """
    with store.locked(out / ".training") as mine:
        if not mine:
            raise store.StoreError(
                f"Another process is training into {out} now: wait until it is done, or choose another directory."
            )
        yield


def arguments(lm: LM, settings: Any, out: Path) -> dict[str, Any]:
    """Return the arguments that all of TRL's trainers share here. ``settings`` has steps, batch, rate, seed and save_every."""
    return {
        "output_dir": str(out / PASSES),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch,
        "learning_rate": settings.rate,
        "weight_decay": assumed_decay,
        "lr_scheduler_type": "linear",
        "warmup_steps": round(assumed_warmup * settings.steps),
        "seed": settings.seed,
        "save_steps": settings.save_every,
        "save_total_limit": 1,
        "max_length": None,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": lm.device.type == "cpu",
        "dataloader_pin_memory": lm.device.type != "cpu",
    }


def _trained(lm: LM, examples: Sequence[Example], settings: Settings, out: Path) -> Any:
    """Return the trained model in fp32 and evaluation mode."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"input_ids": [*e.prompt, *e.response], "labels": [-100] * len(e.prompt) + [*e.response]} for e in examples]
    config = SFTConfig(**arguments(lm, settings, out))
    trainer = SFTTrainer(deepcopy(lm.model).float(), config, train_dataset=Dataset.from_list(rows), processing_class=lm.tokenizer)
    return trained_by(trainer, out, settings.steps, "fine-tuning")


def trained_by(trainer: Any, out: Path, steps: int, name: str) -> Any:
    """Train with one of TRL's trainers, from its last checkpoint if there is one. Return the model in evaluation mode.

    Args:
        trainer: The trainer, made with ``arguments``.
        out: Directory of the run.
        steps: Number of optimizer steps.
        name: Name of the progress bar.
    """
    from transformers import PrinterCallback, TrainerCallback

    begun = _last_checkpoint(out / PASSES)
    done = int(begun.rpartition("-")[2]) if begun else 0
    with progress.stage(name, steps, "step", initial=done) as stage:

        class Progress(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                stage.update()

        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Progress)
        trainer.train(resume_from_checkpoint=begun)
    return unwrapped(trainer).eval()


def _last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint in a folder, or ``None``. Newer ones that a killed process left incomplete are removed."""
    from transformers.trainer import TRAINER_STATE_NAME  # the file that is written last
    from transformers.trainer_utils import get_last_checkpoint

    newest = get_last_checkpoint(str(folder)) if folder.exists() else None
    if newest is None or (Path(newest) / TRAINER_STATE_NAME).exists():
        return newest
    store.remove(Path(newest))
    return _last_checkpoint(folder)


def unwrapped(trainer: Any) -> Any:
    """Return the model of one of TRL's trainers without the wrappers of TRL and accelerate."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    # accelerate and TRL replace ``forward`` on the object; without these attributes, the method of the class is used again.
    for attribute in ("forward", "_original_forward"):
        model.__dict__.pop(attribute, None)
    return model


def _check(lm: LM, examples: Sequence[Example]) -> None:
    if not examples:
        raise ValueError("There are no examples to train on: give at least one prompt with its response.")
    for example in examples:
        ids = [*example.prompt, *example.response]
        if not example.prompt or not example.response or not all(0 <= i < lm.vocab_size for i in ids):
            raise ValueError(
                f"The example of problem {example.problem} has {len(example.prompt)} prompt and {len(example.response)} response tokens, "
                f"with ids {min(ids, default='none')} to {max(ids, default='none')}: each needs at least one token, and ids from 0 to "
                f"{lm.vocab_size - 1}."
            )
    check_context(lm, [e.problem for e in examples], [len(e.prompt) + len(e.response) for e in examples])


def check_context(lm: LM, problems: Sequence[str], lengths: Sequence[int]) -> None:
    """Raise ValueError if a text to train on is longer than the model's context. Without a context in the config, every text passes.

    Args:
        lm: The model.
        problems: Problem id of each text.
        lengths: Number of tokens of each text, prompt and response together.
    """
    context = lm.context
    long = [n for n, length in enumerate(lengths) if context and length > context]
    if long:
        worst = max(long, key=lengths.__getitem__)
        raise ValueError(
            f"{len(long)} of {len(lengths)} texts to train on are longer than the {context} tokens of {lm.name}'s context. The longest, of "
            f"problem {problems[worst]!r}, has {lengths[worst]} tokens, prompt and response together. Shorten them or leave them out."
        )


def claimed(out: str | Path, identity: dict[str, Any]) -> Path:
    """Return the directory of a run, after its identity is written there, or is found to be the same.

    Args:
        out: The directory; it is made if it does not exist.
        identity: Facts that the result depends on, JSON-serialisable. A key of the code of the training is added.

    Raises:
        store.WrongModelError: the directory belongs to another run.
    """
    out, identity = store.writable(out), {**identity, "training code": store.code_of("toolkit.finetune", "toolkit.preferences")}
    path = out / SETTINGS
    if not path.exists():
        store.write_json(identity, path)
        return out
    before, now = store.read_json(path, dict[str, Any]), json.loads(json.dumps(identity, default=store.jsonable))
    if differing := sorted(k for k in {*before, *now} if before.get(k) != now.get(k)):
        raise store.WrongModelError(
            f"{out} belongs to another run, which differs in {', '.join(differing)}: choose another directory."
        )
    return out
