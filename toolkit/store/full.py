"""Turn errors about a full disk into DiskFullError, which says how much space was needed and how much is free."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from toolkit.store.errors import DiskFullError

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file may not grow so large"}
_NUMBER = re.compile(r"\b(?:os error|errno) (\d+)", re.IGNORECASE)  # how Rust and Arrow write the number of a system error
_TORCH = re.compile("iostream error|inline_container|file write failed")  # torch.save, which does not say why


@contextmanager
def explain_full_disk(target: Path, partial: Path, needed: int | None = None) -> Iterator[None]:
    """Context manager that raises DiskFullError if its body fails for lack of disk space. Other errors are raised unchanged.

    The disk may be full, the user's quota may be used up, or the file may have reached the largest size allowed.

    Args:
        target: File or directory that the error message names.
        partial: Temporary file or directory that the body writes; its size goes into the message if ``needed`` is ``None``.
        needed: Number of bytes that the body will write; ``None`` if unknown.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, DiskFullError) or (why := _reason(error)) is None:
            raise
        need = f"{_size(needed)} were needed" if needed is not None else f"it stopped after {_size(_written(partial))}"
        free = _size(shutil.disk_usage(target.parent).free)
        raise DiskFullError(
            f"Cannot write {target}: {why}; {need}, {free} are free there. No partial file was left. "
            "Free some space or choose another directory, and run it again."
        ) from error


def _reason(error: Exception) -> str | None:
    """Return a text that says which limit was hit, such as "the quota is used up"; ``None`` if the error is not about disk space."""
    number = getattr(error, "errno", None)
    if number is None and (match := _NUMBER.search(str(error))):
        number = int(match[1])
    if isinstance(error, RuntimeError) and _TORCH.search(str(error)):
        return "the system refused a write, as a full disk does"
    return _FULL.get(number) if number is not None else None


def _written(path: Path) -> int:
    """Return the number of bytes in a file, or in all files of a directory."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"
