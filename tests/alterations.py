"""Ways in which a file comes to be wrong, as values: a label, and a function that alters the file in place."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

Step = str | int
NESTED = "[" * 50_000
RAW = "\u241fRAW\u241f"  # a text whose quotes are taken off again: what JSON itself cannot say


@dataclass(frozen=True)
class Alteration:
    """One way to alter a file.

    Attributes:
        label: Container, what is done, and where.
        apply: Alters the file at a path.
        legal: Another value may come out of it that is as good as the first; it still has to be an error or a value.
        line: Line that the error has to name, or ``None``.
    """

    label: str
    apply: Callable[[Path], None]
    legal: bool = False
    line: int | None = None


# --- any file ------------------------------------------------------------------------------------------------


def of_any_file(size: int, rng: random.Random) -> Iterator[Alteration]:
    """The file is missing, empty, cut, a directory, a loop, or noise."""

    def replaced(make: Callable[[Path], Any]) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            path.unlink()
            make(path)

        return apply

    noise = rng.randbytes(300)
    yield Alteration("file: missing", replaced(lambda path: None))
    yield Alteration("file: empty", lambda path: path.write_bytes(b"") and None)
    yield Alteration("file: a directory", replaced(lambda path: path.mkdir()))
    yield Alteration("file: a loop of links", replaced(lambda path: path.symlink_to(path.name)))
    yield Alteration("file: a link to nothing", replaced(lambda path: path.symlink_to("nowhere")))
    yield Alteration("file: noise", lambda path: path.write_bytes(noise) and None)
    yield Alteration("file: zeros", lambda path: path.write_bytes(bytes(path.stat().st_size)) and None)
    yield Alteration("file: noise in front", lambda path: path.write_bytes(noise + path.read_bytes()) and None)
    for share in (0.02, 0.3, 0.6, 0.9, 0.99):
        kept = max(1, int(share * size))
        yield Alteration(f"file: cut to {share:.0%}", lambda path, kept=kept: path.write_bytes(path.read_bytes()[:kept]) and None)


def flips(at: list[int], what: str, *, legal: bool) -> Iterator[Alteration]:
    """The highest bit of one byte is another: no text stays text, most numbers become others."""
    for place in at:

        def apply(path: Path, place: int = place) -> None:
            content = bytearray(path.read_bytes())
            content[place] ^= 0x80
            path.write_bytes(content)

        yield Alteration(f"{what}: byte {place} flipped", apply, legal)


# --- text ----------------------------------------------------------------------------------------------------


def of_text(*, is_json: bool = True) -> Iterator[Alteration]:
    """Other encodings, marks and line ends."""

    def recoded(encoding: str, head: str = "") -> Callable[[Path], None]:
        return lambda path: path.write_bytes((head + path.read_text("utf-8")).encode(encoding)) and None

    yield Alteration("text: byte order mark", recoded("utf-8-sig"))
    yield Alteration("text: CRLF", lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")) and None)
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        yield Alteration(f"text: {encoding}", recoded(encoding))
    yield Alteration("text: latin-1", recoded("latin-1", "\u00e9"))
    if is_json:
        yield Alteration("text: nested", lambda path: path.write_text(NESTED) and None)
        yield Alteration("text: a number", lambda path: path.write_text("1" * 5000) and None)


def mutants(value: Any, rng: random.Random, skip: Callable[[tuple[Step, ...]], bool], most: int) -> Iterator[tuple[str, Any]]:
    """Copies of a JSON value with one place altered so that its type or presence is wrong; at most ``most``, drawn."""
    made = [(path, how) for path in _places(value) if path and not skip(path) for how in _ways(_at(value, path))]
    rng.shuffle(made)
    for path, how in made[:most]:
        copy = deepcopy(value)
        parent, last = _at(copy, path[:-1]), path[-1]
        if how == "dropped" and isinstance(parent, dict):
            del parent[last]
        elif how == "renamed" and isinstance(parent, dict):
            parent[f"{last}_"] = parent.pop(last)
        elif how in OTHERS:
            parent[last] = OTHERS[how]
        else:  # dropped or renamed in a list: another list is as good
            continue
        yield f"{'.'.join(map(str, path))} {how}", copy


OTHERS: dict[str, Any] = {
    "null": None, "true": True, "a list": [[]], "an object": {"a": {}}, "a text": "\u00e9?", "a number": 3, "NaN": f"{RAW}NaN{RAW}",
    "infinite": f"{RAW}1e999{RAW}", "half a character": f"{RAW}\"\\ud800\"{RAW}", "nested": f"{RAW}{NESTED}{RAW}",
}  # fmt: skip


def _ways(value: Any) -> list[str]:
    same = {str: "a text", bool: "true", type(None): "null"}.get(type(value))
    return [
        how for how in ("dropped", "renamed", *OTHERS) if how != same and not (how == "a number" and isinstance(value, int | float))
    ]


def _places(value: Any, path: tuple[Step, ...] = ()) -> Iterator[tuple[Step, ...]]:
    yield path
    for name, part in value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ():
        yield from _places(part, (*path, name))


def _at(value: Any, path: tuple[Step, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def written(value: Any) -> str:
    """JSON, with raw texts as they are."""
    text = json.dumps(value)
    raw = json.dumps(RAW)[1:-1]
    parts = text.split(raw)
    for i in range(1, len(parts), 2):
        parts[i - 1], parts[i], parts[i + 1] = parts[i - 1][:-1], json.loads(f'"{parts[i]}"'), parts[i + 1][1:]
    return "".join(parts)


def _overwritten(text: str) -> Callable[[Path], None]:
    return lambda file: file.write_text(text) and None


def of_json(path: Path, rng: random.Random, skip: Callable, most: int) -> Iterator[Alteration]:
    """One place of a JSON file is altered."""
    value = json.loads(path.read_text())
    for label, mutant in mutants(value, rng, skip, most):
        yield Alteration(f"json: {label}", _overwritten(written(mutant)))
    for label, text in (("a list around it", f"[{written(value)}]"), ("null", "null"), ("twice", written(value) * 2)):
        yield Alteration(f"json: {label}", lambda file, text=text: file.write_text(text) and None)
    if isinstance(value, list):
        return
    first = next(iter(value))
    doubled = f"{{{json.dumps(first)}: {json.dumps(value[first])}, {written(value)[1:]}"
    yield Alteration("json: a field twice", lambda file: file.write_text(doubled) and None)


def of_lines(path: Path, rng: random.Random, skip: Callable, most: int, *, unique: bool) -> Iterator[Alteration]:
    """One line of a JSON-lines file is altered."""
    lines = path.read_text().splitlines()

    def with_line(number: int, text: str) -> Callable[[Path], None]:
        content = "\n".join([*lines[: number - 1], text, *lines[number:]]) + "\n"
        return lambda file: file.write_text(content, "utf-8", newline="\n") and None

    for number in range(1, len(lines) + 1):
        for label, mutant in mutants(json.loads(lines[number - 1]), rng, skip, most // len(lines) + 1):
            yield Alteration(f"line {number}: {label}", with_line(number, written(mutant)), line=number)
    for label, text in (
        ("a list", "[1]"),
        ("null", "null"),
        ("a text", '"a"'),
        ("half", lines[1][:-9]),
        ("nested", NESTED),
        ("noise", "\x07"),
    ):
        yield Alteration(f"line 2: {label}", with_line(2, text), line=2)
    if unique:
        yield Alteration("line 3: the second again", with_line(3, lines[1]), line=3)
    yield Alteration("lines: empty ones between", lambda file: file.write_text("\n\n".join(lines) + "\n\n") and None)
    yield Alteration("lines: no end of the last", lambda file: file.write_text("\n".join(lines)) and None)


# --- safetensors ---------------------------------------------------------------------------------------------


def parts_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and body of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put(path: Path, header: dict[str, Any], body: bytes) -> None:
    """Write a safetensors file, whatever its header says."""
    text = written(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def of_safetensors(path: Path, rng: random.Random, skip: Callable, most: int) -> Iterator[Alteration]:
    """One place of the header, or the numbers of one tensor, are altered."""
    header, body = parts_of(path)
    meta = header["__metadata__"]
    tensors = {name: about for name, about in header.items() if name != "__metadata__"}
    if "value" in meta:
        for label, mutant in mutants(json.loads(meta["value"]), rng, skip, most):
            changed = {**header, "__metadata__": {**meta, "value": written(mutant)}}
            yield Alteration(f"value: {label}", lambda file, changed=changed: put(file, changed, body))
    for label, mutant in mutants(meta, rng, skip, most // 2):
        yield Alteration(f"metadata: {label}", lambda file, mutant=mutant: put(file, {**header, "__metadata__": mutant}, body))
    for name, about in tensors.items():
        start, stop = about["data_offsets"]
        kind = {"F64": "<f8", "F32": "<f4"}[about["dtype"]]
        shape = about["shape"]
        changes = {
            "renamed": {f"{name}_": about},
            "of whole numbers": {name: {**about, "dtype": about["dtype"].replace("F", "I")}},
            "flat": {name: {**about, "shape": [int(np.prod(shape))]}},
            "with an axis more": {name: {**about, "shape": [1, *shape]}},
            "with a negative axis": {name: {**about, "shape": [-1, *shape[1:]]}},
            "beyond the end": {name: {**about, "data_offsets": [start, stop + 8]}},
        }
        for label, change in changes.items():
            changed = {**{k: v for k, v in header.items() if k != name}, **change}
            yield Alteration(f"tensor {name}: {label}", lambda file, changed=changed: put(file, changed, body))
        for bad in (np.nan, np.inf, -np.inf):
            numbers = np.frombuffer(body[start:stop], kind).copy()
            numbers[-1] = bad
            altered = body[:start] + numbers.tobytes() + body[stop:]
            yield Alteration(f"tensor {name}: {bad}", lambda file, altered=altered: put(file, header, altered))
    more = {**header, "surplus": {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}}
    yield Alteration("tensors: one more", lambda file: put(file, more, body + b"\0\0\0\0"))
    yield Alteration("tensors: none", lambda file: put(file, {"__metadata__": meta}, b""))
    yield Alteration("metadata: none", lambda file: put(file, tensors, body))


# --- tables --------------------------------------------------------------------------------------------------


def of_csv(path: Path) -> Iterator[Alteration]:
    """A row or the header of a CSV file is altered."""
    head, *rows = path.read_text().splitlines()

    def put_rows(*lines: str) -> Callable[[Path], None]:
        return lambda file: file.write_text("\n".join(lines) + "\n") and None

    yield Alteration("csv: no header", put_rows(*rows))
    yield Alteration("csv: a column twice", put_rows(f"{head},{head.split(',')[0]}", *(f"{row},1" for row in rows)))
    yield Alteration("csv: a field more", put_rows(head, rows[0] + ",1", *rows[1:]))
    yield Alteration("csv: a field more in each row", put_rows(head, *(f"{row},1" for row in rows)))
    yield Alteration("csv: a field less", put_rows(head, rows[0].rpartition(",")[0], *rows[1:]))
    yield Alteration("csv: an open quote", put_rows(head, '"' + rows[0].replace('"', ""), *rows[1:]))
    yield Alteration("csv: an empty cell", put_rows(head, rows[0].rpartition(",")[0] + ",", *rows[1:]))
    yield Alteration("csv: other separators", put_rows(*(line.replace(",", ";") for line in (head, *rows))))
    yield Alteration("csv: header alone", put_rows(head), legal=True)


def of_parquet(path: Path, strict: dict[str, type], rng: random.Random, flipped: int) -> Iterator[Alteration]:
    """A column or a cell of a parquet file is altered, or a bit of it."""
    table = pd.read_parquet(path)
    for name, kind in strict.items():
        column = table[name]
        last = [*column[:-1]]
        changes: dict[str, Any] = {
            "dropped": table.drop(columns=name),
            "renamed": table.rename(columns={name: f"{name}_"}),
            "null": table.assign(**{name: pd.Series([*last, None], dtype=object)}),
            "of lists": table.assign(**{name: [[1]] * len(table)}),
        }
        if kind is not str:
            changes["of text"] = table.assign(**{name: ["a"] * len(table)})
        if kind in (int, float):
            changes["NaN"] = table.assign(**{name: [*map(float, last), np.nan]})
            changes["infinite"] = table.assign(**{name: [*map(float, last), np.inf]})
        for label, changed in changes.items():
            yield Alteration(f"table: column {name} {label}", lambda file, changed=changed: changed.to_parquet(file))
    yield from flips(sorted(rng.sample(range(path.stat().st_size), flipped)), "parquet", legal=False)
