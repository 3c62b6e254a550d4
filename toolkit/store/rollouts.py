"""Rollouts as a directory of parquet parts with one JSON header."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from pyarrow import parquet

from toolkit.store.errors import DamagedFileError, WrongModelError
from toolkit.store.files import existing_file, jsonable, locked, read_json, writable, write_json
from toolkit.store.hints import checked
from toolkit.store.tables import UNREADABLE, save_table
from toolkit.types import Rollout, Span

SAMPLING: Mapping[str, Any] = {
    "n": int, "temperature": float, "top_p": float, "top_k": int, "max_new_tokens": int, "seed": int, "details": bool,
}  # fmt: skip
IDENTITY: Mapping[str, Any] = {
    "fingerprint": str, "interventions": list[str], "eos_ids": list[int], "template": str, "tags": Mapping[str, str | None] | None,
    "problems": str, "sampling": SAMPLING,
}  # fmt: skip
"""Fields of a header that decide what is sampled, by type."""
TOLD: Mapping[str, Any] = {"model": str, "task": str, "split": str, "seed": int, "rollouts": int}
"""Fields that say what it is; they may be missing, and may change."""
HEADER = "header.json"
ROUNDING = 1e-3  # of a log-probability, which is at most 0, and of an entropy, which is at least 0
ELSEWHERE = "Sample into another directory."
log = logging.getLogger(__name__)


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


@contextmanager
def sampling_lock(directory: str | Path) -> Iterator[None]:
    """Work on a directory of rollouts as the only process; waits for another one that does, and says so in the log."""
    claim = Path(directory) / ".sampling"
    with locked(claim) as mine:
        if mine:
            yield
            return
    log.warning("Another process is sampling into %s: waiting for it; what it finishes is not sampled again.", directory)
    with locked(claim, wait=True):
        yield


def open_rollouts(directory: str | Path, header: Mapping[str, Any], *, vocab: int | None = None) -> list[Rollout]:
    """Start or resume a directory of rollouts: the rollouts already there, or ``[]``.

    Only what decides the samples (:data:`IDENTITY`) must be as it was; what else the header tells, such as names, is kept as it is, and
    added where an older header lacks it.

    Raises:
        WrongModelError: it was begun with another model, other problems or another sampling.
        DamagedFileError: as :func:`load_rollouts`, or it holds parts without a header.
    """
    path = writable(directory) / HEADER
    if not path.exists():
        if parts := _parts(directory):
            raise DamagedFileError(
                f"{directory} holds {len(parts)} part-*.parquet but no {HEADER}, so it is unknown what they were sampled from: copy it back. {ELSEWHERE}"
            )
        write_json(header, path)
        return []
    old, new = load_header(directory), json.loads(json.dumps(header, default=jsonable))
    differing = sorted(k for k in IDENTITY if old.get(k) != new.get(k))
    if differing:
        there, now = (str({k: _apart(a.get(k), b.get(k)) for k in differing})[:110] for a, b in ((old, new), (new, old)))
        raise WrongModelError(
            f"{directory} holds rollouts made with another {', '.join(differing)}: {there} there, {now} now. Choose another directory."
        )
    if not new.keys() <= old.keys():
        write_json({**new, **old}, path)
    return load_rollouts(directory, vocab=vocab)


def _apart(value: Any, other: Any) -> Any:
    """A value of a header; of an object only what differs from the other one."""
    both = isinstance(value, dict) and isinstance(other, dict)
    return {k: v for k, v in value.items() if other.get(k) != v} if both else value


def append_rollouts(rollouts: Sequence[Rollout], directory: str | Path) -> Path:
    """Add one part file to a directory of rollouts; its name is its own, whoever else writes there."""
    index = max(map(_index, _parts(directory)), default=-1) + 1
    return save_table(rollout_table(rollouts), Path(directory) / f"part-{index:05d}-{secrets.token_hex(4)}.parquet")


def replace_rollouts(changed: Iterable[Rollout], directory: str | Path) -> None:
    """Put rollouts in the place of those of the same problem and sample; each part is replaced whole or not at all."""
    new = {(r.problem_id, r.sample): r for r in changed}
    for part in _parts(directory):
        there = load_rollouts(part)
        now = [new.get((r.problem_id, r.sample), r) for r in there]
        if now != there:
            save_table(rollout_table(now), part)


def count_rollouts(directory: str | Path) -> int:
    """How many rollouts a directory holds, by the ends of its parts; none are read, and one without an end counts as empty."""
    return sum(map(_count, _parts(directory)))


def _count(part: Path) -> int:
    try:
        return int(parquet.read_metadata(part).num_rows)
    except (OSError, ValueError):  # of pyarrow, whose errors are these
        return 0


def _parts(directory: str | Path) -> list[Path]:
    return sorted(Path(directory).glob("part-*.parquet"), key=lambda part: (_index(part), part.name))


def _index(part: Path) -> int:
    number = part.stem.split("-")[1]
    return int(number) if number.isdecimal() else 0


def load_header(directory: str | Path) -> dict[str, Any]:
    """The header of a directory of rollouts: who sampled them, on which problems, and how.

    Raises:
        FileNotFoundError: no header there.
        DamagedFileError: it is not an object, or a field is missing or of another type than it should be; names it.
    """
    path = existing_file(Path(directory) / HEADER)
    header = read_json(path, IDENTITY, remedy=ELSEWHERE)
    told = {name: hint for name, hint in TOLD.items() if header.get(name) is not None}
    return checked(header, told, path, ELSEWHERE)


def load_rollouts(path: str | Path, *, vocab: int | None = None) -> list[Rollout]:
    """Rollouts of a directory of parts, or of one parquet file, ordered as written.

    Args:
        vocab: Rows of the model's embedding, if the model is known: token ids must be below it.

    Raises:
        FileNotFoundError: nothing there.
        DamagedFileError: a part is not a parquet file of rollouts, or a row cannot be one; names file, row, what is wrong and expected.
    """
    source = Path(path)
    parts = _parts(source) if source.is_dir() else [source]
    if not source.exists() or not (parts or (source / HEADER).exists()):
        raise FileNotFoundError(f"No rollouts at {source}.")
    seen: dict[tuple[str, int], str] = {}
    rollouts: list[Rollout] = []
    for part in parts:
        try:
            rows = pd.read_parquet(existing_file(part), dtype_backend="pyarrow", page_checksum_verification=True).to_dict("records")
        except UNREADABLE as error:
            reason = " ".join(str(error).split())[:120]
            raise DamagedFileError(f"{part} is not a parquet file of rollouts: {reason}. Remove it and sample again.") from error
        for number, row in enumerate(rows):
            try:
                _check(row, vocab)
                rollouts.append(_rollout(row))
            except KeyError as error:
                raise DamagedFileError(f"{part} is not a parquet file of rollouts: it has no column {error}.") from error
            except ValueError as error:
                raise DamagedFileError(f"{part}, row {number}: {error} Remove that file and sample again.") from error
            key = (rollouts[-1].problem_id, rollouts[-1].sample)
            if key in seen:
                raise DamagedFileError(
                    f"{part}, row {number}: sample {key[1]} of problem {key[0][:60]!r} is there already ({seen[key]}); expected each once. "
                    "Two commands wrote here: remove one of the files and sample again."
                )
            seen[key] = f"{part.name}, row {number}"
    return rollouts


def _check(row: Mapping[str, Any], vocab: int | None) -> None:
    """Raise ValueError, with what was found and expected, unless a row can be a rollout."""
    for name, kind in (("problem_id", str), ("sample", int), ("prompt_len", int), ("text", str), ("correct", bool)):
        if not isinstance(row[name], kind) or (kind is int and isinstance(row[name], bool)):
            raise ValueError(f"{name} is {str(row[name])[:60]!r}, expected {kind.__name__}.")
    if row["sample"] < 0:
        raise ValueError(f"sample is {row['sample']}, expected a number from 0.")
    ids = row["token_ids"]
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise ValueError(f"token_ids is {str(ids)[:60]}, expected whole numbers.")
    if min(ids) < 0 or (vocab is not None and max(ids) >= vocab):
        bad = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(f"token_ids holds {bad}, expected 0..{'' if vocab is None else vocab - 1}.")
    if not 1 <= row["prompt_len"] <= len(ids):
        raise ValueError(f"prompt_len is {row['prompt_len']}, expected 1..{len(ids)}, the number of tokens.")
    if row["finish"] not in ("stop", "length"):
        raise ValueError(f"finish is {str(row['finish'])[:60]!r}, expected 'stop' or 'length'.")
    _check_spans(row)
    for name, sign in (("logprobs", -1), ("entropies", 1)):
        values, length = row[name], len(ids) - row["prompt_len"]
        if values is not None and not isinstance(values, list):
            raise ValueError(f"{name} is {str(values)[:60]}, expected a list of numbers.")
        if values is not None and len(values) != length:
            raise ValueError(f"{name} has {len(values)} numbers, expected {length}, one per token of the response.")
        if values is not None and not all(isinstance(v, float) and math.isfinite(v) for v in values):
            raise ValueError(f"{name} holds a value that is no finite number.")
        if values is not None and any(sign * v < -ROUNDING for v in values):
            raise ValueError(f"{name} holds a number of the wrong sign.")


def _check_spans(row: Mapping[str, Any]) -> None:
    end = 0
    for name in ("think", "answer"):
        start, stop = row[f"{name}_start"], row[f"{name}_stop"]
        if (start, stop) == (-1, -1):
            continue
        if not (isinstance(start, int) and isinstance(stop, int) and end <= start <= stop <= len(row["token_ids"])):
            raise ValueError(
                f"{name} is {start}..{stop}, expected a span inside {end}..{len(row['token_ids'])} that does not end first."
            )
        end = stop
