"""Files that hold a direction, in the toolkit's format: safetensors with a text header."""

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
from toolkit.phases import Scope
from toolkit.sites import Site
from toolkit.store import DamagedFileError, ForeignFileError, WrongModelError
from toolkit.store.texts import parsed
from toolkit.types import Direction, Provenance

FORMAT, FORMAT_VERSION = "reasoning-length-vector", "1"
LONGER, SHORTER = "+ = longer", "+ = shorter"  # values of the header field ``sign``: the effect on thinking of adding the vectors
FIELDS = (
    "format", "format_version", "base_model", "revision", "fingerprint", "template_hash", "model_type", "n_layers", "hidden_size", "site",
    "apply_site", "apply_during", "positions", "method", "norm", "scale", "sign", "think_format", "n_pos", "n_neg", "seed", "notes_json", "metrics_json",
    "created", "tool",
)  # fmt: skip
"""Names of the fields in the text header of a file written by ``save``. A field without a value is left out.

- ``base_model``, ``revision``, ``fingerprint`` (hash of weights and config), ``template_hash`` (of the chat template): the model with which
  the direction was computed. ``model_type``, ``n_layers``, ``hidden_size``: type and size of the model that the direction is for.
- ``site``, ``apply_site``: kind of site at which the direction was measured, and at which to add it; both are the same.
- ``positions``: name of the rule that chose the token positions to average over. ``method``: name of the estimator.
- ``norm``, ``scale``, ``sign``: see ``save``.
- ``apply_during``: positions at which the vectors are meant to be added, such as ``all`` or ``newest`` (see ``phases.Scope.parse``). Adding
  them everywhere and adding them only to what the model writes are different interventions.
- ``think_format``: ``"OPENING TAG,CLOSING TAG"``, or ``"response"`` if the model does not mark its thinking.
- ``n_pos``, ``n_neg``: numbers of examples of long and of short thinking.
- ``seed``, ``notes_json``: seed and notes of the direction's provenance. ``metrics_json``: results measured with the direction.
- ``created``, ``tool``: time of writing, and name and version of this toolkit.
"""


class ExportError(ValueError):
    """A direction or a plan of head edits cannot be expressed in the requested file format, or by the weights of the model."""


