"""Every kind of file that the toolkit reads, altered in some way, and read: ``python tests/fuzz.py --all --report FILE``.

A reader must either raise one of the toolkit's errors, in at most 400 characters that name the file (and the line, where there are
lines), or return what it returns for the whole file. Any other exception, more than 10 seconds, and another value are failures;
another value is none where the alteration is said to be legal (another finite number in a tensor, fewer lines).

Without ``--all`` only a few alterations of each kind are tried, as in ``test_fuzz.py``. All of it is drawn from ``--seed``.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import alterations as alter
import fuzz_kinds
import fuzz_records
import numpy as np
import pandas as pd
import torch
from alterations import Alteration

from toolkit import store

KINDS = fuzz_kinds.KINDS | fuzz_records.KINDS
LIMIT = 10  # seconds
EVERY = 10**6  # no bound to the alterations of single fields
OUTCOMES = ("named error", "same value", "legal other value", "traceback", "bad message", "hang", "silently accepted")
FAILURES = OUTCOMES[3:]


class HangError(Exception):
    """A reader took more than 10 seconds."""


@dataclass(frozen=True)
class Trial:
    """What came of reading an altered file."""

    kind: str
    label: str
    outcome: str
    detail: str = ""


def plain(value: Any) -> Any:
    """A value as containers that compare by content, tensors bit by bit."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, pd.DataFrame):
        return value.to_json(orient="split", double_precision=15)
    if dataclasses.is_dataclass(value):
        return (type(value).__name__, {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else (type(value).__name__, value)


def trial(name: str, alteration: Alteration, folder: Path) -> Trial:
    """Write a whole file into an empty folder, alter it, read it."""
    kind = KINDS[name]
    path = kind.make(folder)
    whole = plain(kind.read(path))
    alteration.apply(path)
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(LIMIT)
    try:
        value = kind.read(path)
    except HangError:
        return Trial(name, alteration.label, "hang")
    except BaseException as error:  # noqa: BLE001 (whatever it is, it is what is looked for)
        return Trial(name, alteration.label, _judged(error, path, alteration), f"{type(error).__name__}: {error}"[:500])
    finally:
        signal.alarm(0)
    if plain(value) == whole:
        return Trial(name, alteration.label, "same value")
    return Trial(name, alteration.label, "legal other value" if alteration.legal else "silently accepted", str(value)[:300])


def _late(*_: object) -> None:
    raise HangError


def _judged(error: BaseException, path: Path, alteration: Alteration) -> str:
    named = type(error).__module__.startswith("toolkit.") or type(error) in (ValueError, FileNotFoundError)
    if not named:
        return "traceback"
    text = str(error).replace(str(path.parent), "")
    names = path.name in text or path.parent.name in str(error) or "SteeringVector" in text or text.startswith("This ")
    has_line = alteration.line is None or f"line {alteration.line}" in text
    return "named error" if names and has_line and len(text) <= 400 else "bad message"


def alterations_of(name: str, seed: int, most: int) -> list[Alteration]:
    """The alterations of a kind, drawn from a seed; ``most`` bounds those of single fields."""
    kind, rng = KINDS[name], random.Random(f"{seed}-{name}")
    with tempfile.TemporaryDirectory() as folder:
        path = kind.make(Path(folder))
        every = [*alter.of_any_file(path.stat().st_size, rng), *kind.of(path, rng, most)]
    return [
        dataclasses.replace(a, legal=True) if kind.cut_is_legal and a.label.startswith(("file: cut to", "file: empty")) else a
        for a in every
    ]


def run(names: list[str], seed: int, *, each: int | None = None) -> list[Trial]:
    """Try alterations of some kinds; ``each``: so many of each kind, drawn; ``None`` is all, every field in every way."""
    trials = []
    for name in names:
        chosen = alterations_of(name, seed, EVERY if each is None else 60)
        if each is not None:
            chosen = random.Random(f"{seed}-{name}-few").sample(chosen, min(each, len(chosen)))
        for alteration in chosen:
            with tempfile.TemporaryDirectory() as folder:
                trials.append(trial(name, alteration, Path(folder)))
    return trials


def main() -> None:
    """Run, print the figures, and leave with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every alteration, instead of a few of each kind")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, with commas between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="file for the figures, as JSON")
    given = parser.parse_args()
    trials = run(given.only.split(","), given.seed, each=None if given.all else 3)
    counts = Counter(t.outcome for t in trials)
    failed = [dataclasses.asdict(t) for t in trials if t.outcome in FAILURES]
    figures = {"alterations": len(trials), **{outcome: counts[outcome] for outcome in OUTCOMES}, "failed": failed}
    if given.report:
        store.write_json(figures, given.report)
    for t in failed:
        print(f"{t['outcome']:18} {t['kind']}: {t['label']}: {t['detail'][:200]}")
    print(", ".join(f"{figures[name]} {name}" for name in ("alterations", *OUTCOMES)))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
