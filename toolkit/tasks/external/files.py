"""Load problems from a JSONL file. Either every line names its split in ``meta.split``, or a hash of each problem's id decides it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from toolkit.tasks import grading, splits
from toolkit.types import Problem


def check(path: str | Path, split: str) -> None:
    """Raise an error unless the file has problems of the split.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has no problem of this split; or only some lines name their split in ``meta.split``; or no line does, and
            ``split`` is not train, dev or test.
        store.DamagedFileError: a line is not a problem.
    """
    _of_split(path, split)


def load(path: str | Path, split: str, n: int, seed: int = 0) -> list[Problem]:
    """Return at most ``n`` problems from one split of a file, in the file's order.

    If the split has more than ``n``, a hash of seed and problem id decides which are taken. Each problem gets ``meta["split"]``. A problem
    without ``meta["task"]`` gets the file's name as its task.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has no problem of this split; or only some lines name their split in ``meta.split``; or no line does, and
            ``split`` is not train, dev or test.
        store.DamagedFileError: a line is not a problem.
    """
    problems = _of_split(path, split)
    chosen = {p.id for p in sorted(problems, key=lambda p: splits.digest(f"{seed}-{p.id}"))[:n]}
    about = {"task": Path(path).name}
    return [replace(p, meta={**about, **p.meta, "split": split}) for p in problems if p.id in chosen]


def _of_split(path: str | Path, split: str) -> list[Problem]:
    problems = grading.problems_of(path)
    names = _splits(path, problems, split)
    chosen = [p for p, name in zip(problems, names, strict=True) if name == split]
    if not chosen:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(Counter(names).items()))
        raise ValueError(f"{path} has no problem of split {split!r}: it has {counts}. Add problems, or choose another split.")
    return chosen


def _splits(path: str | Path, problems: Sequence[Problem], wanted: str) -> list[str]:
    """Return the split of each of ``problems``.

    Args:
        wanted: Split that the caller wants. If the file names no splits, it must be train, dev or test.

    Raises:
        ValueError: no line names its split, and ``wanted`` is not train, dev or test; or only some lines name their split.
    """
    named = [p.meta.get("split") for p in problems]
    if all(name is None for name in named):
        splits.check_split(wanted)
        return [splits.split_by_id(p.id) for p in problems]
    wrong = next((p for p, name in zip(problems, named, strict=True) if not isinstance(name, str) or not name), None)
    if wrong is not None:
        raise ValueError(
            f"{path}: problem {wrong.id!r} has meta.split {wrong.meta.get('split')!r}, but other lines name a split. Name a split such as "
            "'train' or 'test' on every line, or on none (then a hash of the id decides)."
        )
    return [str(name) for name in named]
