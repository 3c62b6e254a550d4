"""Save and load rollouts: a directory of parquet files (*parts*) and one JSON header, which says how the rollouts were sampled."""

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
from toolkit.store.hints import brief, checked
from toolkit.store.tables import UNREADABLE, save_table
from toolkit.types import Rollout, Span

SAMPLING: Mapping[str, Any] = {
    "n": int, "temperature": float, "top_p": float, "top_k": int, "max_new_tokens": int, "seed": int, "details": bool,
}  # fmt: skip
"""Setting -> type, for the field ``sampling`` in the header of a directory of rollouts. The settings are those of ``Sampling``."""
IDENTITY: Mapping[str, Any] = {
    "fingerprint": str, "interventions": list[str], "eos_ids": list[int], "template": str, "tags": Mapping[str, str | None] | None,
    "problems": str, "sampling": SAMPLING,
}  # fmt: skip
"""Field -> type, for the header fields of a directory of rollouts that determine the rollouts.

Sampling is resumed only if all of them equal those of the new call.

``fingerprint``: hash of the model's weights and config. ``template``, ``problems``: hashes of the chat template and of the problems.
``interventions``: texts from ``identity.describe_interventions``. ``tags``: the think tags. ``eos_ids``: token ids that end a response.
``sampling``: the settings listed in ``SAMPLING``.
"""
OPTIONAL: dict[str, Any] = {"model": str, "task": str, "split": str, "seed": int, "rollouts": int}
"""Field -> type, for the header fields of a directory of rollouts that only describe the rollouts.

They may be missing, and may differ when sampling is resumed.

``seed`` is the seed of the problems, not of sampling. ``rollouts`` is the number of rollouts when sampling is complete.
"""
ENGINE: dict[str, Any] = {"engine": str, "shape": str}
"""Field -> type, for the header fields that name the program that sampled the rollouts.

As with ``IDENTITY``, sampling is resumed only if they equal those of the new call.

``engine``: kind of server; missing if the rollouts were sampled by the toolkit's own loop. ``shape``: number of rows and largest number of
tokens per row, if that loop ran with a fixed shape, such as ``"64 x 2048"``; otherwise missing.
"""
APART = ("think", "answer", "results", "after_results")  # fields of ``Rollout`` that are not a column in every table
HEADER = "header.json"
ROUNDING = 1e-3  # tolerance for the sign of log-probabilities (at most 0) and entropies (at least 0)
ELSEWHERE = "Sample into another directory."
log = logging.getLogger(__name__)


def rollout_table(rollouts: Iterable[Rollout]) -> pd.DataFrame:
    """Return rollouts as a table with one row per rollout.

    The columns are the fields of ``Rollout``, except ``think`` and ``answer``. Each of these spans becomes two columns of token indices:
    ``think_start`` and ``think_stop`` (exclusive), ``answer_start`` and ``answer_stop``. Both are -1 if the rollout lacks the span.

    If a rollout has tool results, two columns hold their spans: ``result_starts`` and ``result_stops``, lists of token indices. A third,
    ``after_results``, holds the text after the last result. Without tool results, the table lacks these columns, as did all tables before
    tools existed.
    """
    rollouts = list(rollouts)
    with_results = any(r.results for r in rollouts)
    rows = []
    for r in rollouts:
        row = {f.name: getattr(r, f.name) for f in dataclasses.fields(r) if f.name not in APART}
        for name, span in (("think", r.think), ("answer", r.answer)):
            row[f"{name}_start"], row[f"{name}_stop"] = (-1, -1) if span is None else (span.start, span.stop)
        if with_results:
            row["result_starts"], row["result_stops"] = [s.start for s in r.results], [s.stop for s in r.results]
            row["after_results"] = r.after_results
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
        results=tuple(Span(start, stop) for start, stop in _result_bounds(row)),
        after_results=row["after_results"] if "result_starts" in row else "",
    )


