"""Directions as files: our own container (safetensors), GGUF control vectors, a folder for the hub."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import edits, store
from toolkit.lm import LM
from toolkit.sites import Site
from toolkit.store import DamagedFileError, ForeignFileError, WrongModelError
from toolkit.store.texts import parsed
from toolkit.types import Direction, Provenance

FORMAT, FORMAT_VERSION = "reasoning-length-vector", "1"
LONGER, SHORTER = "+ = longer", "+ = shorter"
FIELDS = (
    "format", "format_version", "base_model", "revision", "fingerprint", "template_hash", "model_type", "n_layers", "hidden_size", "site",
    "apply_site", "positions", "method", "norm", "scale", "sign", "think_format", "n_pos", "n_neg", "seed", "notes_json", "metrics_json",
    "created", "tool",
)  # fmt: skip
"""Everything that a header may say."""
LLAMA_CPP = {"mistral": "llama", "gemma3_text": "gemma3"}
"""Architecture names of llama.cpp where they are not the ``model_type`` of transformers, up to its underscores."""


class ExportError(ValueError):
    """What is to be written cannot be said in the format, or by the weights, that it is to be written to."""


# --- our own container ---------------------------------------------------------------------------------------


def save(direction: Direction, path: str | Path, *, lm: LM, scale: float = 1.0, metrics: Mapping[str, Any] | None = None) -> Path:
    """Save ``scale * direction`` as safetensors: tensors ``direction.<layer>`` as they are (bit by bit at scale 1), the rest as text.

    Args:
        lm: The model that the direction is for.
        scale: Baked into the numbers; the file then says ``norm: dose``, and ``sign: + = shorter`` if it is negative.
        metrics: What was measured with it, for ``metrics_json``.

    Raises:
        WrongModelError: the direction is of other weights or another shape than ``lm``.
        ValueError: a vector or the scale holds NaN or infinity, or the scale is 0.
    """
    vector, header = _written(direction, lm, scale, metrics)
    return store.write_tensors({f"direction.{layer}": row for layer, row in enumerate(vector)}, header, path)


def load(path: str | Path, lm: LM | None = None) -> Direction:
    """The direction of a file of :func:`save`, equal to the one saved (a baked scale is divided out again).

    Args:
        lm: The model it will be used with; ``None`` to only look at it.

    Raises:
        FileNotFoundError, DamagedFileError: no file, or not a whole one.
        ForeignFileError: not of this format, or it contradicts itself about site, sign or normalisation.
        WrongModelError: made from other weights, or for another depth or width.
    """
    tensors, header = store.read_tensors(path)
    if (header.get("format"), header.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise ForeignFileError(
            f"{path} has the format {str(header.get('format'))[:40]!r} {header.get('format_version', '')[:20]}, not {FORMAT!r} {FORMAT_VERSION}. "
            "store.load reads what store.save wrote."
        )
    return _restored({_layer(name, path): row for name, row in tensors.items()}, header, lm, path)


def _written(
    direction: Direction, lm: LM, scale: float, metrics: Mapping[str, Any] | None
) -> tuple[Float[Tensor, "layers d_model"], dict[str, str]]:
    edits.check_direction(direction, lm)
    vector = direction.vector * scale
    if not torch.isfinite(vector).all() or not vector.any():
        raise ValueError(f"scale={scale} times this direction is not finite, or zero everywhere: nothing sound can be saved.")
    p, tags = direction.provenance, lm.tags
    known = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base_model": p.model,
        "revision": p.revision,
        "fingerprint": p.fingerprint,
        "template_hash": p.template_hash,
        "model_type": lm.model.config.model_type,
        "n_layers": lm.layout.n_layers,
        "hidden_size": lm.layout.d_model,
        "site": direction.kind,
        "apply_site": direction.kind,
        "positions": direction.positions,
        "method": direction.estimator,
        "norm": _norm(vector) if scale == 1 else "dose",
        "scale": repr(float(scale)),
        "sign": LONGER if scale > 0 else SHORTER,
        "think_format": tags and (f"{tags.open or ''},{tags.close}" if tags.close else "response"),
        "n_pos": direction.n_pos,
        "n_neg": direction.n_neg,
        "seed": p.seed,
        "notes_json": json.dumps(p.notes, default=store.jsonable, allow_nan=False),
        "metrics_json": json.dumps(metrics or {}, default=store.jsonable, allow_nan=False),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tool": f"reasoning-length-toolkit {p.toolkit_version}",
    }
    return vector, {key: str(value) for key, value in known.items() if value is not None}


def _restored(rows: Mapping[int, Tensor], header: Mapping[str, str], lm: LM | None, path: str | Path) -> Direction:
    """The direction that :func:`_written` was given, from its header and what a file carried of its rows."""
    if unknown := sorted(set(header) - set(FIELDS)):
        raise DamagedFileError(f"{path}: its header has the unknown field {unknown[0][:40]!r}. Save it again.")
    try:
        shape, numbers = (int(header["n_layers"]), int(header["hidden_size"])), (int(header["n_pos"]), int(header["n_neg"]))
        origin = (header["base_model"], header.get("revision"), header["fingerprint"], header["template_hash"])
        seed = int(header["seed"]) if "seed" in header else None
        notes = store.checked(parsed(header["notes_json"]), Mapping[str, Any], path, "Save it again.")
        provenance = Provenance(*origin, header["tool"].rpartition(" ")[2], seed, notes)
        site, scale = Site(header["site"], 0).kind, float(header["scale"])
        said = {key: header[key] for key in ("norm", "sign", "apply_site")}
        names = (header["positions"], header["method"])
    except DamagedFileError:
        raise
    except (KeyError, ValueError) as error:
        raise DamagedFileError(f"{path}: a field of its header is missing or cannot be read: {error!r:.120}.") from error
    vector = _stacked(rows, shape, path, missing=1 if 0 not in rows else 0)  # a control vector has none of layer 0
    unit = said["norm"] == "unit" and _norm(vector) == "unit"
    true = {
        "norm": "dose" if scale != 1 else "unit" if unit else "raw",
        "sign": LONGER if scale > 0 else SHORTER,
        "apply_site": site,
    }
    if said != true or not 0 < abs(scale) < math.inf:
        raise ForeignFileError(
            f"{path} says {str(said)[:100]}, but by its site {site}, scale {scale} and numbers it is {true}. Save it again."
        )
    try:
        direction = Direction(vector / scale, site, *names, *numbers, provenance)
    except ValueError as error:
        raise DamagedFileError(f"{path}: {error} Save it again.") from error
    if lm is not None:
        edits.check_direction(direction, lm)
    return direction


def _norm(vector: Float[Tensor, "layers d_model"]) -> str:
    """``"unit"`` if every vector that is not zero has norm 1 up to rounding, else ``"raw"``."""
    norms = vector.double().norm(dim=-1)
    rounding = max(1e-5, 8 * torch.finfo(vector.dtype).eps)
    return "unit" if ((norms == 0) | ((norms - 1).abs() <= rounding)).all() else "raw"


def _layer(name: str, path: str | Path) -> int:
    kind, _, layer = name.partition(".")
    try:
        if kind != "direction":
            raise ValueError(kind)
        return layer_number(layer)
    except ValueError as error:
        raise ForeignFileError(f"{path} holds a tensor {name[:40]!r}: expected only direction.<layer>.") from error


def layer_number(layer: Any) -> int:
    """The number of a layer from JSON's text or a number. Raises ValueError unless it is written as a whole number is."""
    text = str(layer)
    if isinstance(layer, bool) or not text.isdecimal() or len(text) > 6 or str(int(text)) != text:
        raise ValueError(f"{text[:40]!r} is no layer")
    return int(text)


