"""Directions of other tools: read with plain tensors and JSON, none of the tools is needed.

These files hardly say which model they are for, and never what their + means: width and depth are checked, and the direction's
provenance names the model it was loaded for. Their layers count blocks from 0, as ours do.
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
from toolkit.vectors.files import imported, layer_number, model_types

STEERING_VECTORS = {"decoder_block": "resid_post", "self_attn": "attn_out", "mlp": "mlp_out"}
"""Layer types of the library steering-vectors, by the site that each is the output of."""


def load_thinkedit(path: str | Path, lm: LM, *, part: str | None = None) -> Direction:
    """A direction of ThinkEdit's own code: one tensor ``[layers, 1, d_model]``, long minus short, un-normalised.

    Args:
        part: ``"attn"`` (``resid_mid``) or ``"mlp"`` (``resid_post``); by default how the file name ends.

    Raises:
        ForeignFileError: pickled objects, another shape, or no telling which part.
        WrongModelError: another depth or width; ``attn`` in a post-norm family, where its authors' hook reads another site.
        FileNotFoundError, DamagedFileError: no file, or not a whole one.
    """
    part = part or Path(path).stem.rpartition("_")[2]
    if part not in ("attn", "mlp"):
        raise ForeignFileError(f"{path}: its name does not end in _attn or _mlp. Say which it is: part='attn' or part='mlp'.")
    if part == "attn" and lm.layout.blocks[0].post_attention_norm is not None:
        raise WrongModelError(
            f"ThinkEdit reads the input of post_attention_layernorm, which in {lm.name} ({lm.layout.row.family}) is attn_out and not the "
            "residual stream. Make the direction here: methods.thinkedit.direction."
        )
    found = _one_tensor(path)
    if found.ndim != 3 or found.shape[1] != 1:
        raise ForeignFileError(f"{path} has the shape {tuple(found.shape)}; ThinkEdit's files are [layers, 1, d_model].")
    return imported(lm, _all_rows(found[:, 0], lm, path), "resid_mid" if part == "attn" else "resid_post", "ThinkEdit", path)


def load_hidden_directions(path: str | Path, lm: LM, *, layer: int | None = None) -> Direction:
    """A direction of hidden-directions, brainscope or hotwire: ``[layers, d_model]``, or ``[d_model]`` with ``layer``.

    Row l is the output of block l (``hidden_states[l + 1]``), so ``resid_post``. Its last row was learned *after* the final norm
    and is yet applied before it, there as here: leave that layer out when it matters (``steering(..., layers=...)``).

    Raises:
        ForeignFileError: pickled objects, more than one tensor, another shape, or ``[d_model]`` without ``layer``.
        WrongModelError: another depth or width.
        FileNotFoundError, DamagedFileError: no file, or not a whole one.
    """
    found = _one_tensor(path)
    if found.ndim not in (1, 2) or (found.ndim == 1) != (layer is not None):
        raise ForeignFileError(
            f"{path} has the shape {tuple(found.shape)} and layer={layer}: give layer for one vector [d_model], and no layer for "
            "[layers, d_model]. A file of shape [layers, 1, d_model] is ThinkEdit's."
        )
    rows = _all_rows(found, lm, path) if layer is None else {layer: found}
    return imported(lm, rows, "resid_post", "hidden-directions", path)


def load_svec(path: str | Path, lm: LM) -> Direction:
    """A ``.svec`` file (JSON) of AISteer360 with one direction a layer (CAA), which is added to the output of the block.

    Raises:
        ForeignFileError: not a ``.svec`` file, or several directions a layer (per position, head or plane).
        WrongModelError: another model type, depth or width.
        DamagedFileError: not JSON, or NaN.
    """
    found = store.read_json(store.existing_file(path))
    try:
        rows = {layer_number(layer): torch.tensor(value, dtype=torch.float32) for layer, value in found["directions"].items()}
        hint = found["model_type"]
        if not all(_numeric(value) for value in found["directions"].values()):
            raise TypeError("a direction holds something else than numbers")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ForeignFileError(
            f"{path} is not a .svec file: {str(error)[:100]!r}. Expected model_type and directions by layer."
        ) from error
    if found.get("num_heads") or any(row.ndim != 2 or len(row) != 1 for row in rows.values()):
        shapes = str({layer: tuple(row.shape) for layer, row in rows.items()})[:100]
        raise ForeignFileError(f"{path}: directions {shapes} are not one a layer ([1, d_model], as of CAA): a direction is.")
    if str(hint) not in model_types(lm):
        raise WrongModelError(f"{path} is for models of type {str(hint)[:40]!r}, {lm.name} is {lm.model.config.model_type!r}.")
    return imported(lm, {layer: row[0] for layer, row in rows.items()}, "resid_post", "AISteer360", path)


def from_steering_vectors(found: Any, lm: LM) -> Direction:
    """A ``SteeringVector`` of the library steering-vectors, or a mapping with its fields (``store.read_pt`` of a file of one).

    Raises:
        ForeignFileError: not such a thing, or a layer type that is no site here (the output of a norm).
        WrongModelError: another depth or width.
    """
    read = found.get if isinstance(found, Mapping) else lambda name: getattr(found, name, None)
    rows, kind = read("layer_activations"), read("layer_type")
    if not isinstance(rows, Mapping) or not all(isinstance(v, Tensor) for v in rows.values()) or kind not in STEERING_VECTORS:
        raise ForeignFileError(
            f"This {type(found).__name__} has layer_type {kind!r}: expected tensors layer_activations by layer, and one of "
            f"{', '.join(STEERING_VECTORS)} (the output of a norm is no site that a direction can live at)."
        )
    try:
        layers = {layer_number(layer): _plain(row, "SteeringVector") for layer, row in rows.items()}
    except ValueError as error:
        raise ForeignFileError(
            f"This {type(found).__name__} counts its layers otherwise: {error}. Expected whole numbers."
        ) from error
    if len(layers) < len(rows):
        raise ForeignFileError(f"This {type(found).__name__} has two vectors of one layer: save the one that is meant.")
    return imported(lm, layers, STEERING_VECTORS[kind], "steering-vectors", "SteeringVector")


def _one_tensor(path: str | Path) -> Tensor:
    found = store.read_pt(path)
    if isinstance(found, Mapping) and len(found) == 1:
        (found,) = found.values()
    if not isinstance(found, Tensor):
        raise ForeignFileError(f"{path} holds a {type(found).__name__}, not one tensor: save the one that is meant by itself.")
    return _plain(found, path)


def _plain(tensor: Tensor, source: str | Path) -> Tensor:
    """A dense tensor in memory; ForeignFileError for one that is sparse, quantised or without data."""
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
