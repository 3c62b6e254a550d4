"""Strict reading of text and JSON: only UTF-8, no duplicate fields, no NaN or infinity."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit.store.errors import DamagedFileError

_MARKS = {  # the longer ones first: the mark of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file. All line ends become ``\\n``, and a byte order mark is removed.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: the file has another encoding or is binary; the message names the encoding or the line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No file at {path}.")
    content = Path(path).read_bytes()
    remedy = "Expected UTF-8: save it again with that encoding."
    if encoding := next((name for mark, name in _MARKS.items() if content.startswith(mark)), None):
        raise DamagedFileError(f"{path} is {encoding}. {remedy}")
    if (at := content.find(b"\0")) >= 0:
        raise DamagedFileError(f"{path}, line {_line(content, at)}: holds a NUL byte, so it is binary or UTF-16. {remedy}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DamagedFileError(f"{path}, line {_line(content, error.start)}: byte 0x{byte:02x} is not UTF-8. {remedy}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _line(content: bytes, at: int) -> int:
    return content.count(b"\n", 0, at) + 1


def numbered(text: str) -> Iterator[tuple[int, str]]:
    """Yield ``(number, line)`` for each non-blank line of a text. Numbers start at 1 and count blank lines too."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def parsed(text: str) -> Any:
    """Parse JSON text, more strictly than ``json.loads``, and return the value.

    Raises:
        ValueError: the text is not JSON, has the same field twice in an object, holds NaN or infinity, is nested too deep, or holds a lone
            surrogate (such as ``\\ud800``, which is no character and cannot be written as UTF-8).
    """
    try:
        value = json.loads(text, parse_constant=_refused, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg}, at character {error.pos + 1}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deep to be read") from error
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"it holds \\u{ord(error.object[error.start]):x}, which is half of a surrogate pair and no character"
            ) from error
    return value


def _refused(constant: str) -> float:
    raise ValueError(f"it holds {constant}, which is not a JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the field {next(name for name in names if names.count(name) > 1)[:40]!r} twice")
    return fields