def _stacked(
    rows: Mapping[int, Tensor], shape: tuple[int, int], source: str | Path, *, missing: int | None = None
) -> Float[Tensor, "layers d_model"]:
    """Rows by layer as one tensor; layers without a row are zero.

    Args:
        missing: How many layers may and must be without a row; ``None`` is any number.

    Raises:
        ForeignFileError: no row, several types, or nothing but zeros.
        WrongModelError: a row of another width, or of a layer that is not there.
        DamagedFileError: NaN or infinity, or too few rows.
    """
    if not rows:
        raise ForeignFileError(f"{source} holds no direction.")
    kind = next(iter(rows.values())).dtype
    for layer, row in rows.items():
        if not 0 <= layer < shape[0] or row.shape != shape[1:]:
            raise WrongModelError(
                f"{source} has a vector of shape {tuple(row.shape)} for layer {layer}; the model has layers 0..{shape[0] - 1} "
                f"of width {shape[1]}. It was made for another model, or counts its layers otherwise."
            )
        if row.dtype != kind or not row.is_floating_point():
            raise ForeignFileError(f"{source}: layer {layer} is {row.dtype}; expected one floating point type in all layers.")
        if not torch.isfinite(row.double()).all():
            raise DamagedFileError(f"{source} holds NaN or infinity at layer {layer}: nothing sound can be steered with it.")
    if missing is not None and len(rows) != shape[0] - missing:
        raise DamagedFileError(
            f"{source} holds vectors of {len(rows)} layers, its header says {shape[0]}: some are lost. Save it again."
        )
    if not any(row.double().any() for row in rows.values()):
        raise ForeignFileError(f"{source} is zero in every layer: it steers nothing. Write it again from its source.")
    vector = torch.zeros(shape, dtype=kind)
    for layer, row in rows.items():
        vector[layer] = row
    return vector


