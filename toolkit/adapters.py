"""PEFT adapters: found in a directory or on the hub, and merged into the weights of their base.

An adapter is never left beside the weights: an edit changes weights, and saving a model with an adapter around it writes the adapter
alone. Merging is exact for every adapter that changes weights (LoRA, DoRA, IA3, modules saved whole, ...), and checked.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from toolkit import store
from toolkit.rounding import rounding
from toolkit.sites import UnsupportedModelError

EXACT = 1e-4  # largest deviation of the merged model's logits from those with the adapter beside the weights, of the largest logit
PROBE = 8  # tokens that both are compared on
NAME = "default"


def read_config(source: str, revision: str | None = None) -> dict[str, Any] | None:
    """Return the ``adapter_config.json`` of a directory or hub id, or ``None`` if it holds no adapter.

    Raises:
        ImportError: it is an adapter and peft is not installed.
        store.DamagedFileError: it is not a JSON object.
    """
    found = find_adapter_config_file(source, revision=revision)
    if found is None:
        return None
    if find_spec("peft") is None:
        raise ImportError(f"{source} is a PEFT adapter, which needs peft: pip install 'reasoning-length-toolkit[rl]'.")
    return dict(store.read_json(found, Mapping[str, Any]))


def find_base(source: str, about: Mapping[str, Any]) -> str:
    """Return what an adapter's base is loaded from: a directory or a GGUF file, absolute or relative to the adapter's or the working
    directory, or a hub id.

    Raises:
        UnsupportedModelError: the base is not there, or the config names none.
    """
    named = about.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise UnsupportedModelError(
            f"{source} is an adapter whose adapter_config.json names no base: set base_model_name_or_path to the base's directory."
        )
    places = [Path(source) / named, Path(named)]
    whole = next((path for path in places if _is_model(path)), None)
    if whole is not None:
        return str(whole)
    if Path(named).is_absolute() or named.startswith(".") or named.count("/") > 1:
        raise UnsupportedModelError(
            f"{source} is an adapter of {named[:150]!r}, which is no model directory (looked in the adapter's and the working directory): "
            "set base_model_name_or_path in adapter_config.json to where the base is now."
        )
    return named


def _is_model(path: Path) -> bool:
    if path.suffix == ".gguf":
        return path.is_file()
    return (path / "config.json").is_file() or (path / "adapter_config.json").is_file()


def merge(
    model: PreTrainedModel, source: str, dtype: torch.dtype, *, revision: str | None = None, precision: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return the model with a PEFT adapter merged into its weights, such as ``W + (alpha / r) B A``.

    Args:
        source: Directory or hub id of the adapter.
        dtype: Type of the merged weights; buffers such as rotary frequencies stay as they are, as when a model is loaded.
        precision: Type in which the weights are summed.

    Warns where ``dtype`` rounds away more than a tenth of the adapter.

    Raises:
        store.DamagedFileError: the adapter is not whole, or does not fit the model.
        UnsupportedModelError: an adapter that changes no weights, such as prompt tuning, or the merged model computes something else.
    """
    from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

    wide = dtype in (torch.float32, torch.float64)
    start = {} if wide else {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.data = weight.data.to(precision)
    try:
        config = PeftConfig.from_pretrained(source, revision=revision)
        config.base_model_name_or_path = None  # peft would warn where the base was loaded by another name
        tensors = load_peft_weights(source, device="cpu", revision=revision)
        adapted: Any = get_peft_model(model, config)
        mergeable = hasattr(adapted.base_model, "merge_and_unload")
        given = {key: value.to(precision) for key, value in tensors.items()} if mergeable else {}
        report: Any = set_peft_model_state_dict(adapted, given) if mergeable else None
    except Exception as error:
        raise store.DamagedFileError(
            f"The adapter {source} cannot be put on its base ({type(error).__name__}: {str(error)[:140]}): copy it again, or name its own base."
        ) from error
    if not mergeable:
        raise UnsupportedModelError(
            f"{source} is an adapter of type {getattr(config.peft_type, 'value', config.peft_type)}, which adds to the prompt or the layers instead of "
            "changing weights: it cannot be merged, so it cannot be edited. Give an adapter such as LoRA, or the base by itself."
        )
    missing = [key for key in report.missing_keys if f".{NAME}" in key]
    if missing or report.unexpected_keys or not tensors:
        key = [*missing, *report.unexpected_keys, "every weight"][0]
        raise store.DamagedFileError(
            f"The adapter {source} does not fit its base ({len(missing)} weights missing, {len(report.unexpected_keys)} too many, such as "
            f"{key[-80:]}): copy it again, or train it on this base."
        )
    whole = _merged(adapted.eval(), source)
    loss = rounding(start, {name: weight for name, weight in whole.named_parameters() if name in start}, dtype)
    if not loss.small:
        warnings.warn(f"The adapter {source} is merged with a loss: {loss}. Load it in float32 to keep it.", stacklevel=2)
    return _as_loaded(whole, dtype)


@torch.no_grad()
def _merged(adapted: Any, source: str) -> PreTrainedModel:
    ids = torch.arange(PROBE, device=adapted.device)[None] % adapted.config.get_text_config().vocab_size
    wanted = adapted(input_ids=ids).logits
    separated = _separate(adapted)
    whole = adapted.merge_and_unload()
    if separated:
        _tie(whole)
    error = ((whole(input_ids=ids).logits - wanted).abs().max() / wanted.abs().max()).item()
    if not error <= EXACT:
        raise UnsupportedModelError(
            f"Merged into its base, the adapter {source} computes something else (relative deviation {error:.2g}): merge it with the library "
            "that made it, and load the merged model."
        )
    return whole


def _as_loaded(whole: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights in the type that loading them in ``dtype`` gives."""
    kept = _kept_in_fp32(whole, dtype)
    for name, weight in whole.named_parameters():
        weight.data = weight.data.to(torch.float32 if any(part in name for part in kept) else dtype)
        weight.requires_grad_(True)  # as in any model that was loaded
    whole.config.dtype = dtype
    return whole


def _separate(adapted: nn.Module) -> bool:
    """Where an adapter is on a weight with two names, as of a tied head: give each name a tensor of its own, since merging adds in place
    and would add to both. Returns whether there was any."""
    names: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in adapted.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            names.setdefault(id(weight), []).append((path, module, name))
    wrapped = ("base_layer", "original_module", NAME)
    shared = [uses for uses in names.values() if len(uses) > 1 and any(part in path for path, _, _ in uses for part in wrapped)]
    for _, module, name in (use for uses in shared for use in uses[1:]):
        setattr(module, name, nn.Parameter(getattr(module, name).detach().clone(), requires_grad=False))
    return bool(shared)


def _tie(model: PreTrainedModel) -> None:
    """Share the embedding with the head again if they are equal after all; else say in the config that they are not."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    equal = head is not None and torch.equal(head.weight, embedding.weight)  # type: ignore[arg-type]  # Parameters
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = equal
    if equal:
        model.tie_weights()
    else:
        model.all_tied_weights_keys = {}  # what saving leaves out


def _kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of modules that transformers loads in fp32 whatever ``dtype`` is."""
    always = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    in_half = getattr(model, "_keep_in_fp32_modules", None) or ()
    return () if dtype in (torch.float32, torch.float64) else (*always, *(in_half if dtype == torch.float16 else ()))
