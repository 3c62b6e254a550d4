"""Directions, head scores, moments and plans: one safetensors file each, with their provenance in a JSON header."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from toolkit.store.errors import DamagedFileError, ForeignFileError, WrongModelError
from toolkit.store.files import atomic, existing
from toolkit.types import Direction, HeadEdit, HeadScores, Moments, Plan, Provenance

FORMAT, FORMAT_VERSION = "reasoning-length-toolkit", 1
_TYPES: dict[str, Any] = {cls.__name__: cls for cls in (Direction, HeadEdit, HeadScores, Moments, Plan, Provenance)}
_TUPLES = {"labels", "n", "edits"}
T = TypeVar("T", Direction, HeadScores, Moments, Plan)


def save(value: Direction | HeadScores | Moments | Plan, path: str | Path) -> Path:
    """Save a value as one safetensors file with its provenance in the header.

    Raises:
        ValueError: a tensor holds NaN or infinity.
    """
    tensors: dict[str, torch.Tensor] = {}
    body = _encode(value, "", tensors)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{type(value).__name__}.{name} holds NaN or infinity: not saved to {path}.")
    header = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "value": json.dumps(body, allow_nan=False)}
    return write_tensors(tensors, header, path)


def load(path: str | Path, kind: type[T], *, fingerprint: str | None = None) -> T:
    """Load a value of type ``kind``.

    Args:
        fingerprint: Fingerprint of the model it will be used with; ``None`` to only look at it.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: truncated or not safetensors.
        ForeignFileError: not written by this toolkit, or another kind of value.
        WrongModelError: made from other weights.
    """
    tensors, header = read_tensors(path)
    if header.get("format") != FORMAT:
        raise ForeignFileError(f"{path} was not written by {FORMAT}: its format is {header.get('format')!r}.")
    if header.get("format_version") != str(FORMAT_VERSION):
        raise ForeignFileError(
            f"{path} has format version {header.get('format_version')}, this toolkit reads {FORMAT_VERSION}: update it."
        )
    value = _decode(json.loads(header["value"]), tensors)
    if not isinstance(value, kind):
        raise ForeignFileError(f"{path} holds a {type(value).__name__}, not a {kind.__name__}.")
    if fingerprint is not None and value.provenance.fingerprint != fingerprint:
        raise WrongModelError(
            f"{path} was made from {value.provenance.model} (weights {value.provenance.fingerprint[:12]}), "
            f"not from the model at hand (weights {fingerprint[:12]}). Extract it again on this model."
        )
    return value


def _encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach()
        return {"tensor": path}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _encode(getattr(value, f.name), _join(path, f.name), tensors) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, "fields": fields}
    if isinstance(value, Mapping):
        return {"map": {k: _encode(v, _join(path, k), tensors) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return [_encode(v, _join(path, str(i)), tensors) for i, v in enumerate(value)]
    return value


def _decode(body: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(body, list):
        return [_decode(item, tensors) for item in body]
    if not isinstance(body, dict):
        return body
    if "tensor" in body:
        return tensors[body["tensor"]]
    if "map" in body:
        return {k: _decode(v, tensors) for k, v in body["map"].items()}
    fields = {k: _decode(v, tensors) for k, v in body["fields"].items()}
    return _TYPES[body["type"]](**{k: tuple(v) if k in _TUPLES else v for k, v in fields.items()})


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def write_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: str | Path) -> Path:
    """Write a safetensors file atomically, bit by bit, with its metadata."""
    with atomic(path) as partial:
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, partial, metadata=dict(metadata))
    return Path(path)


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: truncated or not safetensors.
    """
    try:
        with safe_open(existing(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise DamagedFileError(f"{path} is not a whole safetensors file: {error}.") from error
