"""Check JSON values against Python type hints, so that a damaged file is reported before anything in it is used."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from toolkit.store.errors import DamagedFileError

_SHOWN = 60  # characters of a value that an error shows
_NAMES = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false", type(None): "null"}


class Misfit(ValueError):
    """A value does not fit its type hint. The message gives the place of the value, the value and the expected type."""


@contextmanager
def read_from(path: str | Path, remedy: str) -> Iterator[None]:
    """Context manager that raises DamagedFileError if its body raises Misfit (a value does not fit its type hint).

    Args:
        path: Path of the file that is read; put at the start of the error message, before the message of the Misfit.
        remedy: Advice to the user, put at the end of the error message.
    """
    try:
        yield
    except Misfit as error:
        raise DamagedFileError(f"{path}: {error}. {remedy}") from error


def checked(value: Any, hint: Any, where: str | Path, remedy: str) -> Any:
    """Return ``value``, which was read from a file, if it fits a type hint. Otherwise raise DamagedFileError.

    Args:
        hint: Type hint, such as ``list[int]`` or ``{"name": str}`` (``hints.typed`` lists all forms).
        where: Path of the file, or a text that says where the value comes from; put at the start of the error message.
        remedy: Advice to the user, put at the end of the error message.
    """
    with read_from(where, remedy):
        return typed(value, hint)


def brief(value: Any) -> str:
    """Return the ``repr`` of a value, cut to 60 characters, for an error message."""
    text = repr(value[:_SHOWN]) if isinstance(value, str | bytes | list) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def described(hint: Any) -> str:
    """Return a type hint in words for an error message, such as "a whole number"."""
    if isinstance(hint, Mapping):
        return f"an object with {', '.join(hint)}"
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin is types.UnionType:
        return " or ".join(map(described, parts))
    if _is_list(origin or hint):
        return "a list"
    return "an object" if _is_object(origin or hint) else _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def typed(value: Any, hint: Any, at: str = "the file") -> Any:
    """Return a JSON value if it fits a type hint; otherwise raise Misfit. A list becomes a tuple if the hint is a tuple type.

    Args:
        hint: One of ``str``, ``int``, ``bool``, ``None``, ``Any``, ``float`` (accepts whole numbers, but not NaN or infinity), a
            ``Literal``, a union ``X | Y``, ``list[X]``, ``tuple[X, ...]`` or ``Mapping[str, X]``. A dict such as ``{"name": str}`` stands
            for a JSON object that has at least these fields, with values of these types.
        at: Place of the value in the file, such as ``meta.task``, for the error message. The default stands for the outermost value.

    Raises:
        Misfit: the value does not fit.

    >>> typed({"n": 3, "note": "x"}, {"n": int})
    {'n': 3, 'note': 'x'}
    >>> typed({"n": "three"}, {"n": int})
    Traceback (most recent call last):
    toolkit.store.hints.Misfit: n is 'three', expected a whole number
    """
    origin, parts = get_origin(hint), get_args(hint)
    if isinstance(hint, Mapping):
        return _fields(value, hint, at)
    if origin is types.UnionType:
        return _any_of(value, parts, at)
    if hint is Any or (origin is Literal and isinstance(value, str) and value in parts):
        return value
    if _is_list(origin or hint) and isinstance(value, list | tuple):
        items = [typed(item, parts[0] if parts else Any, f"{at}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if (origin or hint) is tuple else items
    if _is_object(origin or hint) and isinstance(value, Mapping):
        return {k: typed(v, parts[1] if parts else Any, _inside(at, k)) for k, v in value.items()}
    if origin is None and hint in _NAMES and _is_plain(value, hint):
        return value
    raise Misfit(f"{at} is {brief(value)}, expected {described(hint)}")


def _is_list(kind: Any) -> bool:
    return kind in (list, tuple, Sequence)


def _is_object(kind: Any) -> bool:
    return kind in (dict, Mapping)


def _is_plain(value: Any, hint: type) -> bool:
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint) and isinstance(value, bool) == (hint is bool)


def _fields(value: Any, hint: Mapping[str, Any], at: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise Misfit(f"{at} is {brief(value)}, expected {described(hint)}")
    if missing := [name for name in hint if name not in value]:
        raise Misfit(f"{at} has no {missing[0]!r}, expected {described(hint)}")
    return {**value, **{name: typed(value[name], part, _inside(at, name)) for name, part in hint.items()}}


def _inside(at: str, name: str) -> str:
    """Return the place of a field, such as ``meta.task`` for the field ``task`` of the object at ``meta``.

    For a field of the outermost object, the place is the field's name alone. The place ``at`` is then a phrase, such as "the file".
    """
    return name if at.startswith(("the ", "its ")) else f"{at}.{name}"


def _any_of(value: Any, hints: Sequence[Any], at: str) -> Any:
    misfits = []
    for hint in hints:
        try:
            return typed(value, hint, at)
        except Misfit as error:
            misfits.append(error)
    # A message that begins with "{at} is" says that the whole value has the wrong type. If another message is about a part of the value,
    # raise that one: the value has the right outer type (object or list) for that hint, so the error is more precise.
    deepest = max(misfits, key=lambda error: not str(error).startswith(f"{at} is"))
    if str(deepest).startswith(f"{at} is"):
        raise Misfit(f"{at} is {brief(value)}, expected {' or '.join(map(described, hints))}")
    raise deepest
