"""Saving and loading: the only room that reads or writes files.

Values (directions, scores, moments, plans) are one safetensors file each, with a JSON header that carries their
provenance. Rollouts and report rows are parquet. Every write goes to a temporary name and is renamed when
complete, so a file that exists is whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from toolkit.types import Direction, HeadEdit, HeadScores, Moments, Plan, Problem, Provenance, Rollout, Span

FORMAT, FORMAT_VERSION = "reasoning-length-toolkit", 1
_TYPES: dict[str, Any] = {cls.__name__: cls for cls in (Direction, HeadEdit, HeadScores, Moments, Plan, Provenance)}
_TUPLES = {"labels", "n", "edits"}
T = TypeVar("T", Direction, HeadScores, Moments, Plan)


class StoreError(ValueError):
    """A file cannot be used: foreign, damaged, or made from another model."""


class ForeignFileError(StoreError):
    """The file was not written by this toolkit, or holds another kind of value."""


class DamagedFileError(StoreError):
    """The file is truncated or not readable as what its name says."""


class WrongModelError(StoreError):
    """The artifact was made from other weights than the model it is to be used with."""


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed to it if the body succeeds and removed if it fails.

    Raises:
        OSError: the directory cannot be created or written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
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
        OSError: it cannot be written.
    """
    target = new_directory(directory)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(text: str, path: str | Path) -> Path:
    """Write a text file atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(value: Any, path: str | Path) -> Path:
    """Write JSON atomically; dataclasses become objects. NaN is an error."""
    return write_text(json.dumps(value, indent=2, default=jsonable, allow_nan=False) + "\n", path)


def read_json(path: str | Path) -> Any:
    """Read a JSON file; DamagedFileError if it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedFileError(f"{path} is not valid JSON: {error}.") from error


def read_lines(path: str | Path) -> list[str]:
    """Non-empty lines of a text file."""
    return [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]


def append_line(value: Any, path: str | Path) -> Path:
    """Add one JSON object as a line to a file (made if missing). A kill can tear the last line only: see :func:`read_rows`."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(value, default=jsonable, allow_nan=False) + "\n")
    return target


def read_rows(path: str | Path) -> list[Any]:
    """The objects of a JSON-lines file; a torn last line is left out.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: another line is not JSON; names it.
    """
    lines = read_lines(existing(path))
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise DamagedFileError(f"{path}, line {number}: {error}.") from error
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


# --- values as safetensors -----------------------------------------------------------------------------------


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


# --- tensors of other tools ----------------------------------------------------------------------------------


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


def existing(path: str | Path) -> Path:
    """The path of a file that is there; FileNotFoundError if it is not."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"No file at {path}.")
    return Path(path)


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
    with existing(path).open("rb") as file:
        if file.read(2) != b"PK":  # not a zip archive, so a bare pickle or noise
            raise ForeignFileError(refused)
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ForeignFileError(refused) from error
    except (RuntimeError, EOFError, ValueError, LookupError) as error:
        raise DamagedFileError(f"{path} is not a whole archive of torch.save: {error}.") from error


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
        reader = reader_of(existing(path))
        return {k: f.contents() for k, f in reader.fields.items()}, {t.name: np.array(t.data) for t in reader.tensors}
    except (ValueError, IndexError) as error:
        raise DamagedFileError(f"{path} is not a whole GGUF file: {error}.") from error


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the package gguf: pip install 'reasoning-length-toolkit[gguf]'.") from error
    return gguf


# --- rollouts as parquet -------------------------------------------------------------------------------------


def rollout_table(rollouts: Iterable[Rollout]) -> pd.DataFrame:
    """One row per rollout; spans as ``think_start``, ``think_stop``, ... with -1 for none."""
    rows = []
    for r in rollouts:
        row = {f.name: getattr(r, f.name) for f in dataclasses.fields(r) if f.name not in ("think", "answer")}
        for name, span in (("think", r.think), ("answer", r.answer)):
            row[f"{name}_start"], row[f"{name}_stop"] = (-1, -1) if span is None else (span.start, span.stop)
        rows.append(row)
    return pd.DataFrame(rows)


