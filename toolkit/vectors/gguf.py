"""GGUF control vectors: files with one vector per layer, which llama.cpp, repeng and EasySteer add to the outputs of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from toolkit import store
from toolkit.lm import LM
from toolkit.store import ForeignFileError, WrongModelError
from toolkit.types import Direction
from toolkit.vectors.files import ExportError, as_direction, layer_of, restored, written

LLAMA_CPP = {
    "mistral": "llama", "mixtral": "llama", "internlm3": "llama", "ministral3": "mistral3", "gemma3_text": "gemma3", "gemma4_text": "gemma4",
    "llama4_text": "llama4", "phi": "phi2", "cohere": "command-r", "olmo3": "olmo2", "glm": "chatglm", "gpt_bigcode": "starcoder",
    "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2", "glm4_moe_lite": "deepseek2", "youtu": "deepseek2", "mimo_v2_flash": "mimo2",
    "granitemoeshared": "granitemoe", "granitemoehybrid": "granitehybrid", "bamba": "granitehybrid",
    "hunyuan_v1_dense": "hunyuan-dense", "hunyuan_v1_moe": "hunyuan-moe",
    "qwen2_5_vl": "qwen2vl", "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe",
}  # fmt: skip
"""``model_type`` in transformers -> architecture name in llama.cpp (its ``convert_hf_to_gguf.py``).

Model types whose two names are equal, or differ only in underscores or hyphens, are not listed.
"""


MAY_BE_AFTER_NORM = "may be measured after the final norm, and added before it"
"""Note on a vector of the last layer of a tool that may compute it from the last of transformers' ``hidden_states``."""


def save_gguf(direction: Direction, path: str | Path, *, lm: LM, scale: float = 1.0, drop_layer_0: bool = False) -> Path:
    """Save ``scale * direction`` as a GGUF control vector in F32, and return the path of the file.

    llama.cpp adds the file's tensor named ``direction.k`` to the output of block k, at every position. Blocks are numbered from 0, but the
    format has no tensor for block 0.

    Args:
        direction: The direction, at site ``resid_post``; adding it lengthens thinking.
        path: The file to write.
        lm: The model that the direction is for.
        scale: Factor on the vectors; not 0. With a negative factor, adding the saved vectors shortens thinking.
        drop_layer_0: True to leave out the vector of layer 0. False raises an error if that vector is not zero.

    Raises:
        ExportError: the direction is not at ``resid_post``, has a vector at layer 0 (without ``drop_layer_0``), is zero in all other
            layers, or is too large for F32.
        ImportError: the package gguf is not installed.
        WrongModelError: the direction was made from other weights than those of ``lm``, or its shape does not fit ``lm``.
        ValueError: a vector, the scale, or a number in the notes of the direction's provenance is infinite or NaN; or all vectors are zero
            after scaling.
    """
    if direction.kind != "resid_post":
        raise ExportError(
            f"A control vector is added to the output of a block, but this direction was made at {direction.kind}, and would act differently "
            "there. Make it at resid_post, or write an adapter or a safetensors file."
        )
    if direction.vector[0].any() and not drop_layer_0:
        raise ExportError(
            f"Layer 0 has a vector (norm {direction.norms[0]:.3g}), but control vectors start at layer 1: llama.cpp rejects direction.0. "
            "Pass drop_layer_0=True to leave it out; the other layers then act without it."
        )
    vector, header = written(direction, lm, scale, None, "all")
    single = vector[1:].float().cpu()  # F32 without layer 0; large fp64 numbers overflow to infinity
    if not torch.isfinite(single).all() or not single.any():
        raise ExportError("In F32, the type of control vectors, layers 1 and above are not finite, or all zero.")
    fields: dict[str, str | int | float] = {
        "controlvector.model_hint": lm.model.config.model_type,
        "controlvector.layer_count": len(single),
    }
    private: dict[str, str | int | float] = {f"toolkit.{key}": value for key, value in header.items()}
    rows = {f"direction.{k}": row.numpy() for k, row in enumerate(single, 1)}
    return store.write_gguf("controlvector", fields | private, rows, path)


