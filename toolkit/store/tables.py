"""Save and load tables (parquet, CSV or JSON lines) and problems (JSON lines)."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd

from toolkit.store.errors import DamagedFileError
from toolkit.store.files import atomic, existing_file, jsonable, key, write_text
from toolkit.store.hints import Misfit, brief, read_from, typed
from toolkit.store.texts import numbered, parsed, read_text
from toolkit.types import Problem

ROLES = ("system", "developer", "user", "assistant", "tool")
_PROBLEM = "Expected id, messages or question, answer."
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError)
"""Exceptions that pandas and pyarrow raise for a damaged parquet file."""


def save_table(table: pd.DataFrame, path: str | Path) -> Path:
    """Write a table as a parquet file, atomically, and return its path. The file holds checksums, so that reading it detects damage."""
    with atomic(path) as partial:
        table.to_parquet(partial, write_page_checksum=True)
    return Path(path)


def read_table(path: str | Path, columns: Mapping[str, Any] | None = None, *, remedy: str = "Correct the file.") -> pd.DataFrame:
    """Return the table in a .jsonl, .csv or .parquet file.

    In a CSV file, an empty cell is a missing value, and "NA" is an ordinary text. A column with the hint ``str`` is read as text, so "007"
    stays "007".

    Args:
        columns: Required column -> type hint of its values: ``str``, ``float``, ``int``, ``bool``, or a union of these. Required columns
            must not have missing values. ``None``: no column is required.
        remedy: Advice to the user, put at the end of the message of DamagedFileError.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: the content is not valid in the format that the suffix names; or a required column does not exist, is
            not unique, or holds a value that is missing, infinite or of another type.
        ValueError: the suffix is not one of the three.
    """
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    file = existing_file(path)
    if file.suffix not in readers:
        raise ValueError(f"{file}: cannot read {file.suffix!r} files. Give a file that ends in {', '.join(readers)}.")
    with read_from(file, remedy):
        table = readers[file.suffix](file, columns or {})
    return checked_table(table, columns or {}, file, remedy)


def checked_table(table: pd.DataFrame, columns: Mapping[str, Any], source: str | Path, remedy: str) -> pd.DataFrame:
    """Return ``table`` unchanged if it has the required columns with values of the required types. Otherwise raise DamagedFileError.

    Args:
        columns: Required column -> type hint of its values: ``str``, ``float``, ``int``, ``bool``, or a union of these.
        source: File or data set that the table comes from, put at the start of the error message.
        remedy: Advice to the user, put at the end of the error message.
    """
    with read_from(source, remedy):
        for name, hint in columns.items():
            if name not in table:
                present = ", ".join(str(c)[:30] for c in table.columns[:6])
                raise DamagedFileError(f"{source} has no column {name}: it has {present}. {remedy}")
            _check_column(table[name], hint)
    return table


def _check_column(values: pd.Series, hint: Any) -> None:
    """Raise Misfit if a value of a column does not fit a type hint. The message names the first such row, counted from 1."""
    # Type hint -> kinds of numpy dtypes that fit it: i and u are signed and unsigned whole numbers, b is bool, f is float. In a column
    # with such a dtype only NaN and infinity can be wrong, so at most one row is looked at. Otherwise every value is checked.
    numbers = {int: "iu", bool: "b", float: "iuf"}
    if isinstance(values.dtype, np.dtype) and values.dtype.kind in numbers.get(hint, ""):
        rows = np.flatnonzero(~np.isfinite(values.to_numpy()))[:1]
    else:
        rows = np.arange(len(values))
    for row in rows:
        value = values.iloc[row]
        typed(value.item() if isinstance(value, np.generic) else value, hint, f"column {values.name!r}, row {row + 1},")


def _jsonl(path: Path, columns: Mapping[str, Any]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for number, line in numbered(read_text(path)):
        row = _line(line, number, {})
        if rows and row.keys() != rows[0].keys():
            odd = sorted(row.keys() ^ rows[0].keys())[0]
            raise Misfit(f"line {number} and the first line differ in the field {brief(odd)}")
        rows.append(row)
    if not rows:
        raise Misfit("it has no rows")
    return pd.DataFrame(rows)


def _line(line: str, number: int, expected: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return typed(parsed(line), expected, f"line {number}")
    except Misfit:
        raise
    except ValueError as error:
        raise Misfit(f"line {number} is not JSON: {error}") from error


def _csv(path: Path, columns: Mapping[str, Any]) -> pd.DataFrame:
    text = read_text(path)
    lines = csv.reader(io.StringIO(text), strict=True)
    try:
        head = next(lines, [])
        for row in lines:
            if row and len(row) != len(head):
                raise Misfit(f"line {lines.line_num} has {len(row)} fields, the header has {len(head)}")
    except csv.Error as error:
        raise Misfit(f"line {lines.line_num} is not CSV: {error}") from error
    if len(set(head)) < len(head) or not all(head):
        raise Misfit(f"its header is {brief(head)}: expected a name for every column, each once")
    # Columns to read as text: those whose hint is ``str`` or a union with it.
    plain = {name: str for name, hint in columns.items() if name in head and str in (hint, *get_args(hint))}
    try:
        return pd.read_csv(io.StringIO(text), keep_default_na=False, na_values=[""], dtype=plain, index_col=False)
    except ValueError as error:
        raise Misfit(f"it is not CSV: {str(error)[:100]}") from error


def _parquet(path: Path, columns: Mapping[str, Any]) -> pd.DataFrame:
    try:
        return pd.read_parquet(path, page_checksum_verification=True)
    except UNREADABLE as error:
        raise Misfit(f"it is not a complete parquet file: {' '.join(str(error).split())[:120]}") from error


def load_problems(path: str | Path, check: Callable[[Problem, str], object] | None = None) -> list[Problem]:
    """Return the problems in a JSONL file, which holds one JSON object per line.

    Each object has ``answer``, and either ``messages`` (a list of objects with ``role`` and ``content``) or ``question`` (text). ``id`` and
    ``meta`` are optional. Any other field is an error: facts about a problem belong in ``meta``. If a problem has no ``id``, a hash of its
    messages becomes its id, which does not change when lines are added or reordered.

    Answers and ids may be text or numbers. Numbers are converted to text with the digits that the file has, but without an exponent:
    ``0.50`` gives ``"0.50"``, and ``1e-5`` gives ``"0.00001"``.

    Args:
        path: The file.
        check: Function that is called with each problem and its place, such as ``"mine.jsonl, line 3"``; it may raise an error.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: the file is not UTF-8, a line is not such an object, or two lines have the same id. The message names the line.
        ValueError: the file holds no problem.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No problem file at {path}.")
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for number, line in numbered(read_text(path)):
        with read_from(f"{path}, line {number}", _PROBLEM):
            try:
                row = _row(line)
            except ValueError as error:
                raise Misfit(str(error)) from error
            problem = _problem(row)
            if problem.id in seen:
                raise Misfit(f"the id {brief(problem.id)} is also that of line {seen[problem.id]}, ids must be unique")
        if check is not None:
            check(problem, f"{path}, line {number}")
        seen[problem.id] = number
        problems.append(problem)
    if not problems:
        raise ValueError(f"{path} holds no problem: write one JSON object per line with id, messages or question, and answer.")
    return problems


