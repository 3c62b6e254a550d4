"""Read PEFT adapters from a directory or the hub, and merge them into the weights of their base model.

Adapters are always merged, for two reasons: edits need the merged weights, and saving a model with a separate adapter would save only the
adapter. Every adapter that changes weights can be merged (LoRA, DoRA, IA3, fully saved modules, ...). The merged model computes the same
function, except for rounding. ``merge`` checks this by comparing the logits before and after.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from toolkit import store
from toolkit.rounding import rounding
from toolkit.sites import UnsupportedModelError

EXACT = 1e-4  # largest allowed difference between the logits before and after merging, relative to the largest logit
PROBE = 8  # number of tokens in that comparison
NAME = "default"  # peft's name for the adapter


def read_config(source: str, revision: str | None = None) -> dict[str, Any] | None:
    """Return the content of ``adapter_config.json`` in a directory or hub repository, or ``None`` if there is no such file.

    Raises:
        ImportError: the file exists, but peft is not installed.
        store.DamagedFileError: the config is not a JSON object.
    """
    path = find_adapter_config_file(source, revision=revision)
    if path is None:
        return None
    if find_spec("peft") is None:
        raise ImportError(f"{source} is a PEFT adapter, which needs peft: pip install 'reasoning-length-toolkit[rl]'.")
    return dict(store.read_json(path, Mapping[str, Any]))


def find_base(source: str, config: Mapping[str, Any]) -> str:
    """Return the directory, GGUF file or hub id from which to load an adapter's base model.

    If the config names the base by a relative path, the path is looked up in the adapter's directory first, then in the working directory.

    Args:
        source: Directory or hub id of the adapter.
        config: Content of the adapter's ``adapter_config.json``.

    Raises:
        UnsupportedModelError: the config names no base, or names a path at which there is no model. (Whether a hub id exists is not
            checked here.)
    """
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UnsupportedModelError(
            f"{source} is an adapter whose adapter_config.json names no base model: set base_model_name_or_path to the base's directory."
        )
    path = next((path for path in (Path(source) / base, Path(base)) if _is_model(path)), None)
    if path is not None:
        return str(path)
    if Path(base).is_absolute() or base.startswith(".") or base.count("/") > 1:
        raise UnsupportedModelError(
            f"{source} is an adapter of {base[:150]!r}, which is not a model directory (relative to the adapter or the working directory): "
            "set base_model_name_or_path in adapter_config.json to the current place of the base."
        )
    return base


def _is_model(path: Path) -> bool:
    if path.suffix == ".gguf":
        return path.is_file()
    return (path / "config.json").is_file() or (path / "adapter_config.json").is_file()


def as_lora(
    changes: Mapping[str, tuple[Tensor, Tensor]], *, base: str, revision: str | None, transposed: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the config of a PEFT adapter (LoRA) that adds given low-rank changes to the weights of modules.

    The change of a weight is the product ``B A``. Servers expect one rank for all modules. So the largest rank among the changes is used
    for all, and smaller A and B are padded with zeros.

    Args:
        changes: Full name of a module -> the pair ``(A, B)`` of its change, ``[rank, in]`` and ``[out, rank]``.
        base: Directory or hub id of the base model.
        revision: Hub revision of the base model, or ``None``.
        transposed: True if the modules store their weight as ``[in, out]`` (``Conv1D``).
    """
    rank = max(A.shape[0] for A, _ in changes.values())
    tensors = {}
    for name, (A, B) in changes.items():
        missing = rank - A.shape[0]
        tensors[f"base_model.model.{name}.lora_A.weight"] = nn.functional.pad(A, (0, 0, 0, missing)).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = nn.functional.pad(B, (0, missing)).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        # Full paths: c_proj alone would also match GPT-2's MLP, and with layers_to_transform peft loses the second adapter's layers
        # when it combines two (add_weighted_adapter keeps those of the first).
        "target_modules": list(changes),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }
    return tensors, config


