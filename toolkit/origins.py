"""Records of problems: those with which a direction or plan was computed, or a model edited or trained.

A *plan* is a set of edits of attention heads (``types.Plan``). With these records, the toolkit can refuse to evaluate a condition on the
problems that were used to edit, steer or train it.

A record is a dict. The record of a direction or plan is part of its provenance notes (``Provenance.notes``). The records of a
model are saved beside its weights. The fields of a record:

| field | content |
|---|---|
| ``task``, ``split``, ``seed`` | how the problems were loaded |
| ``rollouts`` | text that says which rollouts of a run were used, if not all |
| ``problem_ids`` | sorted hashes of the problems' ids (``digest``) |

A field whose value is not known is absent.

Problems are compared by id, so the same id must mean the same question in every file. If a file gives no ids, this is always true, because
the id of a problem is then a hash of its messages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

KEYS = ("task", "split", "seed", "rollouts", "problem_ids")  # fields of a record
Record = Mapping[str, Any]
HINT: Any = {"problem_ids": list[str]}
"""Type hint of a record for ``store.read_json``. It names the only field that a record must have."""


def digest(text: str) -> str:
    """Return a hash of a text, such as a problem's id, as 16 hexadecimal digits: the first 8 bytes of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check(notes: Mapping[str, Any]) -> None:
    """Check provenance notes (``Provenance.notes``): raise ValueError if ``notes["problem_ids"]`` exists and is not a list of strings."""
    ids = notes.get("problem_ids", [])
    if not isinstance(ids, list | tuple) or not all(isinstance(i, str) for i in ids):
        raise ValueError(f"notes.problem_ids is {str(ids)[:60]!r}, expected a list of hashes (text).")


def record(problem_ids: Iterable[str], **fields: Any) -> dict[str, Any]:
    """Return a record: a dict that lists the problems with which a direction or plan was computed, or a model was changed.

    Args:
        problem_ids: Ids of the problems. The record holds their hashes, under ``problem_ids``.
        fields: Other fields of the record: ``task``, ``split`` and ``seed`` (how the problems were loaded), and ``rollouts`` (which
            rollouts of a run were used). A field that is ``None`` is left out.
    """
    ids = sorted({digest(i) for i in problem_ids})
    return {**{k: v for k, v in fields.items() if v is not None}, "problem_ids": ids}


def record_in(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record (see ``record``) in the provenance notes of a value, such as a direction.

    It says with which problems the value was computed. The result is an empty dict if the notes hold no problem ids.
    """
    return {k: notes[k] for k in KEYS if k in notes} if notes.get("problem_ids") else {}


def join_notes(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the provenance notes for the sum of two values, such as two ``Moments``.

    The new notes hold the (hashed) problem ids of both values. Any other note is included only if both values have it and it is equal.

    Args:
        first, second: Provenance notes of the two values.
    """
    same = {k: v for k, v in first.items() if k in second and second[k] == v}
    ids = sorted({*first.get("problem_ids", ()), *second.get("problem_ids", ())})
    return {**same, "problem_ids": ids} if ids else same


def distinct(records: Iterable[Record]) -> tuple[Record, ...]:
    """Return records of problems (see ``record``) in the same order, without duplicates and without empty records."""
    unique: list[Record] = []
    for one in records:
        if one and one not in unique:
            unique.append(one)
    return tuple(unique)


def overlap(records: Iterable[Record], problem_ids: Iterable[str]) -> list[str]:
    """Return those of ``problem_ids`` that occur in any of the records, in the same order.

    Args:
        records: Records of the problems with which a condition was edited, steered or trained (see ``record``).
        problem_ids: Ids to look up, usually of the problems of an evaluation. They are plain ids, not hashes; so are those returned.
    """
    made_from = {i for one in records for i in one.get("problem_ids", ())}
    return [i for i in problem_ids if digest(i) in made_from] if made_from else []


def describe(one: Record) -> str:
    """Return a text that describes the problems in a record: their number, task, split and seed, and the rollouts that were used.

    >>> describe(record(["a", "b"], task="arithmetic", split="train", seed=0))
    '2 problems of arithmetic (train, seed 0)'
    """
    count = len(one.get("problem_ids", ()))
    problems = f"{count} problem{'s' * (count != 1)}" + (f" of {str(one['task']).rpartition('/')[2]}" if "task" in one else "")
    details = [form.format(one[key]) for key, form in (("split", "{}"), ("seed", "seed {}"), ("rollouts", "{}")) if key in one]
    return problems + (f" ({', '.join(details)})" if details else "")


def describe_all(records: Sequence[Record]) -> str:
    """Return one text that describes the problems in several records: the texts of ``describe``, without duplicates, joined by "and"."""
    return " and ".join(dict.fromkeys(describe(one) for one in records))
