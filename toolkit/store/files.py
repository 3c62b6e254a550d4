"""Atomic writes of files and directories, JSON and JSON lines, and locks between processes."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from toolkit.store.errors import DamagedFileError
from toolkit.store.full import explain_full_disk
from toolkit.store.hints import read_from, typed
from toolkit.store.texts import numbered, parsed, read_text


def _namespace() -> str:
    """Return the id of this process's PID namespace, or "" if the system has none.

    It distinguishes containers, which may have equal host names and equal process ids.
    """
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return ""


# Temporary files carry this id and a process id, so that ``tidy`` removes only files of dead processes of this host. A restarted container
# counts as another host: files from before the restart stay.
HOST = hashlib.sha256(f"{socket.gethostname()}{_namespace()}".encode()).hexdigest()[:8]
PARTIAL = re.compile(r"\..*\.h(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.partial", re.DOTALL)


def tidy(directory: str | Path) -> None:
    """Remove the temporary files and directories that killed processes of this machine have left in a directory."""
    for path in Path(directory).glob(".*.partial"):
        match = PARTIAL.fullmatch(path.name)
        if match and match["host"] == HOST and not _alive(int(match["pid"])):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _partial(target: Path) -> Path:
    """Return the temporary path at which this process writes ``target`` before renaming it.

    The parent directory is created if needed, and temporary files that killed processes have left in it are removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    tidy(target.parent)
    return target.with_name(f".{target.name}.h{HOST}.{os.getpid()}.partial")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only tests whether the process exists
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # a process of another user
        return True
    return True


@contextmanager
def atomic(path: str | Path, *, needed: int | None = None) -> Iterator[Path]:
    """Context manager that writes a file atomically. It yields a temporary path, to which the body of the ``with`` statement writes.

    If the body succeeds, the temporary file is renamed to ``path``. If it fails, the temporary file is removed.

    Args:
        path: Final path of the file.
        needed: Number of bytes that will be written, for the message of DiskFullError; ``None`` if unknown.

    Raises:
        DiskFullError: there is not enough disk space. The message says how many bytes are free, and how many are needed (or, if ``needed``
            is ``None``, how many were written).
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
    """Create a directory if it is missing, check that files can be written to it, and return its path.

    Call this before a long computation, so that an unusable output directory is noticed at once.

    Raises:
        OSError: the directory cannot be created or written.
    """
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # it has no name: nothing is left over, and no other process can see it
            pass
    except OSError as error:
        raise OSError(f"Cannot write to {path}: {error.strerror or error}. Choose another output directory.") from error
    return path


def new_directory(path: str | Path) -> Path:
    """Check that a new directory can be created at a path, and return the path. There must be nothing or an empty directory at the path.

    The directory itself is not created. Its parent directory is created if it is missing.

    Raises:
        FileExistsError: the directory is not empty, or the path is a file.
        OSError: the parent directory cannot be written.
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
    """Context manager that writes a directory atomically. It yields a temporary directory, into which the body of ``with`` writes.

    If the body succeeds, the temporary directory is renamed to ``directory``. If it fails, the temporary directory is removed. So
    ``directory`` is complete or absent, even if the process is killed. An empty directory of this name is replaced.

    Raises:
        FileExistsError: the directory exists and is not empty, at the beginning or at the end.
        DiskFullError: there is not enough disk space.
        OSError: the directory cannot be written.
    """
    target = new_directory(directory)
    partial = _partial(target)
    remove(partial)  # left by a dead process with the same id: a process never fills one directory twice at the same time
    partial.mkdir()
    try:
        with explain_full_disk(target, partial):
            yield partial
            _place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _place(partial: Path, target: Path) -> None:
    """Rename a directory to ``target``, which may be an empty directory. Raise FileExistsError if another process has filled ``target``."""
    try:
        with suppress(FileNotFoundError):
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) or target.is_symlink():
            raise
        raise FileExistsError(
            f"{target} was empty or absent, and is not any more: another process has written it meanwhile. Use it as it is, or remove it first."
        ) from error


def is_whole(directory: str | Path) -> bool:
    """Return True if a directory holds a complete checkpoint or a complete adapter.

    Complete means that the config and the safetensors weights are there and not empty. If the weights are split into shards, all shards
    that the index lists must be there.

    Raises:
        DamagedFileError: the index of the shards is damaged.
    """
    folder = Path(directory)
    # Config and weights of a checkpoint, and of an adapter.
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
    """Write a text file atomically, and return its path."""
    content = text.encode()
    with atomic(path, needed=len(content)) as partial:
        partial.write_bytes(content)
    return Path(path)


def write_json(value: Any, path: str | Path) -> Path:
    """Write a value as JSON, atomically, and return the path. Dataclasses become JSON objects; NaN and infinity raise ValueError."""
    return write_text(json.dumps(value, indent=2, default=jsonable, allow_nan=False) + "\n", path)


