"""Containers of other tools: archives of ``torch.save`` (never running code) and GGUF."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolkit.store.errors import DamagedFileError, ForeignFileError
from toolkit.store.files import atomic, existing_file


def read_pt(path: str | Path) -> Any:
    """What a file of ``torch.save`` holds: tensors and plain containers only, no code is ever run.

    Raises:
        FileNotFoundError: no such file.
        ForeignFileError: it holds pickled objects, or is no archive of ``torch.save`` at all.
        DamagedFileError: truncated.
    """
    refused = (
        f"{path} holds more than tensors and plain containers in an archive of torch.save: refused, since reading a pickle can run any "
        "code. If you trust it, load it by hand, and save its tensors alone with torch.save."
    )
    with existing_file(path).open("rb") as file:
        if file.read(2) != b"PK":  # not a zip archive, so a bare pickle or noise
            raise ForeignFileError(refused)
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ForeignFileError(refused) from error
    except (
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        OSError,
    ) as error:  # by the damage
        raise DamagedFileError(f"{path} is not a whole archive of torch.save: {' '.join(str(error).split())[:120]}.") from error


def write_gguf(arch: str, fields: Mapping[str, str | int], tensors: Mapping[str, np.ndarray], path: str | Path) -> Path:
    """Write a GGUF file atomically: text and uint32 fields, and tensors in their own type.

    Raises:
        ImportError: without the package gguf.
    """
    with atomic(path) as partial:
        writer = _gguf().GGUFWriter(partial, arch)
        for key, value in fields.items():
            (writer.add_uint32 if isinstance(value, int) else writer.add_string)(key, value)
        for name, tensor in tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(tensor))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Path(path)


def read_gguf(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields and unquantised tensors of a GGUF file; a quantised tensor comes as raw bytes.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: truncated or not GGUF.
        ImportError: without the package gguf.
    """
    reader_of = _gguf().GGUFReader
    try:
        reader = reader_of(existing_file(path))
        fields = {k: f.contents() for k, f in reader.fields.items()}
        tensors = {t.name: np.array(t.data) for t in reader.tensors}
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError) as error:  # by what is damaged
        raise DamagedFileError(f"{path} is not a whole GGUF file: {' '.join(str(error).split())[:120]}.") from error
    if len(tensors) < len(reader.tensors):
        raise DamagedFileError(f"{path} holds two tensors of one name: write it again from its source.")
    return fields, tensors


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the package gguf: pip install 'reasoning-length-toolkit[gguf]'.") from error
    return gguf
