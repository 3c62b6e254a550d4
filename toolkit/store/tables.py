"""Tables, and problems as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from toolkit.store.errors import DamagedFileError
from toolkit.store.files import atomic, jsonable, key, read_lines, write_text
from toolkit.types import Problem


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

    A problem without an id is named by a hash of its messages: by its line it would be another one when lines are added or reordered.

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
            problems.append(Problem(str(row.get("id", key(messages))), tuple(messages), str(row["answer"]), row.get("meta", {})))
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise DamagedFileError(f"{path}, line {number}: {error!r}. Expected id, messages or question, answer.") from error
    if not problems:
        raise ValueError(f"{path} holds no problem: give one JSON object a line with id, messages or question, and answer.")
    return problems


def save_problems(problems: Iterable[Problem], path: str | Path) -> Path:
    """Write problems as JSONL, readable by :func:`load_problems`."""
    lines = [json.dumps(jsonable(p), default=jsonable, sort_keys=True) for p in problems]
    return write_text("\n".join(lines) + "\n", path)
