"""Writing what was trained and reading it back: the model that is judged and returned is the one on disk, in the type it is written in.

A run leaves ``model``, an ordinary Hugging Face directory, and, if it trained a LoRA adapter, ``adapter``, an ordinary PEFT directory in
fp32 (vLLM serves it with ``--enable-lora``). ``model`` is fp32 unless ``Run.save_dtype`` says otherwise: bfloat16 rounds away most of
what a run at a usual learning rate changes. How much it keeps is measured (``toolkit.rounding``), said, and left in ``model/grpo.json``.
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

from toolkit import checkpoints, origins, store
from toolkit import lm as lms
from toolkit.generate import facts
from toolkit.grpo.log import Recorder
from toolkit.grpo.sampler import bare
from toolkit.grpo.trainer import Trainer
from toolkit.lm import LM
from toolkit.rounding import Rounding, rounding

MODEL, ADAPTER, ABOUT = "model", "adapter", "grpo.json"
assumed_prompts, assumed_positions = 8, 16  # what two models are compared on: the ends of the first training prompts (ours)
PICKLED = "training_args.bin"  # transformers leaves it beside a model; it is of no use without the run


def finished(trainer: Trainer) -> PreTrainedModel:
    """The trained model by itself, in fp32: adapters merged, the forwards of TRL and accelerate taken off (they would run these weights)."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    for name in ("forward", "_original_forward"):
        model.__dict__.pop(name, None)
    model = merged(model)
    model.__dict__.pop("forward", None)
    return model.eval()


def policy_of(given: LM, trainer: Trainer) -> LM:
    """The policy as an LM made from ``given``, with a record of the problems that it was trained on."""
    return lms.child(given, finished(trainer), f"{given.name}, {trainer.recipe.name}", made_from=(_trained_on(trainer),))


def _trained_on(trainer: Trainer) -> origins.Record:
    pool = list(trainer.problems.values())
    return origins.record((p.id for p in pool), **facts(pool), seed=trainer.args.seed)


def merged(model: Any) -> PreTrainedModel:
    """A model in fp32, in place, with its adapter merged, whether peft wraps the model or only has layers inside it."""
    whole: Any = lms.as_type(bare(model), torch.float32)
    if isinstance(model, PeftModel):
        return cast(PreTrainedModel, model.merge_and_unload())
    for name, layer in list(whole.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            whole.set_submodule(name, layer.get_base_layer())
    return whole


def adapted(model: Any) -> bool:
    """Whether a model has layers with an adapter."""
    return any(isinstance(layer, BaseTunerLayer) for layer in model.modules())


def keep(trainer: Trainer, recorder: Recorder, out: Path, dtype: torch.dtype, about: Mapping[str, Any]) -> LM:
    """Write the policy into ``out``, read it back, judge it as the last row of the log, and return it. Only for the main process.

    The trainer's weights and optimizer are given up. Killed before the end there is no ``out / "model"``, and the last checkpoint resumes.

    Args:
        dtype: Number type of ``model``.
        about: What ``grpo.json`` says beside the fingerprints and the rounding.
    """
    given, changed = recorder.given, adapted(trainer.model) or trainer.args.bf16
    assert given is not None
    if isinstance(trainer.model, PeftModel):
        _keep_adapter(trainer, given, out / ADAPTER)
    _release(trainer)
    policy = policy_of(given, trainer)
    with store.atomic_directory(out / MODEL) as partial:
        lost, in_memory = _rounded(given, policy, dtype), policy.fingerprint
        prompts = [given.prompt_ids(p.messages) for p in list(trainer.problems.values())[:assumed_prompts]]
        before, trained = (_log_probs(lm, prompts) for lm in (given, policy))
        replace(policy, model=lms.as_type(policy.model, dtype)).save(partial)
        policy.model.to("cpu")  # type: ignore[arg-type]  # room for the one that is read
        saved = read_back(policy, partial, dtype=dtype, device=given.device)
        saved = replace(saved, name=policy.name, parent=policy.parent, folder=out / MODEL)
        saved.model.config._name_or_path = saved.model.name_or_path = str(out / MODEL)
        lost |= {"kl": _kl(trained, _log_probs(saved, prompts)), "kl_trained": _kl(trained, before)}
        recorder.say(_said(lost))
        if changed or saved.fingerprint != in_memory:
            recorder.finish(saved, trainer.args.max_steps)  # else the newest judgement was of these very weights, computed alike
        store.write_json({**about, "parent": given.fingerprint, "fingerprint": saved.fingerprint, "saved": lost}, partial / ABOUT)
    return saved


def _keep_adapter(trainer: Trainer, given: LM, folder: Path) -> None:
    store.remove(folder)
    with store.atomic_directory(folder) as partial:
        trainer.save_model(str(partial))
        store.remove(partial / PICKLED)
        store.write_json(origins.distinct((*given.made_from, _trained_on(trainer))), partial / checkpoints.MADE_FROM)


def _release(trainer: Trainer) -> None:
    """Give up gradients and the optimizer's state: room for a second copy of the weights."""
    trainer.model.zero_grad(set_to_none=True)
    trainer.optimizer = trainer.lr_scheduler = trainer.callback_handler.optimizer = None
    trainer.accelerator.free_memory()


def read_back(like: LM, folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> LM:
    """Return a model that a run saved, read as the model that it was made from: with its tags, its template switches, and its own code if
    that has some.

    Args:
        device: Default: that of ``like``.
    """
    custom = type(like.model).__module__.startswith("transformers_modules")
    where = like.device if device is None else device
    return lms.load(folder, dtype=dtype, device=where, tags=like.tags, template=like.template, trust_remote_code=custom)


def _rounded(given: LM, policy: LM, dtype: torch.dtype) -> dict[str, Any]:
    """The rounding of the policy in ``dtype`` and, as ``given``, in the type of the model that was given, where that is another."""
    start = merged(deepcopy(given.model)) if adapted(given.model) else given.model
    before, after = (dict(model.named_parameters()) for model in (start, policy.model))
    found: dict[str, Any] = asdict(rounding(before, after, dtype))
    return found if given.model.dtype == dtype else found | {"given": asdict(rounding(before, after, given.model.dtype))}


def _said(facts: Mapping[str, Any]) -> str:
    """What was lost, or would have been, in words."""
    written = Rounding(facts["dtype"], facts["kept"], facts["error"])
    other = f"; {Rounding(**facts['given'])}" if "given" in facts else ""
    far = f"KL to the trained policy {facts['kl']:.2g} nats per token, of {facts['kl_trained']:.2g} between it and the model given"
    advice = "" if written.small else f". Save in float32 to keep the change, or use {ADAPTER} if there is one"
    return f"saved model: {written}{other}; {far}{advice}"


@torch.inference_mode()
def _log_probs(lm: LM, prompts: Sequence[list[int]]) -> list[Float[Tensor, "tokens vocab"]]:
    """At the last positions of each prompt: at all of them a long prompt and a large vocabulary would take gigabytes."""
    found = []
    for ids in prompts:
        logits = lm.model(input_ids=torch.tensor([ids], device=lm.device), logits_to_keep=assumed_positions).logits[0]
        found.append(logits[-assumed_positions:].float().log_softmax(dim=-1).cpu())
    return found


def _kl(p: Sequence[Tensor], q: Sequence[Tensor]) -> float:
    """Mean of KL(p || q) over all positions, nats."""
    return float(torch.cat([(a.exp() * (a - b)).sum(dim=-1) for a, b in zip(p, q, strict=True)]).mean())