def save(
    direction: Direction,
    path: str | Path,
    *,
    lm: LM,
    scale: float = 1.0,
    during: str = "all",
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """Save ``scale * direction`` as a safetensors file and return its path.

    The file has one tensor ``direction.<layer>`` per layer and a text header with ``FIELDS``. If ``scale`` is 1, the tensors are
    bit-identical to the direction.

    Args:
        direction: The direction; adding it lengthens thinking.
        path: The file to write.
        lm: The model that the direction is for.
        scale: Factor on the vectors; not 0. The header records it in the field ``scale``. The field ``norm`` is ``dose`` if the factor is
            not 1; otherwise ``unit`` if all nonzero vectors have norm 1, else ``raw``. The field ``sign`` is ``+ = longer`` if the factor
            is positive. If it is negative, adding the saved vectors shortens thinking, and ``sign`` is ``+ = shorter``.
        during: Positions at which the vectors are meant to be added, for the header (see ``steering.steering``). ``load`` does not return it.
        metrics: Results measured with the direction, a dict from name to value. They become the header's field ``metrics_json``. ``None``
            means no results.

    Raises:
        WrongModelError: the direction was made from other weights than those of ``lm``, or its shape does not fit ``lm``.
        ValueError: a vector, the scale, a metric, or a number in the notes of the direction's provenance is not finite; all saved vectors
            are zero; or ``during`` names an unknown phase.
    """
    vector, header = written(direction, lm, scale, metrics, during)
    return store.write_tensors({f"direction.{layer}": row for layer, row in enumerate(vector)}, header, path)


def load(path: str | Path, lm: LM | None = None) -> Direction:
    """Load a direction from a file that ``save`` wrote.

    ``save`` multiplies the vectors by a factor, which the header records as ``scale``. ``load`` divides by it, so it returns the original
    direction. Adding that direction lengthens thinking, even if the factor is negative.

    Args:
        path: The file.
        lm: Model with which the direction will be used; the direction is checked against it. ``None`` skips the check.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: the file is truncated or damaged, or a field of its header is missing, unknown or unreadable.
        ForeignFileError: the file has another format, or fields of its header (``apply_site``, ``sign``, ``norm``, ``scale``) contradict
            each other or the vectors.
        WrongModelError: the direction was made from other weights than those of ``lm``, or its shape does not fit ``lm``.
    """
    tensors, header = store.read_tensors(path)
    if (header.get("format"), header.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise ForeignFileError(
            f"{path} has the format {str(header.get('format'))[:40]!r} {header.get('format_version', '')[:20]}, not {FORMAT!r} {FORMAT_VERSION}. "
            "Files written by store.save are read by store.load."
        )
    return restored({layer_of(name, path): row for name, row in tensors.items()}, header, lm, path)


def written(
    direction: Direction, lm: LM, scale: float, metrics: Mapping[str, Any] | None, during: str
) -> tuple[Float[Tensor, "layers d_model"], dict[str, str]]:
    """Return the content of a file: ``(vectors, header)``.

    The vectors are ``scale * direction``. The header is a dict from the name of a field to its text. ``save`` describes the arguments and
    lists the errors.
    """
    edits.check_direction(direction, lm)
    Scope.parse(during)
    vector = direction.vector * scale
    if not torch.isfinite(vector).all() or not vector.any():
        raise ValueError(f"scale={scale} times this direction is not finite, or zero everywhere: it is not saved.")
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
        "apply_during": during,
        "positions": direction.positions,
        "method": direction.estimator,
        "norm": _norm(vector, vector.dtype) if scale == 1 else "dose",
        "scale": repr(float(scale)),
        "sign": LONGER if scale > 0 else SHORTER,
        # "open tag,closing tag", or "response" if the model does not mark its thinking.
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


def restored(rows: Mapping[int, Tensor], header: Mapping[str, str], lm: LM | None, path: str | Path) -> Direction:
    """Return the direction that the vectors and the header of a file describe: the inverse of ``written``. ``load`` lists the errors.

    Args:
        rows: Layer -> vector ``[d_model]``.
        header: Name of a field -> its text.
        lm: Model against which the direction is checked; ``None`` skips the check.
        path: The file, for error messages.
    """
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
        Scope.parse(header.get("apply_during", "all"))  # version 0.1.0 did not write it
    except DamagedFileError:
        raise
    except (KeyError, ValueError) as error:
        raise DamagedFileError(f"{path}: a field of its header is missing or cannot be read: {error!r:.120}.") from error
    vector = _stacked(rows, shape, path, missing=1 if 0 not in rows else 0)  # a GGUF control vector has none for layer 0
    # norm may say "raw" of unit vectors, but not "unit" of others. The vectors may have been rounded to bf16 before they were written in
    # another type: GGUF files hold F32.
    unit = said["norm"] == "unit" and _norm(vector, torch.bfloat16) == "unit"
    true = {
        "norm": "dose" if scale != 1 else "unit" if unit else "raw",
        "sign": LONGER if scale > 0 else SHORTER,
        "apply_site": site,
    }
    if said != true or not 0 < abs(scale) < math.inf:
        raise ForeignFileError(
            f"The header of {path} says {str(said)[:100]}, but site {site}, scale {scale} and the numbers mean {true}. Save it again."
        )
    try:
        direction = Direction(vector / scale, site, *names, *numbers, provenance)
    except ValueError as error:
        raise DamagedFileError(f"{path}: {error} Save it again.") from error
    if lm is not None:
        edits.check_direction(direction, lm)
    return direction


def _norm(vector: Float[Tensor, "layers d_model"], rounded: torch.dtype) -> str:
    """Return the value of the header's field ``norm``: ``"unit"`` if all nonzero vectors have norm 1 up to rounding, else ``"raw"``.

    Args:
        vector: The vectors.
        rounded: Type to which the vectors were rounded.
    """
    norms = vector.double().norm(dim=-1)
    rounding = max(1e-5, 8 * torch.finfo(rounded).eps)  # the second is larger for bf16 and fp16
    return "unit" if ((norms == 0) | ((norms - 1).abs() <= rounding)).all() else "raw"


def layer_of(name: str, path: str | Path) -> int:
    """Return the layer number in the tensor name ``direction.<layer>``. Raise ForeignFileError if the name has another pattern."""
    kind, _, layer = name.partition(".")
    try:
        if kind != "direction":
            raise ValueError(kind)
        return layer_number(layer)
    except ValueError as error:
        raise ForeignFileError(f"{path} holds a tensor {name[:40]!r}: expected only direction.<layer>.") from error


def layer_number(layer: Any) -> int:
    """Return a layer number (text or int) as an int.

    Raise ValueError unless it is a whole number of at most 6 digits, written without leading zeros.
    """
    text = str(layer)
    if isinstance(layer, bool) or not text.isdecimal() or len(text) > 6 or str(int(text)) != text:
        raise ValueError(f"{text[:40]!r} is not the number of a layer")
    return int(text)


def _stacked(
    rows: Mapping[int, Tensor], shape: tuple[int, int], source: str | Path, *, missing: int | None = None
) -> Float[Tensor, "layers d_model"]:
    """Return vectors, stacked by layer, as one tensor ``[layers, d_model]``. Layers without a vector are zero.

    Args:
        rows: Layer -> vector ``[d_model]``.
        shape: ``(layers, d_model)`` of the result.
        source: The file, for error messages.
        missing: Exact number of layers without a vector. ``None`` allows any number.

    Raises:
        ForeignFileError: there is no vector, vectors differ in dtype or are not floating point, or all are zero.
        WrongModelError: a vector has another width, or belongs to a layer that does not exist.
        DamagedFileError: a vector holds NaN or infinity; or the number of layers without a vector differs from ``missing``.
    """
    if not rows:
        raise ForeignFileError(f"{source} holds no direction.")
    kind = next(iter(rows.values())).dtype
    for layer, row in rows.items():
        if not 0 <= layer < shape[0] or row.shape != shape[1:]:
            raise WrongModelError(
                f"{source} has a vector of shape {tuple(row.shape)} for layer {layer}; the model has layers 0..{shape[0] - 1} "
                f"of width {shape[1]}. The file was made for another model, or numbers its layers differently."
            )
        if row.dtype != kind or not row.is_floating_point():
            raise ForeignFileError(f"{source}: layer {layer} is {row.dtype}; expected one floating point type in all layers.")
        if not torch.isfinite(row.double()).all():
            raise DamagedFileError(f"{source} holds NaN or infinity at layer {layer}: write it again from its source.")
    if missing is not None and len(rows) != shape[0] - missing:
        raise DamagedFileError(
            f"{source} holds vectors of {len(rows)} layers, but its header says {shape[0]} layers: some are missing. Save it again."
        )
    if not any(row.double().any() for row in rows.values()):
        raise ForeignFileError(f"{source} is zero in every layer, so it cannot steer. Write it again from its source.")
    vector = torch.zeros(shape, dtype=kind)
    for layer, row in rows.items():
        vector[layer] = row
    return vector


def as_direction(lm: LM, rows: Mapping[int, Tensor], kind: str, tool: str, source: str | Path, **notes: Any) -> Direction:
    """Return vectors from another tool as a direction for ``lm``. Layers without a vector are zero.

    How the vectors were computed is unknown. So the direction's provenance names only ``lm``, the tool and the file. Whether adding the
    direction makes thinking longer or shorter is also unknown, except for files of ThinkEdit.

    Args:
        lm: Model with which the direction will be used.
        rows: Layer -> vector ``[d_model]``.
        kind: Kind of site to which the vectors belong, such as ``"resid_post"``.
        tool: Name of the tool that wrote the vectors.
        source: The file.
        notes: Further facts to record in the provenance.
    """
    vector = _stacked(rows, (lm.layout.n_layers, lm.layout.d_model), source)
    provenance = lm.provenance(source=f"{tool}: {Path(source).name}", norm=_norm(vector, vector.dtype), **notes)
    return Direction(vector, kind, "unknown", f"imported from {tool}", 0, 0, provenance)