def imported(lm: LM, rows: Mapping[int, Tensor], kind: str, tool: str, source: str | Path, **notes: Any) -> Direction:
    """A direction of unknown provenance, taken to be meant for ``lm``: its notes say where it is from."""
    vector = _stacked(rows, (lm.layout.n_layers, lm.layout.d_model), source)
    provenance = lm.provenance(source=f"{tool}: {Path(source).name}", norm=_norm(vector), **notes)
    return Direction(vector, kind, "unknown", f"imported from {tool}", 0, 0, provenance)


# --- GGUF control vectors ------------------------------------------------------------------------------------


def save_gguf(direction: Direction, path: str | Path, *, lm: LM, scale: float = 1.0, drop_layer_0: bool = False) -> Path:
    """Save ``scale * direction`` as a control vector, F32: llama.cpp adds ``direction.k`` to the output of block k, at every position.

    Args:
        drop_layer_0: Leave the vector of layer 0 out, which the format cannot carry.

    Raises:
        ExportError: a direction of another site than ``resid_post``, a vector at layer 0 that may not be dropped, or numbers
            too large for F32.
        ImportError: without the package gguf.
        WrongModelError, ValueError: as :func:`save`.
    """
    if direction.kind != "resid_post":
        raise ExportError(
            f"A control vector is added to the output of a block, this direction lives at {direction.kind}: there it would be "
            "another intervention. Make it at resid_post, or write an adapter or a safetensors file."
        )
    if direction.vector[0].any() and not drop_layer_0:
        raise ExportError(
            f"Layer 0 has a vector (norm {direction.norms[0]:.3g}), but control vectors start at layer 1: llama.cpp rejects direction.0. "
            "Pass drop_layer_0=True to leave it out, knowing that the rest then acts alone."
        )
    vector, header = _written(direction, lm, scale, None)
    single = vector[1:].float().cpu()
    if not torch.isfinite(single).all() or not single.any():
        raise ExportError("In F32, which control vectors are stored in, layers 1 and above are not finite, or all zero.")
    fields: dict[str, str | int] = {
        "controlvector.model_hint": lm.model.config.model_type,
        "controlvector.layer_count": len(single),
    }
    private = {f"toolkit.{key}": value for key, value in header.items()}
    rows = {f"direction.{k}": row.numpy() for k, row in enumerate(single, 1)}
    return store.write_gguf("controlvector", fields | private, rows, path)


