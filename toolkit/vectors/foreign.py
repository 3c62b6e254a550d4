"""Read directions of other tools from their files, without installing the tools.

These files rarely name their model, and never say what + means. Width and depth are checked, and the direction's provenance names the
model that it was loaded for. Layers are numbered from 0, as here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit import store
from toolkit.lm import LM
from toolkit.store import ForeignFileError, WrongModelError
from toolkit.types import Direction
from toolkit.vectors.files import as_direction, layer_number, model_types

STEERING_VECTORS = {"decoder_block": "resid_post", "self_attn": "attn_out", "mlp": "mlp_out"}
"""Layer types of the library steering-vectors -> the site at which each has its output."""


def load_thinkedit(path: str | Path, lm: LM, *, part: str | None = None) -> Direction:
    """Load a direction that ThinkEdit's released code wrote: one tensor ``[layers, 1, d_model]``, long minus short, not normalised.

    Args:
        part: ``"attn"`` (``resid_mid``) or ``"mlp"`` (``resid_post``). By default the end of the file name.

    Raises:
        ForeignFileError: the file holds pickled objects or a tensor of another shape, or its name does not tell the part.
        WrongModelError: depth or width differ; or the part is ``attn`` and the family post-norm, where the released code reads another
            site.
        FileNotFoundError: there is no file.
        DamagedFileError: the file is truncated.
    """
    part = part or Path(path).stem.rpartition("_")[2]
    if part not in ("attn", "mlp"):
        raise ForeignFileError(f"{path}: its name does not end in _attn or _mlp. Pass part='attn' or part='mlp'.")
    if part == "attn" and lm.layout.blocks[0].post_attention_norm is not None:
        raise WrongModelError(
            f"ThinkEdit reads the input of post_attention_layernorm, which in {lm.name} ({lm.layout.row.family}) is attn_out and not the "
            "residual stream. Make the direction here: methods.thinkedit.direction."
        )
    tensor = _one_tensor(path)
    if tensor.ndim != 3 or tensor.shape[1] != 1:
        raise ForeignFileError(f"{path} has shape {tuple(tensor.shape)}; ThinkEdit's files are [layers, 1, d_model].")
    kind = "resid_mid" if part == "attn" else "resid_post"
    return as_direction(lm, _all_rows(tensor[:, 0], lm, path), kind, "ThinkEdit", path)


def load_hidden_directions(path: str | Path, lm: LM, *, layer: int | None = None) -> Direction:
    """Load a direction of hidden-directions, brainscope or hotwire: ``[layers, d_model]``, or ``[d_model]`` with ``layer``.

    Row l is the output of block l (``hidden_states[l + 1]``), so ``resid_post``. The last row was learned *after* the final norm, but these
    tools apply it before the norm, and so does this one. If that matters, leave the layer out (``steering(..., layers=...)``).

    Args:
        layer: Layer of a single vector.

    Raises:
        ForeignFileError: the file holds pickled objects, several tensors or one of another shape, or ``layer`` does not fit its shape.
        WrongModelError: depth or width differ.
        FileNotFoundError: there is no file.
        DamagedFileError: the file is truncated.
    """
    tensor = _one_tensor(path)
    if tensor.ndim not in (1, 2) or (tensor.ndim == 1) != (layer is not None):
        raise ForeignFileError(
            f"{path} has shape {tuple(tensor.shape)} and layer={layer}: give layer for one vector [d_model], and no layer for "
            "[layers, d_model]. Files of shape [layers, 1, d_model] are ThinkEdit's: use load_thinkedit."
        )
    rows = _all_rows(tensor, lm, path) if layer is None else {layer: tensor}
    return as_direction(lm, rows, "resid_post", "hidden-directions", path)


def load_svec(path: str | Path, lm: LM) -> Direction:
    """Load a ``.svec`` file (JSON) of AISteer360 with one direction per layer (CAA), which is added to the output of the block.

    Raises:
        ForeignFileError: the file is not a ``.svec`` file, or has several directions per layer (per position, head or plane).
        WrongModelError: model type, depth or width differ.
        FileNotFoundError: there is no file.
        DamagedFileError: the file is not JSON, or holds NaN.
    """
    content = store.read_json(store.existing_file(path))
    try:
        rows = {layer_number(layer): torch.tensor(value, dtype=torch.float32) for layer, value in content["directions"].items()}
        hint = content["model_type"]
        if not all(_numeric(value) for value in content["directions"].values()):
            raise TypeError("a direction holds a value that is not a number")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ForeignFileError(
            f"{path} is not a .svec file: {str(error)[:100]!r}. Expected model_type and directions by layer."
        ) from error
    if content.get("num_heads") or any(row.ndim != 2 or len(row) != 1 for row in rows.values()):
        shapes = str({layer: tuple(row.shape) for layer, row in rows.items()})[:100]
        raise ForeignFileError(f"{path} has directions of shapes {shapes}: expected one per layer, [1, d_model], as CAA makes.")
    if str(hint) not in model_types(lm):
        raise WrongModelError(f"{path} is for models of type {str(hint)[:40]!r}, {lm.name} is {lm.model.config.model_type!r}.")
    return as_direction(lm, {layer: row[0] for layer, row in rows.items()}, "resid_post", "AISteer360", path)


def from_steering_vectors(vector: Any, lm: LM) -> Direction:
    """Return the direction in a ``SteeringVector`` of the library steering-vectors.

    Args:
        vector: The object, or a mapping with its fields (as from ``store.read_pt``).

    Raises:
        ForeignFileError: it has other fields, or a layer type without a site here (the output of a norm).
        WrongModelError: depth or width differ.
    """
    read = vector.get if isinstance(vector, Mapping) else lambda name: getattr(vector, name, None)
    rows, kind = read("layer_activations"), read("layer_type")
    if not isinstance(rows, Mapping) or not all(isinstance(v, Tensor) for v in rows.values()) or kind not in STEERING_VECTORS:
        raise ForeignFileError(
            f"This {type(vector).__name__} has layer_type {kind!r}: expected tensors layer_activations by layer, and a layer_type of "
            f"{', '.join(STEERING_VECTORS)} (a direction cannot be at the output of a norm)."
        )
    try:
        layers = {layer_number(layer): _plain(row, "SteeringVector") for layer, row in rows.items()}
    except ValueError as error:
        raise ForeignFileError(
            f"This {type(vector).__name__} numbers its layers differently: {error}. Expected whole numbers."
        ) from error
    if len(layers) < len(rows):
        raise ForeignFileError(f"This {type(vector).__name__} has two vectors for one layer: remove one of them.")
    return as_direction(lm, layers, STEERING_VECTORS[kind], "steering-vectors", "SteeringVector")


def _one_tensor(path: str | Path) -> Tensor:
    content = store.read_pt(path)
    if isinstance(content, Mapping) and len(content) == 1:
        (content,) = content.values()
    if not isinstance(content, Tensor):
        raise ForeignFileError(f"{path} holds a {type(content).__name__}, not one tensor: save the tensor alone.")
    return _plain(content, path)


def _plain(tensor: Tensor, source: str | Path) -> Tensor:
    """Return a dense tensor on the CPU. Raise ForeignFileError if the tensor is sparse, quantised or has no data."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ForeignFileError(f"{source} holds a sparse, quantised or empty tensor: save it as a plain one.")
    return tensor.detach().cpu()


def _numeric(value: Any) -> bool:
    return all(map(_numeric, value)) if isinstance(value, list) else isinstance(value, int | float) and not isinstance(value, bool)


def _all_rows(vector: Tensor, lm: LM, path: str | Path) -> dict[int, Tensor]:
    if len(vector) != lm.layout.n_layers:
        raise WrongModelError(
            f"{path} has {len(vector)} layers, {lm.name} has {lm.layout.n_layers}: it was made for another model."
        )
    return dict(enumerate(vector))
