"""File formats of other tools: ``torch.save`` archives, which are read without running code, and GGUF files."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolkit.store.errors import DamagedFileError, ForeignFileError
from toolkit.store.files import atomic, existing_file


def read_pt(path: str | Path) -> Any:
    """Return the content of a ``torch.save`` file: tensors in plain containers such as dicts and lists. No code in the file is run.

    Raises:
        FileNotFoundError: no such file.
        ForeignFileError: the file holds objects other than tensors and plain containers, or is not a ``torch.save`` archive.
        DamagedFileError: the file is truncated.
    """
    refused = (
        f"{path} is not a torch.save archive of tensors and plain containers only: refused, since reading a pickle can run any code. "
        "If you trust the file, load it by hand and save only its tensors with torch.save."
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
    ) as error:  # which of them depends on the damage
        raise DamagedFileError(
            f"{path} is not a complete torch.save archive: {' '.join(str(error).split())[:120]}. Copy it again."
        ) from error


def write_pt(value: Any, path: str | Path) -> Path:
    """Write tensors in plain containers with ``torch.save``, atomically, and return the path. ``read_pt`` reads the file.

    Raises:
        ValueError: the value holds something that ``torch.load(weights_only=True)`` would refuse. No file is written.
    """
    # In memory first: torch.save writes the name of its file into the file, and the name of a temporary file differs from run to run.
    content = io.BytesIO()
    torch.save(value, content)
    content.seek(0)
    try:
        torch.load(content, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is not written: its content is more than tensors in plain containers.") from error
    with atomic(path) as partial:
        partial.write_bytes(content.getvalue())
    return Path(path)


def write_gguf(arch: str, fields: Mapping[str, str | int | float], tensors: Mapping[str, np.ndarray], path: str | Path) -> Path:
    """Write a GGUF file atomically, and return its path.

    Args:
        arch: Model architecture, such as ``"llama"`` (the GGUF field ``general.architecture``).
        fields: Other metadata fields: name -> value. Whole numbers are written as uint32, other numbers as float32.
        tensors: Tensors by name; they keep their dtype.

    Raises:
        ImportError: the package gguf is not installed.
    """
    with atomic(path) as partial:
        writer = _gguf().GGUFWriter(partial, arch)
        # gguf writes a file in three steps, in this order: header, metadata, tensors.
        for key, value in fields.items():
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add(key, value)
        for name, tensor in tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(tensor))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Path(path)


def read_gguf(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the metadata and the tensors of a GGUF file as two dicts: field -> value, and tensor name -> array.

    A quantised tensor is returned as its raw bytes.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: the file is truncated or not GGUF.
        ImportError: the package gguf is not installed.
    """
    reader_of = _gguf().GGUFReader
    try:
        reader = reader_of(existing_file(path))
        fields = {k: f.contents() for k, f in reader.fields.items()}
        tensors = {t.name: np.array(t.data) for t in reader.tensors}
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError) as error:  # which depends on the damage
        raise DamagedFileError(
            f"{path} is not a complete GGUF file: {' '.join(str(error).split())[:120]}. Copy it again."
        ) from error
    if len(tensors) < len(reader.tensors):
        raise DamagedFileError(f"{path} holds two tensors of the same name: write it again from its source.")
    return fields, tensors


def read_gguf_header(path: str | Path) -> tuple[str, dict[str, tuple[int, ...]]]:
    """Return the architecture of a GGUF file, and the shape of each tensor by name. The tensors themselves are not read.

    Shapes are in torch's order: ``[outputs, inputs]`` for a linear layer.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: the file is truncated, not GGUF, or names no architecture.
        ImportError: the package gguf is not installed.
    """
    reader_of = _gguf().GGUFReader
    try:
        reader = reader_of(existing_file(path))
        arch = reader.fields["general.architecture"].contents()
        return str(arch), {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError) as error:  # which depends on the damage
        raise DamagedFileError(
            f"{path} is not a complete GGUF file: {' '.join(str(error).split())[:120]}. Copy it again."
        ) from error


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the package gguf: pip install 'reasoning-length-toolkit[gguf]'.") from error
    return gguf