def load_gguf(path: str | Path, lm: LM, *, model_hint: str | None = None) -> Direction:
    """A control vector of :func:`save_gguf`, repeng or llama.cpp, at ``resid_post``.

    What :func:`save_gguf` wrote comes back with its provenance (in F32, without layer 0); of another writer's file only the model
    type, width and depth can be checked, and the sign is its own.

    Args:
        model_hint: A model type to accept besides that of ``lm``. A file without one is accepted by width and depth.

    Raises:
        ForeignFileError: not a control vector by llama.cpp's rules (1-D F32 tensors ``direction.k``, k >= 1), or of another site.
        WrongModelError: another model type, depth or width; for our own files, other weights.
        FileNotFoundError, DamagedFileError, ImportError: no file, not a whole one, or no package gguf.
    """
    fields, tensors = store.read_gguf(path)
    if (arch := fields.get("general.architecture")) != "controlvector":
        raise ForeignFileError(f"{path} is a GGUF file of architecture {str(arch)[:40]!r}, not a control vector.")
    hint = fields.get("controlvector.model_hint")
    if hint is not None and _plain(str(hint)) not in {_plain(name) for name in model_types(lm) | {model_hint or ""}}:
        raise WrongModelError(
            f"{path} is for models of type {str(hint)[:40]!r}, {lm.name} is {lm.model.config.model_type!r}. "
            f"If you know that it is meant for this model, pass model_hint={hint!r}."
        )
    rows = {}
    for name, array in tensors.items():
        k = _layer(name, path)
        if k == 0 or array.ndim != 1 or array.dtype != "float32":
            raise ForeignFileError(
                f"{path}: {name} is {array.ndim}-D {array.dtype}; control vectors are 1-D float32 and start at direction.1, so that "
                "llama.cpp rejects this file. Whoever wrote it may count layers otherwise: write it again from its source."
            )
        rows[k] = torch.from_numpy(array)
    header = {key.removeprefix("toolkit."): str(value) for key, value in fields.items() if key.startswith("toolkit.")}
    # steerkit says where its vectors were read.
    site = header.get("site") or str(fields.get("hook_site", "resid_post"))
    if site.removeprefix("hook_") != "resid_post":
        raise ForeignFileError(
            f"{path} says that its vectors are of {site[:40]}; a control vector acts at the output of a block only."
        )
    return _restored(rows, header, lm, path) if header else imported(lm, rows, "resid_post", "GGUF", path, model_hint=hint)


def model_types(lm: LM) -> set[str]:
    """Names of the kind of model that ``lm`` is, by transformers and by llama.cpp."""
    own = {lm.model.config.model_type, lm.model.config.get_text_config().model_type}
    return own | {LLAMA_CPP[name] for name in own if name in LLAMA_CPP}


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


# --- a folder for the hub ------------------------------------------------------------------------------------


def save_folder(
    direction: Direction,
    directory: str | Path,
    *,
    lm: LM,
    card: str,
    figures: Mapping[str, str] | None = None,
    drop_layer_0: bool = False,
) -> Path:
    """Write a folder that can be uploaded as it is: ``README.md``, ``direction.safetensors``, and ``direction.gguf`` where possible.

    Args:
        card: The model card, see :func:`report.vector_card`.
        figures: File name -> text (HTML or SVG) of what the card shows.
        drop_layer_0: Write the control vector also if that leaves out a vector at layer 0. By default there is none then.

    Raises:
        FileExistsError, OSError: the directory is not empty, or cannot be written.
        ValueError: a figure's name is a path, or is taken.
    """
    if bad := [
        name for name in figures or () if not name or Path(name).name != name or name.startswith(("README.", "direction.", "."))
    ]:
        raise ValueError(f"Figures cannot be called {', '.join(bad)}: give plain file names other than README.* and direction.*.")
    with store.atomic_directory(directory) as partial:
        for name, text in {"README.md": card, **(figures or {})}.items():
            store.write_text(text, partial / name)
        save(direction, partial / "direction.safetensors", lm=lm)
        if direction.kind == "resid_post" and (drop_layer_0 or not direction.vector[0].any()):
            save_gguf(direction, partial / "direction.gguf", lm=lm, drop_layer_0=drop_layer_0)
    return Path(directory)