def read_json(path: str | Path, expected: Any = Any, *, remedy: str = "Make the file again, or copy it again.") -> Any:
    """Return the value in a JSON file, checked against a type hint.

    Args:
        expected: Type hint that the value must fit, such as ``list[int]`` or ``{"name": str}`` (``hints.typed`` lists all forms).
        remedy: Advice to the user, put at the end of the message of DamagedFileError.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: the file is not JSON, or its value does not fit ``expected``; the message names the place in the file.
    """
    text = read_text(path)
    try:
        value = parsed(text)
    except ValueError as error:
        raise DamagedFileError(f"{path} is not valid JSON: {error}. {remedy}") from error
    with read_from(path, remedy):
        return typed(value, expected)


def read_lines(path: str | Path) -> list[str]:
    """Return the non-blank lines of a text file."""
    return [line for _, line in numbered(read_text(path))]


def append_line(value: Any, path: str | Path) -> Path:
    """Append an object, such as a dict or a dataclass, to a file as one line of JSON, and return the file's path.

    The file is created if it is missing. If the process is killed while it writes, the last line may be incomplete; ``read_rows`` skips
    an incomplete last line.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = (json.dumps(value, default=jsonable, allow_nan=False) + "\n").encode()
    with explain_full_disk(target, target, len(content)), target.open("ab") as stream:
        size = stream.tell()
        try:
            stream.write(content)
            stream.flush()
        except OSError:
            os.truncate(target, size)  # else the next line would follow half of this one
            raise
    return target


def read_rows(path: str | Path, expected: Any = Mapping[str, Any]) -> list[Any]:
    """Return the objects of a JSON-lines file, one per line. An incomplete last line is skipped.

    Args:
        expected: Type hint that each object must fit, such as ``{"name": str}`` (``hints.typed`` lists all forms).

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: a complete line is not JSON or does not fit ``expected``; the message names the line.
    """
    text = read_text(path)
    lines = list(numbered(text))
    rows = []
    for number, line in lines:
        try:
            row = parsed(line)
        except ValueError as error:
            # The last line begins an object and has no line end, which is written last: the process was killed while writing it.
            if number == lines[-1][0] and not text.endswith("\n") and line.startswith("{"):
                break
            raise DamagedFileError(f"{path}, line {number}: {error}. Remove that line, or make the file again.") from error
        with read_from(f"{path}, line {number}", "Remove that line, or make the file again."):
            rows.append(typed(row, expected, "the line"))
    return rows


def write_rows(rows: Iterable[Any], path: str | Path) -> Path:
    """Write objects, such as dicts or dataclasses, as a JSON-lines file (one per line), atomically. Return its path."""
    return write_text("".join(json.dumps(row, default=jsonable, allow_nan=False) + "\n" for row in rows), path)


def remove(path: str | Path) -> None:
    """Remove a file, or a directory with its contents. Do nothing if it does not exist.

    A directory is first renamed to a temporary name. So under its own name it is complete or absent, even if the process is killed.
    Temporary files that killed processes left in the same parent directory are removed too.
    """
    target = Path(path)
    if not target.parent.is_dir():
        return
    partial = _partial(target)
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(partial, ignore_errors=True)  # left by a dead process with the same id
        target.rename(partial)
        shutil.rmtree(partial)
    else:
        target.unlink(missing_ok=True)


def move(path: str | Path, target: str | Path) -> Path:
    """Move a file to ``target``, and return its new path. The directory of ``target`` is created if needed."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(path, target))


def safe_name(text: str) -> str:
    """Return a text as a safe name of a file or directory: every character except letters, digits and ``+-._`` becomes ``_``.

    A text of more than 80 characters is cut. If the name differs from the text, it ends in a hash of the text, so that different texts get
    different names. Such a name does not begin with a dot.

    >>> safe_name("budget_12"), safe_name("a/b")
    ('budget_12', 'a_b-c14cdd')
    """
    # "." and ".." always exist, so a name needs another character. A changed name does not start with a dot, so it is not hidden.
    name = "".join(c if c.isalnum() or c in "+-._" else "_" for c in text)[:80]
    if name == text and name.strip("."):
        return name
    return f"{name.lstrip('.')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def key(value: Any) -> str:
    """Return a hash of a value as 12 hexadecimal digits, for cache keys. The hash is that of the value's JSON text with sorted keys."""
    text = json.dumps(value, sort_keys=True, default=jsonable)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextmanager
def locked(path: str | Path, *, wait: bool = False) -> Iterator[bool]:
    """Context manager that holds a lock while its body runs. It yields True if this process holds the lock, False if another one does.

    The lock is on the file ``PATH.lock``, not on ``path`` itself. So it excludes only processes that also call this function. It is
    released when the body ends, or when the process ends for any reason.

    Args:
        path: Name of the lock, usually the file or directory to protect. It need not exist.
        wait: True to wait until the lock is free. False to yield False at once if it is not.
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
    """Convert a value that ``json`` cannot write: a dataclass to a dict, a tensor to a list, a Path to text. Return the result.

    Use it as ``json.dumps(value, default=jsonable)``.

    Raises:
        TypeError: the value is of another type.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON.")


def existing_file(path: str | Path) -> Path:
    """Return ``path`` as a Path. Raise FileNotFoundError if there is no such file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"No file at {path}.")
    return Path(path)
