"""Save a trained policy and read it back. The policy that a run evaluates at the end and returns is the one on disk.

A run writes ``model``, an ordinary Hugging Face directory. With an adapter it also writes ``adapter``, an ordinary PEFT directory in fp32,
which vLLM serves with ``--enable-lora``.

A run that trains vectors writes ``vector`` instead. It holds ``direction.safetensors``, a ``Direction``, and ``grpo.json``. By the sign
convention of directions, adding one makes thinking longer. So if thinking became shorter in training (``parts.length_change``), the saved
direction is minus the trained vectors, and the policy is the initial model steered with strength -1. The strength is in the notes of the
direction's provenance.

``model`` is fp32 unless ``Run.save_dtype`` is another dtype. At a usual learning rate, rounding to bfloat16 would undo most of the weight
changes of a run. The share of the weight changes that rounding keeps is measured (``toolkit.rounding``), printed, and saved in
``model/grpo.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from toolkit import checkpoints, finetune, origins, store
from toolkit import lm as lms
from toolkit.finetune import read_back as read_back
from toolkit.generate import task_and_split
from toolkit.grpo.log import Recorder
from toolkit.grpo.parts import Heads, Vectors, length_change, trained_parameters
from toolkit.grpo.sampler import base_model
from toolkit.grpo.trainer import Trainer
from toolkit.lm import LM, Condition
from toolkit.rounding import Rounding, rounding
from toolkit.steering import check_direction, steering
from toolkit.types import Direction

MODEL, ADAPTER, VECTOR, ABOUT = "model", "adapter", "vector", "grpo.json"
DIRECTION = "direction.safetensors"  # file in ``VECTOR``
assumed_prompts, assumed_positions = 8, 16  # models are compared at the last 16 positions of the first 8 training prompts (ours)
PICKLED = "training_args.bin"  # transformers writes it beside a model; it is useless without the run


def finished_model(trainer: Trainer) -> PreTrainedModel:
    """Return the trained model in fp32 and evaluation mode, with adapters merged and without the wrappers of TRL and accelerate."""
    model: Any = merge_adapter(finetune.unwrapped(trainer))
    if trainer.attached is not None:
        trainer.attached.merge(model)
    model.__dict__.pop("forward", None)
    return model.eval()


def in_memory(initial: LM, trainer: Trainer, longer: float | None) -> Condition:
    """Return the trained policy, without saving it.

    Args:
        initial: The initial model.
        trainer: The trainer after its last step.
        longer: By how many tokens thinking became longer in training (``parts.length_change``). Used for vectors only.
    """
    if isinstance(trainer.extras.train, Vectors):
        return steered(initial, trained_direction(initial, trainer, longer))
    return Condition(trained_lm(initial, trainer))


def trained_lm(initial: LM, trainer: Trainer) -> LM:
    """Return the trained policy as an ``LM``. Its ``parent`` names the initial model; its ``made_from`` records the training problems."""
    chosen = trainer.extras.train.made_from if isinstance(trainer.extras.train, Heads) else ()
    name = f"{initial.name}, {trainer.recipe.name}"
    return lms.child(initial, finished_model(trainer), name, made_from=(_trained_on(trainer), *chosen))


def trained_direction(initial: LM, trainer: Trainer, longer: float | None) -> Direction:
    """Return trained vectors as a direction of the initial model, such that adding it lengthens thinking.

    Args:
        initial: The initial model.
        trainer: The trainer; it trains ``Vectors``.
        longer: By how many tokens thinking became longer in training. If it is negative, the direction is minus the trained vectors.
            ``None``: unknown, and the direction is the trained vectors.
    """
    attached, part = trainer.attached, trainer.extras.train
    assert attached is not None
    strength = -1.0 if longer is not None and longer < 0 else 1.0
    about: dict[str, Any] = {
        "strength": strength,
        "longer": longer,
        "recipe": trainer.recipe.name,
        "parameters": trained_parameters(trainer.model),
    }
    provenance = initial.provenance(**_trained_on(trainer), **about)
    vector = strength * attached.vectors()
    return Direction(vector, part.assumed_site, "all", f"trained by {trainer.recipe.name}", 0, 0, provenance)


def steered(lm: LM, direction: Direction) -> Condition:
    """Return the policy of a trained direction: its initial model ``lm``, with the direction added at the strength in its notes.

    Raises:
        store.WrongModelError: the direction was trained on another model.
    """
    check_direction(direction, lm)
    strength = direction.provenance.notes["strength"]
    return Condition(lm, (steering(direction, strength),), note=direction.estimator)


def folder_of(out: Path, part: Any) -> Path:
    """Return the folder in which a run with directory ``out`` that trains ``part`` saves its policy."""
    return out / (VECTOR if isinstance(part, Vectors) else MODEL)


def is_finished(out: Path, part: Any) -> bool:
    """Return True if the directory of a run that trains ``part`` holds its complete policy."""
    folder = folder_of(out, part)
    return (folder / DIRECTION).is_file() if isinstance(part, Vectors) else store.is_whole(folder)


def read_policy(initial: LM, out: Path, part: Any, name: str) -> Condition:
    """Return the saved policy of a finished run.

    Args:
        initial: The initial model.
        out: Directory of the run.
        part: Part of the model that was trained.
        name: Name of the policy's model.
    """
    folder = folder_of(out, part)
    if isinstance(part, Vectors):
        return steered(initial, store.load(folder / DIRECTION, Direction))
    return Condition(replace(read_back(initial, folder), parent=initial.fingerprint, name=name))


def _trained_on(trainer: Trainer) -> origins.Record:
    """Return the record of the training problems for ``LM.made_from``: ids, task, split and seed."""
    pool = list(trainer.problems.values())
    return origins.record((p.id for p in pool), **task_and_split(pool), seed=trainer.args.seed)


def merge_adapter(model: Any) -> PreTrainedModel:
    """Convert a model to fp32 in place, merge its LoRA adapter if it has one, and return the model without peft's wrappers.

    peft may wrap the whole model (``PeftModel``) or only single layers; both cases are handled.
    """
    whole: Any = lms.as_type(base_model(model), torch.float32)
    if isinstance(model, PeftModel):
        return cast(PreTrainedModel, model.merge_and_unload())
    for name, layer in list(whole.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            whole.set_submodule(name, layer.get_base_layer())
    return whole


def has_adapter(model: Any) -> bool:
    """Return True if any layer of a model has a peft adapter."""
    return any(isinstance(layer, BaseTunerLayer) for layer in model.modules())


def save_policy(trainer: Trainer, recorder: Recorder, out: Path, dtype: torch.dtype, about: Mapping[str, Any]) -> Condition:
    """Save the trained policy in ``out``, read it back, evaluate it for the last row of the log, and return it.

    The evaluation is skipped if the run's last evaluation used exactly the weights that are saved.

    Call the function in the main process only. Do not use the trainer afterwards: its optimizer is freed, and its model is unwrapped,
    converted to ``dtype`` and moved to the CPU. If the process is killed before the end, ``folder_of(out, part)`` does not exist, and the
    run can be resumed from the last checkpoint.

    Args:
        trainer: The trainer after its last step.
        recorder: Callback that holds the log and the initial model.
        out: The run's directory.
        dtype: Dtype of the saved model; vectors are always fp32.
        about: Further fields for ``grpo.json``. The file also gets the fingerprint (hash) of the initial model and the number of trained
            parameters; and, unless vectors were trained, the fingerprint of the saved model and the rounding error.
    """
    initial = recorder.initial
    assert initial is not None
    about = {**about, "parent": initial.fingerprint, "parameters": trained_parameters(trainer.model)}
    if isinstance(trainer.extras.train, Vectors):
        return _save_vectors(trainer, recorder, initial, out / VECTOR, about)
    return Condition(_save_model(trainer, recorder, initial, out, dtype, about))


def _save_vectors(trainer: Trainer, recorder: Recorder, initial: LM, folder: Path, about: Mapping[str, Any]) -> Condition:
    direction = trained_direction(initial, trainer, length_change(recorder.rows))
    with store.atomic_directory(folder) as partial:
        path = store.save(direction, partial / DIRECTION)
        policy = steered(initial, store.load(path, Direction))
        if trainer.args.bf16:
            recorder.finish(policy, trainer.args.max_steps)  # in training, autocast rounds otherwise than a bfloat16 model
        store.write_json({**about, "strength": direction.provenance.notes["strength"]}, partial / ABOUT)
    return policy


def _save_model(trainer: Trainer, recorder: Recorder, initial: LM, out: Path, dtype: torch.dtype, about: Mapping[str, Any]) -> LM:
    # ``changed``: saving changes the numbers that the model computes, since an adapter or heads are merged or autocast ends.
    changed = has_adapter(trainer.model) or trainer.attached is not None or trainer.args.bf16
    if isinstance(trainer.model, PeftModel):
        _save_adapter(trainer, initial, out / ADAPTER)
    _free_optimizer(trainer)
    policy = trained_lm(initial, trainer)
    with store.atomic_directory(out / MODEL) as partial:
        # Measure what rounding to ``dtype`` loses, in the weights and in the log-probabilities on some training prompts.
        lost, in_memory = _rounded(initial, policy, dtype), policy.fingerprint
        prompts = [initial.prompt_ids(p.messages) for p in list(trainer.problems.values())[:assumed_prompts]]
        before, trained = (_log_probs(lm, prompts) for lm in (initial, policy))
        replace(policy, model=lms.as_type(policy.model, dtype)).save(partial)
        policy.model.to("cpu")  # type: ignore[arg-type]  # frees the device for the saved model
        saved = read_back(policy, partial, dtype=dtype, device=initial.device)
        saved = replace(saved, name=policy.name, parent=policy.parent, folder=out / MODEL)
        saved.model.config._name_or_path = saved.model.name_or_path = str(out / MODEL)
        lost |= {"kl": _kl(trained, _log_probs(saved, prompts)), "kl_trained": _kl(trained, before)}
        recorder.say(_rounding_message(lost))
        if changed or saved.fingerprint != in_memory:
            recorder.finish(
                Condition(saved), trainer.args.max_steps
            )  # otherwise the last evaluation already used exactly these weights
        store.write_json({**about, "fingerprint": saved.fingerprint, "saved": lost}, partial / ABOUT)
    return saved


def _save_adapter(trainer: Trainer, initial: LM, folder: Path) -> None:
    """Write the LoRA adapter to ``folder`` as a PEFT directory.

    A file in ``folder`` records the problems that were used to train the adapter, and those that were used to make the initial model.
    """
    store.remove(folder)
    trainer.processing_class = initial.tokenizer  # the template as it was read, without a fixed date
    with store.atomic_directory(folder) as partial:
        trainer.save_model(str(partial))
        store.remove(partial / PICKLED)
        store.write_json(origins.distinct((*initial.made_from, _trained_on(trainer))), partial / checkpoints.MADE_FROM)


def _free_optimizer(trainer: Trainer) -> None:
    """Free gradients and the optimizer's state, to make room for a second copy of the weights."""
    trainer.model.zero_grad(set_to_none=True)
    trainer.optimizer = trainer.lr_scheduler = trainer.callback_handler.optimizer = None
    trainer.accelerator.free_memory()


