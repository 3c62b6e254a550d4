"""Read directions of other tools from their files, without installing the tools.

These files rarely name their model. So only width and number of layers are checked, and the model type if the file has one. The provenance
of a loaded direction names the model ``lm`` that was passed to the loader. Layers are numbered from 0, as in this toolkit.

No file says whether adding its direction makes thinking longer or shorter. It is known only for ThinkEdit's files: there, adding the
direction makes thinking longer.
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
from toolkit.vectors.files import as_direction, layer_number
from toolkit.vectors.gguf import model_types, note_on_last_layer

STEERING_VECTORS = {"decoder_block": "resid_post", "self_attn": "attn_out", "mlp": "mlp_out"}
"""Layer type in the library steering-vectors -> the kind of site in this toolkit to which its vectors belong."""
AFTER_NORM = "measured after the final norm, and added before it"
"""Note on a vector of the last layer that was computed from the last of transformers' ``hidden_states``."""


def load_thinkedit(path: str | Path, lm: LM, *, part: str | None = None) -> Direction:
    """Load a direction from a file of the released code of ThinkEdit (arXiv:2503.22048): one tensor ``[layers, 1, d_model]``.

    The direction is the mean activation over responses with long thinking, minus the mean activation over responses with short thinking. It
    is not normalised. Adding it lengthens thinking.

    For the part ``mlp``, the vector of the last layer is inexact: ThinkEdit's code computes it from activations *after* the final norm, but
    it is added before that norm. The provenance has a note on it, ``notes["last_layer"]``. To leave out the last layer when you steer, pass
    only the others: ``edits.steering(..., layers=...)``.

    Args:
        path: The file (``.pt``).
        lm: Model with which the direction will be used.
        part: ThinkEdit's name for the site of the vectors: ``"attn"`` (``resid_mid`` in this toolkit) or ``"mlp"`` (``resid_post``).
            ``None`` takes it from the end of the file's name, ``_attn`` or ``_mlp``.

    Raises:
        ForeignFileError: the file holds pickled objects or a tensor of another shape; or ``part`` is ``None`` and the file's name does not
            end in ``_attn`` or ``_mlp``.
        WrongModelError: number of layers or width differ from those of ``lm``; or the part is ``attn`` and the model has a norm after
            attention (post-norm). In such models ThinkEdit's code reads ``attn_out`` instead of the residual stream.
        FileNotFoundError: there is no such file.
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
    rows = _all_rows(tensor[:, 0], lm, path)
    if part == "attn":
        return as_direction(lm, rows, "resid_mid", "ThinkEdit", path)
    return as_direction(lm, rows, "resid_post", "ThinkEdit", path, last_layer=AFTER_NORM)


def load_hidden_directions(path: str | Path, lm: LM, *, layer: int | None = None) -> Direction:
    """Load a file of the tools hidden-directions, brainscope or hotwire as a direction at ``resid_post``.

    The file holds one tensor. Its shape is ``[layers, d_model]``, or ``[d_model]`` if it holds the vector of a single layer. Row l belongs
    to the output of block l (``hidden_states[l + 1]`` in transformers).

    The vector of the last layer is inexact. Those tools compute it from activations *after* the final norm. But they add it before that
    norm, and so does this toolkit. The provenance has a note on it, ``notes["last_layer"]``. To leave out the last layer when you steer, pass
    only the others: ``edits.steering(..., layers=...)``.

    Args:
        path: The file (``.pt``).
        lm: Model with which the direction will be used.
        layer: Layer of the vector, counted from 0, if the tensor is ``[d_model]``. ``None`` if it is ``[layers, d_model]``.

    Raises:
        ForeignFileError: the file holds pickled objects, several tensors, or a tensor of another shape; or the file holds a single vector
            but ``layer`` is ``None``; or it holds all layers but ``layer`` is a number.
        WrongModelError: number of layers or width differ from those of ``lm``.
        FileNotFoundError: there is no such file.
        DamagedFileError: the file is truncated.
    """
    tensor = _one_tensor(path)
    if tensor.ndim not in (1, 2) or (tensor.ndim == 1) != (layer is not None):
        raise ForeignFileError(
            f"{path} has shape {tuple(tensor.shape)} and layer={layer}: give layer for one vector [d_model], and no layer for "
            "[layers, d_model]. Files of shape [layers, 1, d_model] are ThinkEdit's: use load_thinkedit."
        )
    rows = _all_rows(tensor, lm, path) if layer is None else {layer: tensor}
    notes = {"last_layer": AFTER_NORM} if lm.layout.n_layers - 1 in rows else {}
    return as_direction(lm, rows, "resid_post", "hidden-directions", path, **notes)


def load_svec(path: str | Path, lm: LM) -> Direction:
    """Load a ``.svec`` file (JSON) of AISteer360 as a direction at ``resid_post``.

    The file must have one vector per layer, like the files of AISteer360's method CAA (contrastive activation addition). Files with several
    vectors per layer, such as one per token position or per head, cannot be read. A vector of the last layer may be inexact, and gets a note,
    as in ``load_gguf``.

    Args:
        path: The file.
        lm: Model with which the direction will be used.

    Raises:
        ForeignFileError: the file is not a ``.svec`` file, or has several vectors per layer.
        WrongModelError: model type, number of layers or width differ from those of ``lm``.
        FileNotFoundError: there is no such file.
        DamagedFileError: the file is not JSON, or holds NaN.
    """
    content = store.read_json(store.existing_file(path))
    try:
        # The check of the values follows, since torch.tensor also accepts True and False.
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
    notes = note_on_last_layer(lm, rows)
    return as_direction(lm, {layer: row[0] for layer, row in rows.items()}, "resid_post", "AISteer360", path, **notes)


def from_steering_vectors(vector: Any, lm: LM) -> Direction:
    """Return a ``SteeringVector`` of the library steering-vectors as a direction.

    Args:
        vector: The ``SteeringVector``, or a mapping with the same fields (``layer_activations``, ``layer_type``).
        lm: Model with which the direction will be used.

    Raises:
        ForeignFileError: a field is missing or malformed, or the vectors belong to the output of a norm, where this toolkit has no site.
        WrongModelError: number of layers or width differ from those of ``lm``.
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
    """Return the tensor of a ``.pt`` file that holds a single tensor, or a dict whose only value is a tensor.

    Raise ForeignFileError if the file holds anything else.
    """
    content = store.read_pt(path)
    if isinstance(content, Mapping) and len(content) == 1:
        (content,) = content.values()
    if not isinstance(content, Tensor):
        raise ForeignFileError(f"{path} holds a {type(content).__name__}, not one tensor: save the tensor alone.")
    return _plain(content, path)


def _plain(tensor: Tensor, source: str | Path) -> Tensor:
    """Return a tensor detached and on the CPU. Raise ForeignFileError if it is sparse, quantised or has no data (meta device)."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ForeignFileError(f"{source} holds a sparse, quantised or empty tensor: save it as a plain one.")
    return tensor.detach().cpu()


def _numeric(value: Any) -> bool:
    """Return True if a value is a number, or a list (at any depth) of numbers. Booleans are not numbers here."""
    return all(map(_numeric, value)) if isinstance(value, list) else isinstance(value, int | float) and not isinstance(value, bool)


def _all_rows(vector: Tensor, lm: LM, path: str | Path) -> dict[int, Tensor]:
    """Return a dict from layer number to the layer's row of ``vector``, ``[layers, d_model]``.

    Raise WrongModelError if ``lm`` has another number of layers than ``vector`` has rows.
    """
    if len(vector) != lm.layout.n_layers:
        raise WrongModelError(
            f"{path} has {len(vector)} layers, {lm.name} has {lm.layout.n_layers}: it was made for another model."
        )
    return dict(enumerate(vector))
