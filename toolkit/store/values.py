"""Save and load the classes ``Direction``, ``HeadScores``, ``Moments`` and ``Plan`` of ``toolkit.types``: one safetensors file per value.

The tensors are stored as tensors of the file. All other fields, with the provenance (model and settings), are JSON in its metadata.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from toolkit.store.errors import DamagedFileError, ForeignFileError, WrongModelError
from toolkit.store.files import atomic, existing_file
from toolkit.store.hints import Misfit, brief, read_from, typed
from toolkit.store.texts import parsed
from toolkit.types import Direction, HeadScores, Moments, Plan

FORMAT, FORMAT_VERSION = "reasoning-length-toolkit", 1
AGAIN = "The file is damaged: run the command that wrote it (such as `toolkit direction`) again, or copy it again."
_TYPES = {cls.__name__ for cls in (Direction, HeadScores, Moments, Plan)}
T = TypeVar("T", Direction, HeadScores, Moments, Plan)


def save(value: Direction | HeadScores | Moments | Plan, path: str | Path) -> Path:
    """Save a direction, head scores, moments or a plan as one safetensors file, and return its path.

    Raises:
        ValueError: a tensor holds NaN or infinity, or the provenance notes are not JSON-serialisable.
        DiskFullError: there is not enough disk space.
    """
    tensors: dict[str, torch.Tensor] = {}
    body = _encode(value, "", tensors)
    if isinstance(value, HeadScores) and value.absent:
        # A file holds numbers only: 0 where there is no head, which loading turns into NaN again.
        tensors["score"] = torch.where(value.present, tensors["score"].cpu(), 0.0)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{type(value).__name__}.{name} holds NaN or infinity: not saved to {path}.")
    # Try to decode the header before it is written, so that no file is written that ``load`` cannot read.
    try:
        _decode(json.loads(json.dumps(body, allow_nan=False)), type(value), dict(tensors), "")
    except (Misfit, TypeError) as error:
        raise ValueError(
            f"This {type(value).__name__} is not saved to {path}, since it could not be loaded again: {error}."
        ) from error
    header = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "value": json.dumps(body, allow_nan=False)}
    return write_tensors(tensors, header, path)


def load(path: str | Path, kind: type[T], *, fingerprint: str | None = None) -> T:
    """Return the value in a file that ``save`` wrote. The header and the tensors are checked against the fields of ``kind``.

    Args:
        kind: Class of the value: ``Direction``, ``HeadScores``, ``Moments`` or ``Plan``.
        fingerprint: Fingerprint (hash of weights and config) of the model with which the value must have been computed. ``None``: any
            model.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: the file is truncated or not safetensors; a field is missing, has the wrong type, or is not a field of the
            class; the shapes of two tensors do not fit together; or a tensor holds NaN or infinity.
        ForeignFileError: the file was not written by this toolkit, or holds another kind of value.
        WrongModelError: the value was computed with a model that has another fingerprint.
    """
    tensors, header = read_tensors(path)
    if header.get("format") != FORMAT:
        raise ForeignFileError(f"{path} was not written by {FORMAT}: its format is {brief(header.get('format'))}.")
    if header.get("format_version") != str(FORMAT_VERSION):
        raise ForeignFileError(
            f"{path} has format version {brief(header.get('format_version'))}, this toolkit reads {FORMAT_VERSION}: update the toolkit."
        )
    with read_from(path, AGAIN):
        value = _read(header.get("value"), tensors, kind, path)
    made_from = value.provenance.fingerprint
    if fingerprint is not None and made_from != fingerprint:
        raise WrongModelError(
            f"{path} was made from {value.provenance.model[:60]}, whose weights differ from those of the model at hand. "
            "Extract it again on this model."
        )
    return value


def _read(text: str | None, tensors: Mapping[str, torch.Tensor], kind: type[T], path: str | Path) -> T:
    """Return the value of class ``kind`` in the file ``path``. Every tensor must belong to exactly one field of the value.

    Args:
        text: JSON text in the file's header.
        tensors: Tensors of the file, by name.
    """
    try:
        body = parsed(text or "")
    except ValueError as error:
        raise Misfit(f"the field 'value' of its header is not JSON: {error}") from error
    held = typed(body, {"type": str, "fields": Mapping[str, Any]}, "its header")["type"]
    if held not in _TYPES:
        raise Misfit(f"its header holds a value of the unknown type {brief(held)}, expected {kind.__name__}")
    if held != kind.__name__:
        raise ForeignFileError(f"{path} holds a {held}, not a {kind.__name__}.")
    rest = dict(tensors)
    value = _decode(body, kind, rest, "")
    if rest:
        raise Misfit(f"the tensor {brief(next(iter(rest)))} belongs to no field of its {held}")
    return value


def _encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a value in JSON form, in which every tensor is replaced by ``{"tensor": name}``.

    Args:
        path: Place of the value in the outermost value, such as ``"direction.vector"``; ``""`` for the outermost value. A tensor's place
            is its name.
        tensors: Dict to which every tensor is added, under its name.
    """
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach()
        return {"tensor": path}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # An empty tuple that is the default is left out: files without the field can also be read by earlier versions.
        written = [f.name for f in dataclasses.fields(value) if f.default != () or getattr(value, f.name) != ()]
        fields = {name: _encode(getattr(value, name), _join(path, name), tensors) for name in written}
        return {"type": type(value).__name__, "fields": fields}
    if isinstance(value, Mapping):
        return {"map": {k: _encode(v, _join(path, k), tensors) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return [_encode(v, _join(path, str(i)), tensors) for i, v in enumerate(value)]
    return value


def _decode(body: Any, hint: Any, tensors: dict[str, torch.Tensor], at: str) -> Any:
    """Return the value that ``_encode`` turned into ``body``.

    Args:
        hint: Type hint that the value must fit.
        tensors: Tensors of the file, by name. Those that the value uses are removed from it.
        at: Place of the value in the outermost value, as ``path`` in ``_encode``.

    Raises:
        Misfit: the body does not fit the hint.
    """
    if isinstance(hint, types.UnionType):  # X | None
        return None if body is None else _decode(body, get_args(hint)[0], tensors, at)
    if dataclasses.is_dataclass(hint):
        return _dataclass(body, hint, tensors, at)
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Mapping:
        items = typed(body, {"map": Mapping[str, Any]}, at)["map"]
        return {k: _decode(v, parts[1], tensors, _join(at, k)) for k, v in items.items()}
    if origin is tuple and dataclasses.is_dataclass(parts[0]):
        return tuple(_decode(item, parts[0], tensors, f"{at}[{i}]") for i, item in enumerate(typed(body, list[Any], at)))
    if hasattr(hint, "array_type"):  # jaxtyping's
        return _tensor(body, hint, tensors, at)
    return _plain(body) if hint is Any else typed(body, hint, at)


def _dataclass(body: Any, cls: Any, tensors: dict[str, torch.Tensor], at: str) -> Any:
    where, hints = at or "its header", get_type_hints(cls)
    # A field with a default may be missing: files of earlier versions do not have it.
    optional = {f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    needed = {name: Any for name in hints if name not in optional}
    encoded = typed(body, {"type": Literal[cls.__name__], "fields": needed}, where)["fields"]
    if unknown := sorted(set(encoded) - set(hints)):
        raise Misfit(f"{where} has the unknown field {brief(unknown[0])}: a {cls.__name__} has {', '.join(hints)}")
    fields = {name: _decode(encoded[name], hint, tensors, _join(at, name)) for name, hint in hints.items() if name in encoded}
    try:
        return cls(**fields)
    except (ValueError, IndexError) as error:
        raise Misfit(str(error).rstrip(".")) from error


def _tensor(body: Any, hint: Any, tensors: dict[str, torch.Tensor], at: str) -> torch.Tensor:
    name = typed(body, {"tensor": str}, at)["tensor"]
    if name != at or name not in tensors:
        raise Misfit(f"{at} names the tensor {brief(name)}, expected {at!r}, which the file must hold")
    tensor = tensors.pop(name)
    if not isinstance(tensor, hint):
        raise Misfit(f"{at} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, expected floats [{hint.dim_str}]")
    if not torch.isfinite(tensor).all():
        raise Misfit(f"{at} holds NaN or infinity")
    return tensor


def _plain(body: Any) -> Any:
    """Return provenance notes as they were before ``_encode``. Notes are plain JSON values without tensors, so no type hint is needed."""
    if isinstance(body, list):
        return [_plain(item) for item in body]
    if isinstance(body, Mapping):
        return {k: _plain(v) for k, v in typed(body, {"map": Mapping[str, Any]}, "provenance.notes")["map"].items()}
    return body


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def write_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: str | Path) -> Path:
    """Write tensors and text metadata to a safetensors file, atomically, and return its path. Tensors are written bit for bit."""
    with atomic(path, needed=sum(v.nbytes for v in tensors.values())) as partial:
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, partial, metadata=dict(metadata))
    return Path(path)


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, by name, and its text metadata.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: the file is truncated or not safetensors.
    """
    try:
        with safe_open(existing_file(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise DamagedFileError(
            f"{path} is not a complete safetensors file: {' '.join(str(error).split())[:120]}. Copy it again."
        ) from error
