"""Records of the problems that something was made from. They travel in its provenance, so that nothing is judged on them unawares.

A record is a plain mapping: ``task``, ``split``, ``seed``, ``rollouts`` (as text, if only a part of a run was used) and
``problem_ids``, sorted hashes of 8 bytes. What is not known is left out.

Problems are compared by id: an id stands for its question, in every file. A problem of a file that gives none is named by a hash of its
messages, so that only the same question has the same id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

KEYS = ("task", "split", "seed", "rollouts", "problem_ids")
Record = Mapping[str, Any]
HINT: Any = {"problem_ids": list[str]}
"""What a record holds at least, by type."""


def digest(text: str) -> str:
    """Return sixteen hexadecimal digits (8 bytes of SHA-256) that stand for a text, the same on every machine."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check(notes: Mapping[str, Any]) -> None:
    """Raise ValueError if the problems that notes name are no list of hashes."""
    ids = notes.get("problem_ids", [])
    if not isinstance(ids, list | tuple) or not all(isinstance(i, str) for i in ids):
        raise ValueError(f"notes.problem_ids is {str(ids)[:60]!r}, expected a list of hashes.")


def record(problem_ids: Iterable[str], **known: Any) -> dict[str, Any]:
    """A record of these problems; what is ``None`` is left out."""
    ids = sorted({digest(i) for i in problem_ids})
    return {**{k: v for k, v in known.items() if v is not None}, "problem_ids": ids}


def record_in(notes: Mapping[str, Any]) -> dict[str, Any]:
    """The record in the notes of a provenance; empty if it names no problems."""
    return {k: notes[k] for k in KEYS if k in notes} if notes.get("problem_ids") else {}


def join_notes(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Notes of a sum of two things: the problems of both, and what else both agree on."""
    same = {k: v for k, v in first.items() if k in second and second[k] == v}
    ids = sorted({*first.get("problem_ids", ()), *second.get("problem_ids", ())})
    return {**same, "problem_ids": ids} if ids else same


def distinct(records: Iterable[Record]) -> tuple[Record, ...]:
    """Records in order, each once, without empty ones."""
    kept: list[Record] = []
    for one in records:
        if one and one not in kept:
            kept.append(one)
    return tuple(kept)


def overlap(records: Iterable[Record], problem_ids: Iterable[str]) -> list[str]:
    """The problems, by id, that one of the records names."""
    made_from = {i for one in records for i in one.get("problem_ids", ())}
    return [i for i in problem_ids if digest(i) in made_from] if made_from else []


def describe(one: Record) -> str:
    """A record in words: ``100 problems of arithmetic (train, seed 0)``."""
    count = len(one.get("problem_ids", ()))
    named = f"{count} problem{'s' * (count != 1)}" + (f" of {str(one['task']).rpartition('/')[2]}" if "task" in one else "")
    inside = [form.format(one[key]) for key, form in (("split", "{}"), ("seed", "seed {}"), ("rollouts", "{}")) if key in one]
    return named + (f" ({', '.join(inside)})" if inside else "")


def describe_all(records: Sequence[Record]) -> str:
    """Several records in words, each once."""
    return " and ".join(dict.fromkeys(describe(one) for one in records))