def _rollout(row: Mapping[str, Any]) -> Rollout:
    def span(name: str) -> Span | None:
        return Span(row[f"{name}_start"], row[f"{name}_stop"]) if row[f"{name}_start"] >= 0 else None

    def floats(name: str) -> tuple[float, ...] | None:
        return None if row[name] is None else tuple(row[name])

    plain = {k: row[k] for k in ("problem_id", "sample", "prompt_len", "finish", "text", "correct")}
    return Rollout(
        **plain,
        token_ids=tuple(row["token_ids"]),
        think=span("think"),
        answer=span("answer"),
        logprobs=floats("logprobs"),
        entropies=floats("entropies"),
    )


def open_rollouts(directory: str | Path, header: Mapping[str, Any]) -> list[Rollout]:
    """Start or resume a directory of rollouts: the rollouts already there, or ``[]``.

    Raises:
        WrongModelError: it was begun with another header (model, sampling or problems).
    """
    path = writable(directory) / "header.json"
    if not path.exists():
        write_json(header, path)
        return []
    old, new = read_json(path), json.loads(json.dumps(header, default=jsonable))
    differing = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
    if differing:
        raise WrongModelError(
            f"{directory} holds rollouts made with another {', '.join(differing)}: "
            f"{ {k: old.get(k) for k in differing} } there, { {k: new.get(k) for k in differing} } now. Choose another directory."
        )
    return load_rollouts(directory)


def append_rollouts(rollouts: Sequence[Rollout], directory: str | Path) -> Path:
    """Add one part file to a directory of rollouts."""
    parts = sorted(Path(directory).glob("part-*.parquet"))
    index = int(parts[-1].stem.split("-")[1]) + 1 if parts else 0
    path = Path(directory) / f"part-{index:05d}.parquet"
    with atomic(path) as partial:
        rollout_table(rollouts).to_parquet(partial)
    return path


def load_rollouts(path: str | Path) -> list[Rollout]:
    """Rollouts of a directory of parts, or of one parquet file, ordered as written.

    Raises:
        FileNotFoundError: nothing there.
        DamagedFileError: a part is not a parquet file of rollouts.
    """
    source = Path(path)
    files = sorted(source.glob("part-*.parquet")) if source.is_dir() else [source]
    if not source.exists() or not (files or (source / "header.json").exists()):
        raise FileNotFoundError(f"No rollouts at {source}.")
    found: list[Rollout] = []
    for file in files:
        try:
            found += [_rollout(row) for row in pd.read_parquet(file, dtype_backend="pyarrow").to_dict("records")]
        except (OSError, KeyError, ValueError) as error:
            raise DamagedFileError(f"{file} is not a parquet file of rollouts: {error}.") from error
    return found


def save_table(table: pd.DataFrame, path: str | Path) -> Path:
    """Write a table as parquet atomically."""
    with atomic(path) as partial:
        table.to_parquet(partial)
    return Path(path)


def read_table(path: str | Path) -> pd.DataFrame:
    """A table from a jsonl, csv or parquet file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file.
    """
    readers = {".jsonl": lambda p: pd.read_json(p, lines=True, dtype=False), ".csv": pd.read_csv, ".parquet": pd.read_parquet}
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"No file at {file}.")
    if file.suffix not in readers:
        raise ValueError(f"{file}: cannot read {file.suffix!r} files; give one of {', '.join(readers)}.")
    return readers[file.suffix](file)


def load_problems(path: str | Path) -> list[Problem]:
    """Problems of a JSONL file with the fields ``id``, ``messages`` (or ``question``), ``answer``, optional ``meta``.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: a line is not such an object; names the line.
        ValueError: the file holds no problem.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No problem file at {path}.")
    problems = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = json.loads(line)
            messages = row.get("messages") or [{"role": "user", "content": row["question"]}]
            if not isinstance(messages, list):
                raise TypeError(f"messages is {messages!r}, not a list")
            problems.append(Problem(str(row.get("id", number)), tuple(messages), str(row["answer"]), row.get("meta", {})))
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise DamagedFileError(f"{path}, line {number}: {error!r}. Expected id, messages or question, answer.") from error
    if not problems:
        raise ValueError(f"{path} holds no problem: give one JSON object a line with id, messages or question, and answer.")
    return problems


def save_problems(problems: Iterable[Problem], path: str | Path) -> Path:
    """Write problems as JSONL, readable by :func:`load_problems`."""
    lines = [json.dumps(jsonable(p), default=jsonable, sort_keys=True) for p in problems]
    return write_text("\n".join(lines) + "\n", path)
