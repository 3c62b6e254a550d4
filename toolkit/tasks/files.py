"""Problems of a JSONL file, in splits: its own, if every line names one in ``meta.split``, else by a hash of each problem's id."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from toolkit.tasks import grading, words
from toolkit.types import Problem


def check(path: str | Path, split: str) -> None:
    """Raise unless the file has problems of the split; errors as :func:`load`."""
    _of_split(path, split)


def load(path: str | Path, split: str, n: int, seed: int = 0) -> list[Problem]:
    """At most ``n`` problems of a split, in the file's order: all of them, or those that a hash of id and seed puts first.

    Each carries its split in ``meta["split"]``, and the file's name in ``meta["task"]`` if it names no task itself.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown split, a split without problems, or some lines that name a split and others that do not.
        store.DamagedFileError: a line is not a problem.
    """
    own = _of_split(path, split)
    chosen = {p.id for p in sorted(own, key=lambda p: words.digest(f"{seed}-{p.id}"))[:n]}
    about = {"task": Path(path).name}
    return [replace(p, meta={**about, **p.meta, "split": split}) for p in own if p.id in chosen]


def _of_split(path: str | Path, split: str) -> list[Problem]:
    problems = grading.problems_of(path)
    splits = _splits(path, problems, split)
    found = [p for p, own in zip(problems, splits, strict=True) if own == split]
    if not found:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(Counter(splits).items()))
        raise ValueError(f"{path} has no problem of split {split!r}: it has {counts}. Add problems, or take another split.")
    return found


def _splits(path: str | Path, problems: Sequence[Problem], asked: str) -> list[str]:
    named = [p.meta.get("split") for p in problems]
    if all(name is None for name in named):
        words.check_split(asked)
        return [words.own_split(p.id) for p in problems]
    wrong = next((p for p, name in zip(problems, named, strict=True) if not isinstance(name, str) or not name), None)
    if wrong is not None:
        raise ValueError(
            f"{path}: problem {wrong.id!r} has meta.split {wrong.meta.get('split')!r}, others name theirs. Name a split such as 'train' or "
            "'test' on every line, or on none (then a hash of the id decides)."
        )
    return [str(name) for name in named]