def _result_bounds(row: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Return pairs (start, stop) of the tool results in a row of the table; none if the table has no columns for them."""
    if "result_starts" not in row and "result_stops" not in row:
        return []
    starts, stops = row["result_starts"], row["result_stops"]
    if not (isinstance(starts, list) and isinstance(stops, list) and len(starts) == len(stops)):
        raise ValueError(f"tool results are {str(starts)[:40]} to {str(stops)[:40]}, expected two lists of one length.")
    return list(zip(starts, stops, strict=True))


@contextmanager
def sampling_lock(directory: str | Path) -> Iterator[None]:
    """Context manager that locks a directory of rollouts during its body. If another process holds the lock, log a warning and wait."""
    lock = Path(directory) / ".sampling"
    with locked(lock) as held:
        if held:
            yield
            return
    log.warning("Another process is sampling into %s: waiting until it ends. Its rollouts are not sampled again.", directory)
    with locked(lock, wait=True):
        yield


def open_rollouts(directory: str | Path, header: Mapping[str, Any], *, vocab: int | None = None) -> list[Rollout]:
    """Create a directory of rollouts, or open it to resume sampling. Return the rollouts that it already holds.

    A new directory gets ``header`` as its header file. If there is a header file already, its fields in ``IDENTITY`` and ``ENGINE``
    must equal those of ``header``. Its other fields keep their stored values. Fields that are only in ``header`` are added to it.

    Args:
        header: Facts about the sampling, as a dict with the fields of ``IDENTITY`` (all needed), ``ENGINE`` and
            ``OPTIONAL``.
        vocab: Number of rows of the model's embedding; all token ids must be smaller. ``None``: this is not checked.

    Raises:
        WrongModelError: a field in ``IDENTITY`` or ``ENGINE`` differs, for example because the stored rollouts are from another model,
            other problems, other sampling settings or another server.
        DamagedFileError: the header or a part is not valid, or there are parts but no header.
    """
    path = writable(directory) / HEADER
    if not path.exists():
        if parts := _parts(directory):
            raise DamagedFileError(
                f"{directory} holds {len(parts)} part-*.parquet but no {HEADER}, which says how they were sampled: copy it back. {ELSEWHERE}"
            )
        write_json(header, path)
        return []
    # Through JSON and back, so that tuples and dataclasses in ``header`` compare equal to their stored form.
    old, new = load_header(directory), json.loads(json.dumps(header, default=jsonable))
    differing = sorted(k for k in (*IDENTITY, *ENGINE) if old.get(k) != new.get(k))
    if differing:
        what = ", ".join(_difference(field, old, new) for field in differing)
        raise WrongModelError(f"{directory} holds rollouts that differ from the ones to sample: {what}. Choose another directory.")
    if not new.keys() <= old.keys():
        write_json({**new, **old}, path)
    return load_rollouts(directory, vocab=vocab)


def _difference(field: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return words for a field in which two headers differ. Hashes are not shown: a number or a name says more to people.

    Args:
        field: Name of the field.
        old: Header of the rollouts in the directory.
        new: Header of the rollouts to sample.
    """
    there, here = old.get(field), new.get(field)
    if field == "problems":
        counts = [header["rollouts"] // header["sampling"]["n"] if "rollouts" in header else None for header in (old, new)]
        return "other problems" if None in counts or counts[0] == counts[1] else f"{counts[0]} problems there, {counts[1]} here"
    if field == "fingerprint":
        names = [str(header.get("model", "another model"))[:60] for header in (old, new)]
        return f"{names[0]} there, {names[1]} here" if names[0] != names[1] else f"other weights of {names[0]}"
    if field == "template":
        return "another chat template"
    if isinstance(there, dict) and isinstance(here, dict):
        fields = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        return ", ".join(f"{field} {name} {brief(there.get(name))} there, {brief(here.get(name))} here" for name in fields)
    return f"{field} {brief(there)} there, {brief(here)} here"


def append_rollouts(rollouts: Sequence[Rollout], directory: str | Path) -> Path:
    """Write rollouts as one new part file of a directory, and return the file's path. Several processes may do so at the same time."""
    # Two processes may choose the same index; the random part of the name keeps their files apart.
    index = max(map(_index, _parts(directory)), default=-1) + 1
    return save_table(rollout_table(rollouts), Path(directory) / f"part-{index:05d}-{secrets.token_hex(4)}.parquet")


def replace_rollouts(changed: Iterable[Rollout], directory: str | Path) -> None:
    """Overwrite stored rollouts with changed ones. Part files with a changed rollout are replaced, each atomically.

    Args:
        changed: The new rollouts. Each replaces the stored one with the same problem id and sample index; if there is none, it is ignored.
        directory: Directory of the stored rollouts.
    """
    new = {(r.problem_id, r.sample): r for r in changed}
    for part in _parts(directory):
        before = load_rollouts(part)
        after = [new.get((r.problem_id, r.sample), r) for r in before]
        if after != before:
            save_table(rollout_table(after), part)


def count_rollouts(directory: str | Path) -> int:
    """Return the number of rollouts in a directory. Only the metadata of its parquet files are read, not the rows.

    A truncated file has no metadata (they are at its end) and counts as 0 rollouts.
    """
    return sum(map(_count, _parts(directory)))


def _count(part: Path) -> int:
    try:
        return int(parquet.read_metadata(part).num_rows)
    except (OSError, ValueError):  # pyarrow's errors derive from these
        return 0


def _parts(directory: str | Path) -> list[Path]:
    return sorted(Path(directory).glob("part-*.parquet"), key=lambda part: (_index(part), part.name))


def _index(part: Path) -> int:
    number = part.stem.split("-")[1]  # of part-00012-1a2b3c4d
    return int(number) if number.isdecimal() else 0


def load_header(directory: str | Path) -> dict[str, Any]:
    """Return the header of a directory of rollouts as a dict; ``IDENTITY``, ``ENGINE`` and ``OPTIONAL`` list its fields.

    Raises:
        FileNotFoundError: there is no header.
        DamagedFileError: the header is not a JSON object, lacks a field of ``IDENTITY``, or has a field of the wrong type. The message
            names the field.
    """
    path = existing_file(Path(directory) / HEADER)
    header = read_json(path, IDENTITY, remedy=ELSEWHERE)
    present = {name: hint for name, hint in (OPTIONAL | ENGINE).items() if header.get(name) is not None}
    return checked(header, present, path, ELSEWHERE)


def load_rollouts(path: str | Path, *, vocab: int | None = None) -> list[Rollout]:
    """Return the rollouts in a directory, or in one parquet file, in the order in which they were written.

    Args:
        vocab: Number of rows of the model's embedding; all token ids must be smaller. ``None``: this is not checked.

    Raises:
        FileNotFoundError: there are no rollouts at this path.
        DamagedFileError: a part is not a parquet file of rollouts, a row is not a valid rollout, or two rows have the same problem id and
            sample index. The message names the file, the row, the value and what was expected.
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
                    f"{part}, row {number}: sample {key[1]} of problem {key[0][:60]!r} is also in {seen[key]}; expected each only once. "
                    "Two commands wrote here: remove one of the files and sample again."
                )
            seen[key] = f"{part.name}, row {number}"
    return rollouts


def _check(row: Mapping[str, Any], vocab: int | None) -> None:
    """Raise ValueError unless a row is a valid rollout. The message gives the wrong value and what was expected."""
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
    _check_results(row)
    for name, sign in (("logprobs", -1), ("entropies", 1)):  # sign that the numbers must have; 0 is allowed
        values, length = row[name], len(ids) - row["prompt_len"]
        if values is not None and not isinstance(values, list):
            raise ValueError(f"{name} is {str(values)[:60]}, expected a list of numbers.")
        if values is not None and len(values) != length:
            raise ValueError(f"{name} has {len(values)} numbers, expected {length}, one per token of the response.")
        if values is not None and not all(isinstance(v, float) and math.isfinite(v) for v in values):
            raise ValueError(f"{name} holds a value that is not a finite number.")
        if values is not None and any(sign * v < -ROUNDING for v in values):
            raise ValueError(f"{name} holds {'a negative' if sign > 0 else 'a positive'} number.")


def _check_spans(row: Mapping[str, Any]) -> None:
    end = 0  # end of the previous span: the answer must not start before the think span ends
    think, answer = ((row[f"{name}_start"], row[f"{name}_stop"]) for name in ("think", "answer"))
    # A model that does not mark its thinking: the whole response is thinking, and what follows the last result is the answer too.
    whole = think == answer or (think[1] == answer[1] and answer[0] in (row.get("result_stops") or ()))
    for name, (start, stop) in (("think", think), *(() if whole else (("answer", answer),))):
        if (start, stop) == (-1, -1):
            continue
        if not (isinstance(start, int) and isinstance(stop, int) and end <= start <= stop <= len(row["token_ids"])):
            raise ValueError(
                f"{name} is {start}..{stop}, expected a span within {end}..{len(row['token_ids'])} that does not stop before it starts."
            )
        end = stop


def _check_results(row: Mapping[str, Any]) -> None:
    if "result_starts" in row and not isinstance(row["after_results"], str):
        raise ValueError(f"after_results is {str(row['after_results'])[:60]}, expected a text.")
    end = row["prompt_len"] + 1  # the first token of a response is never a result: a call comes before it
    for start, stop in _result_bounds(row):
        if not (type(start) is int and type(stop) is int and end <= start < stop <= len(row["token_ids"])):
            raise ValueError(
                f"a tool result is {start}..{stop}, expected a span within {end}..{len(row['token_ids'])} with at least one token."
            )
        end = stop + 1  # the model writes at least one token between two results
