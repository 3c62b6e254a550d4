"""Files of a model directory: read the names, dtypes and shapes of tensors without loading the tensors, and copy chosen files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from toolkit.store.errors import DamagedFileError


def read_headers(path: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return ``{name: (dtype, shape)}`` for all tensors in a safetensors file, without loading the tensors.

    Dtypes are written as in the file, such as ``"BF16"``.

    Raises:
        DamagedFileError: the file is not a complete safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"{path} is not a complete safetensors file: {str(error)[:160]}. Copy it again.") from error


def copy_files(source: str | Path, target: str | Path, wanted: Callable[[str], bool]) -> None:
    """Copy the files in one directory that pass a test on their name into another directory.

    Subdirectories are not copied, and files that exist in ``target`` are not overwritten.

    Args:
        source: Directory to copy from.
        target: Directory to copy to; it must exist.
        wanted: Function that gets a file's name, and returns True if the file is to be copied.
    """
    for path in sorted(Path(source).iterdir()):
        if path.is_file() and wanted(path.name) and not (Path(target) / path.name).exists():
            shutil.copyfile(path, Path(target) / path.name)
