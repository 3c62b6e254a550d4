"""Which positional encodings and hints let a small decoder handle longer inputs? ``python data/length-generalisation/study.py``

Trains every combination in ``RUNS`` that has no result yet, about 7 seconds of CPU time each, in ``runs/length-generalisation``; after a
stop, the same command goes on. Then writes ``results.json``, the tables of ``README.md`` and ``accuracy.png`` here, from all combinations
whose three seeds are there. ``--tables`` trains nothing.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from toolkit import store
from toolkit.jobs import length_generalisation as job
from toolkit.jobs.length_generalisation import Run, Size

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KEPT = ROOT / "runs" / "length-generalisation"
SEEDS = (0, 1, 2)
ENCODINGS = ("none", "t5", "rope", "alibi", "absolute")
HINTED = {"sort": ("successor", "any element", "successor so far", "relabelled", "rank"), "parity": ("parity so far", "relabelled")}
SIZE = Size()
CODE = (
    "toolkit.methods.positional_encodings", "toolkit.methods.task_hinting", "toolkit.tasks.generators.sequences",
    "toolkit.jobs.length_generalisation",
)  # fmt: skip
"""Modules that a result depends on."""


def planned() -> list[Run]:
    """Return all runs, the most informative combinations first. The seeds of a combination stand together."""

    def runs(task: str, hint: str) -> list[Run]:
        return [Run(task=task, encoding=e, hint=hint, seed=s) for e in ENCODINGS for s in SEEDS]

    def paired(task: str, hints: tuple[str, ...]) -> list[Run]:
        return [Run(task=task, encoding=e, hint=h, seed=s) for e in ENCODINGS for h in hints for s in SEEDS]

    first = [*runs("sort", job.NO_HINT), *paired("sort", HINTED["sort"][:2])]
    plain = [run for task in ("count", "copy", "reverse", "addition", "parity") for run in runs(task, job.NO_HINT)]
    return [*first, *plain, *paired("parity", HINTED["parity"]), *paired("sort", HINTED["sort"][2:])]


def key(run: Run) -> str:
    """Return a hash of everything that the result of a run depends on."""
    return store.key({"run": asdict(run), "size": asdict(SIZE), "code": [store.sources()[name].digest for name in CODE]})


def kept(run: Run) -> dict[str, Any] | None:
    """Return the result of a run, or ``None`` if there is none, or one of other code or another size."""
    path = KEPT / f"{run.name}.json"
    result = store.read_json(path, dict[str, Any]) if path.is_file() else None
    return result if result and result["key"] == key(run) else None


def perform(run: Run) -> None:
    """Train and measure one decoder, and keep its attention maps and then its result."""
    start = time.process_time()
    model = job.train(run, SIZE)
    result = job.measure(model, run.task, SIZE)
    attention = job.maps(model, job.held_out(run.task, SIZE.trained(run.task), SIZE.mapped))
    store.write_tensors({"attention": attention.contiguous()}, {"run": run.name}, KEPT / f"{run.name}.safetensors")
    seconds = round(time.process_time() - start, 1)
    store.write_json({"key": key(run), "cpu_seconds": seconds, **asdict(run), **result}, KEPT / f"{run.name}.json")


def main() -> None:
    """Perform the runs that are missing."""
    torch.set_num_threads(1)
    store.writable(KEPT)
    for run in tqdm([run for run in planned() if kept(run) is None], unit="run"):
        perform(run)


if __name__ == "__main__":
    main()
