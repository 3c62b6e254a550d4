"""Files and directories that are whole or not there: atomic writes, JSON and JSON lines, claims between processes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from toolkit.store.errors import DamagedFileError
from toolkit.store.full import explain_full_disk
from toolkit.store.hints import read_from, typed
from toolkit.store.texts import numbered, parsed, read_text


def _namespace() -> str:
    """The space in which process ids count: two containers may have one host name, and each its own process 1."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return ""


# A container that is started again is another host: what a kill left in its former life is not removed, nor taken for its own.
HOST = hashlib.sha256(f"{socket.gethostname()}{_namespace()}".encode()).hexdigest()[:8]
PARTIAL = re.compile(r"\..*\.h(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.partial", re.DOTALL)


def _partial(target: Path) -> Path:
    """The temporary path of this process beside ``target``; those that processes of this machine left when killed are removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for path in target.parent.glob(".*.partial"):
        match = PARTIAL.fullmatch(path.name)
        if match and match["host"] == HOST and not _alive(int(match["pid"])):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return target.with_name(f".{target.name}.h{HOST}.{os.getpid()}.partial")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


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
    partial = _partial(target)
    try:
        with explain_full_disk(target, partial, needed):
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
        with tempfile.TemporaryFile(dir=path):  # has no name: nothing is left, and no other process meets it
            pass
    except OSError as error:
        raise OSError(f"Cannot write to {path}: {error.strerror or error}. Choose another output directory.") from error
    return path


def new_directory(path: str | Path) -> Path:
    """Make sure a directory can be made, and holds nothing yet; it is not made.

    Raises:
        FileExistsError: it is not empty, or a file.
        OSError: its parent cannot be written.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{path} is a file: choose another directory, or remove it first.")
    if target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{path} is not empty: choose another directory, or remove it first.")
    writable(target.parent)
    return target


@contextmanager
def atomic_directory(directory: str | Path) -> Iterator[Path]:
    """A temporary directory that becomes ``directory`` if the body succeeds and is removed if it fails.

    ``directory`` appears whole or not at all, however the process ends. An empty one that is there already is replaced.

    Raises:
        FileExistsError: the directory exists and is not empty.
        DiskFullError: no room for it.
        OSError: it cannot be written.
    """
    target = new_directory(directory)
    partial = _partial(target)
    remove(partial)  # of a dead process that had this one's id: no process fills one directory twice at once
    partial.mkdir()
    try:
        with explain_full_disk(target, partial):
            yield partial
            if target.exists():
                target.rmdir()
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_whole(directory: str | Path) -> bool:
    """Whether a directory holds a finished checkpoint or adapter: its config, and all of its weights (every shard of an index).

    Raises:
        DamagedFileError: an index that is none.
    """
    folder = Path(directory)
    kinds = (("config.json", "model.safetensors"), ("adapter_config.json", "adapter_model.safetensors"))
    for config, weights in kinds:
        index = folder / f"{weights}.index.json"
        needed = {weights}
        if index.is_file():
            needed = {
                *read_json(index, {"weight_map": Mapping[str, str]}, remedy="Make or copy the model again.")["weight_map"].values()
            }
        if needed and all((folder / name).is_file() and (folder / name).stat().st_size for name in (config, *needed)):
            return True
    return False


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
    with explain_full_disk(target, target, len(content)), target.open("ab") as stream:
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


def move(path: str | Path, target: str | Path) -> Path:
    """Move a file; the directory of ``target`` is made."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(path, target))


def safe_name(text: str) -> str:
    """A text as the name of one file or directory: letters, digits and ``+-._`` stay. A text that is changed by it gets a hash after it,
    so that two texts never share a name, and none leads elsewhere."""
    name = "".join(c if c.isalnum() or c in "+-._" else "_" for c in text)[:80]
    if name == text and name.strip("."):
        return name
    return f"{name.lstrip('.')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def key(value: Any) -> str:
    """Twelve hexadecimal digits of everything in ``value`` (JSON with sorted keys): the name of what depends on all of it."""
    text = json.dumps(value, sort_keys=True, default=jsonable)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextmanager
def locked(path: str | Path, *, wait: bool = False) -> Iterator[bool]:
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


def existing_file(path: str | Path) -> Path:
    """The path of a file that is there; FileNotFoundError if it is not."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"No file at {path}.")
    return Path(path)