def _rounded(initial: LM, policy: LM, dtype: torch.dtype) -> dict[str, Any]:
    """Return how much of the trained weight changes is kept if the policy is saved in ``dtype``.

    The result is a dict with three entries, the fields of ``rounding.Rounding``: ``dtype``, ``kept`` (share of the changes that is kept)
    and ``error`` (rounding error divided by the size of the changes). If the initial model has another dtype, a fourth entry, ``given``,
    holds a dict with the same three entries for saving in that dtype.
    """
    start = merge_adapter(deepcopy(initial.model)) if has_adapter(initial.model) else initial.model
    before, after = (dict(model.named_parameters()) for model in (start, policy.model))
    lost: dict[str, Any] = asdict(rounding(before, after, dtype))
    return lost if initial.model.dtype == dtype else lost | {"given": asdict(rounding(before, after, initial.model.dtype))}


def _rounding_message(facts: Mapping[str, Any]) -> str:
    """Return a message for the user: how much of the trained weight changes the saved model keeps after rounding to its dtype.

    If the initial model has another dtype, the message also says how much would be kept in that dtype.

    Args:
        facts: The dict that ``_rounded`` returns, with two more entries in nats per token: ``kl`` is KL(trained || saved policy), and
            ``kl_trained`` is KL(trained policy || initial model).
    """
    written = Rounding(facts["dtype"], facts["kept"], facts["error"])
    other = f"; {Rounding(**facts['given'])}" if "given" in facts else ""
    far = f"KL to the trained policy {facts['kl']:.2g} nats per token ({facts['kl_trained']:.2g} between trained and initial model)"
    advice = "" if written.small else f". Save in float32 to keep the change, or use {ADAPTER} if there is one"
    return f"saved model: {written}{other}; {far}{advice}"


@torch.inference_mode()
def _log_probs(lm: LM, prompts: Sequence[list[int]]) -> list[Float[Tensor, "tokens vocab"]]:
    """Return log-probabilities over the vocabulary at the last positions of each prompt, ``[positions, vocab]`` per prompt.

    The constant ``assumed_positions`` is the largest number of positions, 16. All positions of a long prompt would take gigabytes.

    Args:
        lm: The model.
        prompts: Token ids of each prompt.
    """
    log_probs = []
    for ids in prompts:
        logits = lm.model(input_ids=torch.tensor([ids], device=lm.device), logits_to_keep=assumed_positions).logits[0]
        log_probs.append(logits[-assumed_positions:].float().log_softmax(dim=-1).cpu())
    return log_probs


def _kl(p: Sequence[Tensor], q: Sequence[Tensor]) -> float:
    """Return the mean of KL(p || q) over all positions, in nats per token; the arguments are log-probabilities from ``_log_probs``."""
    return float(torch.cat([(a.exp() * (a - b)).sum(dim=-1) for a, b in zip(p, q, strict=True)]).mean())