def merge(
    model: PreTrainedModel, source: str, dtype: torch.dtype, *, revision: str | None = None, precision: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return the base model with a PEFT adapter merged into its weights.

    With LoRA, a weight W becomes ``W + (alpha / r) B A``: A and B are the adapter's matrices, r is its rank, alpha its scaling setting.

    Warns (``warnings.warn``) if the error of rounding the new weights to ``dtype`` is more than a tenth of the adapter's change. See
    ``rounding.Rounding.error``.

    Args:
        model: The base model. Its weights are changed in place.
        source: Directory or hub id of the adapter.
        dtype: Dtype of the merged weights. Buffers, such as rotary frequencies, keep theirs.
        revision: Hub revision (branch, tag or commit) of the adapter; ``None`` for the default branch.
        precision: Dtype in which the adapter's change is added to the base weights, before the sum is rounded to ``dtype``.

    Raises:
        store.DamagedFileError: the adapter is not complete, or does not fit the model.
        UnsupportedModelError: the adapter changes no weights (such as prompt tuning), or the logits differ before and after merging.
    """
    from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

    wide = dtype in (torch.float32, torch.float64)
    # Copies of the base weights, to measure what rounding to ``dtype`` loses of the adapter's change; fp32 and fp64 lose next to nothing.
    start = {} if wide else {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.data = weight.data.to(precision)
    try:
        config = PeftConfig.from_pretrained(source, revision=revision)
        config.base_model_name_or_path = None  # else peft warns if the base was loaded under another name
        tensors = load_peft_weights(source, device="cpu", revision=revision)
        adapted: Any = get_peft_model(model, config)
        mergeable = hasattr(adapted.base_model, "merge_and_unload")
        weights = {key: value.to(precision) for key, value in tensors.items()} if mergeable else {}
        report: Any = set_peft_model_state_dict(adapted, weights) if mergeable else None
    except Exception as error:
        raise store.DamagedFileError(
            f"The adapter {source} cannot be applied to its base ({type(error).__name__}: {str(error)[:140]}): copy it again, or name the "
            "base that it was trained on."
        ) from error
    if not mergeable:
        raise UnsupportedModelError(
            f"{source} is an adapter of type {getattr(config.peft_type, 'value', config.peft_type)}, which does not change weights, so it cannot be "
            "merged or edited. Use an adapter such as LoRA, or the base alone."
        )
    missing = [key for key in report.missing_keys if f".{NAME}" in key]
    if missing or report.unexpected_keys or not tensors:
        key = [*missing, *report.unexpected_keys, "every weight"][0]
        raise store.DamagedFileError(
            f"The adapter {source} does not fit its base ({len(missing)} weights missing, {len(report.unexpected_keys)} unexpected, such as "
            f"{key[-80:]}): copy it again, or train it on this base."
        )
    model = _merge(adapted.eval(), source)
    loss = rounding(start, {name: weight for name, weight in model.named_parameters() if name in start}, dtype)
    if not loss.small:
        warnings.warn(
            f"The adapter {source} loses precision when it is merged: {loss}. Load it in float32 to keep it.", stacklevel=2
        )
    return _as_loaded(model, dtype)


@torch.no_grad()
def _merge(adapted: Any, source: str) -> PreTrainedModel:
    ids = torch.arange(PROBE, device=adapted.device)[None] % adapted.config.get_text_config().vocab_size
    expected = adapted(input_ids=ids).logits
    separated = _separate(adapted)
    model = adapted.merge_and_unload()
    if hasattr(model, "peft_config"):
        del model.peft_config  # peft below 0.21 leaves it, and then warns when the next adapter is put on the model
    if separated:
        _tie(model)
    error = ((model(input_ids=ids).logits - expected).abs().max() / expected.abs().max()).item()
    if not error <= EXACT:
        raise UnsupportedModelError(
            f"Merged into its base, the adapter {source} computes something else (relative deviation {error:.2g}): merge it with the library "
            "that made it, and load the merged model."
        )
    return model


def _as_loaded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Convert weights to ``dtype``, and return the model. The modules that transformers always loads in fp32 get fp32 instead."""
    wide = _modules_in_fp32(model, dtype)
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(torch.float32 if any(part in name for part in wide) else dtype)
        weight.requires_grad_(True)  # as in any loaded model
    model.config.dtype = dtype
    return model


def _separate(adapted: nn.Module) -> bool:
    """Untie tied weights, such as embedding and LM head, if an adapter changes any of them. Return True if some were untied.

    Tied weights are one tensor under two names. Merging changes a tensor in place, so without this the change would apply under both names.
    """
    names: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in adapted.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            names.setdefault(id(weight), []).append((path, module, name))
    # Parts of the names that peft gives to what an adapter changes: the base weight, the original of a fully saved module, the adapter.
    wrapped = ("base_layer", "original_module", NAME)
    shared = [uses for uses in names.values() if len(uses) > 1 and any(part in path for path, _, _ in uses for part in wrapped)]
    for _, module, name in (use for uses in shared for use in uses[1:]):
        setattr(module, name, nn.Parameter(getattr(module, name).detach().clone(), requires_grad=False))
    return bool(shared)


def _tie(model: PreTrainedModel) -> None:
    """Tie the embedding and the LM head if they are equal after merging. If they differ, mark them as untied in the config."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    equal = head is not None and torch.equal(head.weight, embedding.weight)  # type: ignore[arg-type]  # Parameters
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = equal
    if equal:
        model.tie_weights()
    else:
        model.all_tied_weights_keys = {}  # transformers does not save the weights that are listed here


def _modules_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the names of modules that transformers loads in fp32 even if ``dtype`` is narrower."""
    always = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    in_half = getattr(model, "_keep_in_fp32_modules", None) or ()
    return () if dtype in (torch.float32, torch.float64) else (*always, *(in_half if dtype == torch.float16 else ()))
