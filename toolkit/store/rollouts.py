"""Rollouts as a directory of parquet parts with one JSON header."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from toolkit.store.errors import DamagedFileError, WrongModelError
from toolkit.store.files import atomic, jsonable, read_json, writable, write_json
from toolkit.types import Rollout, Span


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