def _row(line: str) -> Any:
    """Return the JSON value of a line. A float in the field ``answer`` or ``id`` becomes text without an exponent.

    Otherwise Python would write 0.00001 as 1e-05, and a grader might read that as the number 5.
    """
    row = parsed(line)
    numbers = [n for n in ("answer", "id") if isinstance(row, dict) and isinstance(row.get(n), float) and math.isfinite(row[n])]
    written = json.loads(line, parse_float=_plain) if numbers else {}
    return {**row, **{name: written[name] for name in numbers}} if numbers else row


def _plain(number: str) -> str:
    """Return a number, given as JSON text, as text without an exponent. A number far outside the range of floats is returned unchanged."""
    value = Decimal(number)
    # ``adjusted`` is the decimal exponent. The limit keeps 1e999999999 from becoming a billion digits.
    return f"{value:f}" if abs(value.adjusted()) < 400 else number


def _problem(row: Any) -> Problem:
    """Return the ``Problem`` that a parsed line describes. Raise Misfit, which names the field, if a field is not valid."""
    prompt = {"messages": list[Any]} if "messages" in typed(row, Mapping[str, Any], "the line") else {"question": str}
    row = typed(row, {"answer": str | int | float, **prompt}, "the line")
    if unknown := sorted(row.keys() - {"id", "answer", "meta", *prompt}):
        raise Misfit(f"the line has the unknown field {brief(unknown[0])}: put facts about a problem into meta")
    if "messages" in row:
        messages = tuple(_message(message, f"messages[{i}]") for i, message in enumerate(row["messages"]))
    else:
        messages = ({"role": "user", "content": row["question"]},)
    meta = typed(row.get("meta", {}), Mapping[str, Any], "meta")
    name = typed(row["id"], str | int | float, "id") if "id" in row else key(messages)
    problem = Problem(str(name), messages, str(row["answer"]), meta)
    empty = {
        "id": not problem.id.strip(),
        "messages": not messages,
        "question": not any(m["content"].strip() for m in messages if m["role"] != "system"),
        "answer": not problem.answer.strip() and "grader" not in meta,  # a problem with a named grader may need no answer
    }
    if any(empty.values()):
        raise Misfit(f"{next(name for name, is_empty in empty.items() if is_empty)} is empty")
    return problem


def _message(message: Any, at: str) -> Mapping[str, str]:
    message = typed(message, {"role": str, "content": str}, at)
    if message["role"] not in ROLES:
        raise Misfit(f"{at}.role is {brief(message['role'])}, expected one of {', '.join(ROLES)}")
    return typed(message, Mapping[str, str], at)


def save_problems(problems: Iterable[Problem], path: str | Path) -> Path:
    """Write problems as a JSONL file for ``load_problems``, and return its path.

    Raises:
        ValueError: ``load_problems`` could not read one of the problems, for example because its answer is empty. No file is written.
    """
    lines = []
    for problem in problems:
        line = json.dumps(jsonable(problem), default=jsonable, sort_keys=True)
        try:
            _problem(parsed(line))
        except ValueError as error:
            raise ValueError(
                f"Problem {brief(problem.id)} is not saved to {path}, since it could not be loaded again: {error}."
            ) from error
        lines.append(line)
    return write_text("\n".join(lines) + "\n", path)