def load_gguf(path: str | Path, lm: LM, *, model_hint: str | None = None) -> Direction:
    """Load a GGUF control vector, such as one from ``save_gguf``, repeng or llama.cpp, as a direction at ``resid_post``.

    From a file that ``save_gguf`` wrote, the direction is loaded with its provenance, but in F32 and with zeros at layer 0. The factor
    ``scale`` of ``save_gguf`` is divided out. For files of other tools, only model type, width and number of layers can be checked. It is
    then unknown whether adding the direction makes thinking longer or shorter. If the file has a vector of the last layer, it may be inexact:
    repeng takes the last of transformers' ``hidden_states``, which is after the final norm, and llama.cpp adds the vector before it. Then the
    provenance has a note, ``notes["last_layer"]``.

    Args:
        path: The file.
        lm: Model with which the direction will be used.
        model_hint: A second model type that the file may name, besides that of ``lm``. ``None`` allows only the type of ``lm``. A file that
            names no model type passes this check.

    Raises:
        ForeignFileError: the file is not a control vector by llama.cpp's rules (1-D F32 tensors ``direction.k``, k >= 1), or its vectors
            belong to another site.
        WrongModelError: model type, number of layers or width differ from those of ``lm``; or the file is from this toolkit, but was made
            from other weights.
        FileNotFoundError: there is no such file.
        DamagedFileError: the file is truncated or damaged.
        ImportError: the package gguf is not installed.
    """
    fields, tensors = store.read_gguf(path)
    if (arch := fields.get("general.architecture")) != "controlvector":
        raise ForeignFileError(f"{path} is a GGUF file of architecture {str(arch)[:40]!r}, not a control vector.")
    hint = fields.get("controlvector.model_hint")
    if hint is not None and plain(str(hint)) not in {plain(name) for name in model_types(lm) | {model_hint or ""}}:
        raise WrongModelError(
            f"{path} is for models of type {str(hint)[:40]!r}, {lm.name} is {lm.model.config.model_type!r}. "
            f"If it fits this model nevertheless, call toolkit.vectors.load_gguf(path, lm, model_hint={hint!r})."
        )
    rows = {}
    for name, array in tensors.items():
        k = layer_of(name, path)
        if k == 0 or array.ndim != 1 or array.dtype != "float32":
            raise ForeignFileError(
                f"{path}: {name} is {array.ndim}-D {array.dtype}; control vectors are 1-D float32 and start at direction.1, so "
                "llama.cpp rejects this file. Its writer may number layers differently: write it again from its source."
            )
        rows[k] = torch.from_numpy(array)
    header = {key.removeprefix("toolkit."): str(value) for key, value in fields.items() if key.startswith("toolkit.")}
    # Files of the tool steerkit name the site of their vectors in the field hook_site.
    site = header.get("site") or str(fields.get("hook_site", "resid_post"))
    if site.removeprefix("hook_") != "resid_post":
        raise ForeignFileError(
            f"{path} says that its vectors are of {site[:40]}, but a control vector acts only at the output of a block."
        )
    if header:
        return restored(rows, header, lm, path)
    return as_direction(lm, rows, "resid_post", "GGUF", path, model_hint=hint, **note_on_last_layer(lm, rows))


def note_on_last_layer(lm: LM, rows: Mapping[int, Any]) -> dict[str, str]:
    """Return the note ``last_layer`` for the provenance if a file of another tool has a vector of the last layer, else no note.

    Args:
        lm: Model with which the direction will be used.
        rows: Layer -> vector.
    """
    return {"last_layer": MAY_BE_AFTER_NORM} if lm.layout.n_layers - 1 in rows else {}


def model_types(lm: LM) -> set[str]:
    """Return the names of the model type of ``lm`` in transformers and llama.cpp. A GGUF file may hold any of them."""
    config = lm.model.config.get_text_config()
    names = {lm.model.config.model_type, config.model_type}
    converted = {LLAMA_CPP[name] for name in names if name in LLAMA_CPP}
    if "granitehybrid" in converted and len(lm.layout.attention_layers) == lm.layout.n_layers:
        # llama.cpp converts a hybrid without state-space layers as the model that has none.
        converted = {"granitemoe" if getattr(config, "num_experts_per_tok", 0) else "granite"}
    return names | converted


def plain(name: str) -> str:
    """Return a model type in lower case without ``_`` and ``-``, so that spellings of different tools compare equal."""
    return name.lower().replace("_", "").replace("-", "")
