"""Files and directories that are whole or not there: atomic writes, JSON and JSON lines, claims between processes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from toolkit.store.errors import DamagedFileError
from toolkit.store.full import said_if_full
from toolkit.store.hints import read_from, typed
from toolkit.store.texts import numbered, parsed, read_text


@contextmanager
def atomic(path: str | Path, *, needed: int | None = None) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed to it if the body succeeds and removed if it fails.

    Args:
        needed: Bytes that will be written, if known, for the error of a full disk.

    Raises:
        DiskFullError: no room for it; says how much was needed and how much is free.
        OSError: the directory cannot be created or written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with said_if_full(target, partial, needed):
            yield partial
            os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def writable(directory: str | Path) -> Path:
    """Make sure ``directory`` exists and can be written, before any work is done for it.

    Raises:
        OSError: it cannot; says which path.
    """
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with atomic(path / ".writable") as probe:
            probe.touch()
        (path / ".writable").unlink(missing_ok=True)  # another process may try the same
    except OSError as error:
        raise OSError(f"Cannot write to {path}: {error.strerror or error}. Choose another output directory.") from error
    return path


def new_directory(path: str | Path) -> Path:
    """Make sure a directory can be written to and holds nothing yet.

    Raises:
        FileExistsError: it is not empty.
        OSError: it cannot be written.
    """
    if Path(path).is_dir() and any(Path(path).iterdir()):
        raise FileExistsError(f"{path} is not empty: choose another directory, or remove it first.")
    return writable(path)


@contextmanager
def filling(directory: str | Path) -> Iterator[Path]:
    """A temporary directory that becomes ``directory`` if the body succeeds and is removed if it fails.

    Raises:
        FileExistsError: the directory exists and is not empty.
        DiskFullError: no room for it.
        OSError: it cannot be written.
    """
    target = new_directory(directory)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        with said_if_full(target, partial):
            yield partial
            target.rmdir()
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(text: str, path: str | Path) -> Path:
    """Write a text file atomically."""
    content = text.encode()
    with atomic(path, needed=len(content)) as partial:
        partial.write_bytes(content)
    return Path(path)


def write_json(value: Any, path: str | Path) -> Path:
    """Write JSON atomically; dataclasses become objects. NaN is an error."""
    return write_text(json.dumps(value, indent=2, default=jsonable, allow_nan=False) + "\n", path)


def read_json(path: str | Path, expected: Any = Any, *, remedy: str = "Make the file again, or copy it again.") -> Any:
    """Read a JSON file.

    Args:
        expected: The type hint that the value must fit, see :func:`~toolkit.store.hints.typed`.
        remedy: What to do about a file that is damaged, for the error.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: it is not JSON, or not what is expected; says where.
    """
    text = read_text(path)
    try:
        value = parsed(text)
    except ValueError as error:
        raise DamagedFileError(f"{path} is not valid JSON: {error}. {remedy}") from error
    with read_from(path, remedy):
        return typed(value, expected)


def read_lines(path: str | Path) -> list[str]:
    """Non-empty lines of a text file."""
    return [line for _, line in numbered(read_text(path))]


def append_line(value: Any, path: str | Path) -> Path:
    """Add one JSON object as a line to a file (made if missing). A kill can tear the last line only: see :func:`read_rows`."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = (json.dumps(value, default=jsonable, allow_nan=False) + "\n").encode()
    with said_if_full(target, target, len(content)), target.open("ab") as stream:
        whole = stream.tell()
        try:
            stream.write(content)
            stream.flush()
        except OSError:
            os.truncate(target, whole)  # or the next line would be written behind half of this one
            raise
    return target


def read_rows(path: str | Path, expected: Any = Mapping[str, Any]) -> list[Any]:
    """The objects of a JSON-lines file; a torn last line is left out.

    Args:
        expected: The type hint that each line must fit, see :func:`~toolkit.store.hints.typed`.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: another line is not JSON, or a line is not what is expected; names it.
    """
    text = read_text(path)
    lines = list(numbered(text))
    rows = []
    for number, line in lines:
        try:
            row = parsed(line)
        except ValueError as error:
            # The beginning of an object, without the end of a line, which is written last: torn by a kill.
            if number == lines[-1][0] and not text.endswith("\n") and line.startswith("{"):
                break
            raise DamagedFileError(f"{path}, line {number}: {error}. Remove that line, or make the file again.") from error
        with read_from(f"{path}, line {number}", "Remove that line, or make the file again."):
            rows.append(typed(row, expected, "the line"))
    return rows


def write_rows(rows: Iterable[Any], path: str | Path) -> Path:
    """Write a JSON-lines file atomically."""
    return write_text("".join(json.dumps(row, default=jsonable, allow_nan=False) + "\n" for row in rows), path)


def remove(path: str | Path) -> None:
    """Remove a file or a directory if it is there."""
    if Path(path).is_dir():
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)


def key(value: Any) -> str:
    """Twelve hexadecimal digits of everything in ``value`` (JSON with sorted keys): the name of what depends on all of it."""
    text = json.dumps(value, sort_keys=True, default=jsonable)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextmanager
def claimed(path: str | Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone may work on ``path`` now. The claim ends with the body, or with the process, however it ends.

    Args:
        wait: Until whoever works on it is done.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def jsonable(value: Any) -> Any:
    """What JSON cannot hold by itself: dataclasses as objects, tensors as lists, paths as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON.")


def existing(path: str | Path) -> Path:
    """The path of a file that is there; FileNotFoundError if it is not."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"No file at {path}.")
    return Path(path)
