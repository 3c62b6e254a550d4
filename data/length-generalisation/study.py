"""Which positional encodings and hints let a small decoder handle longer inputs? ``python data/length-generalisation/study.py``

Performs every run of ``planned()`` that has no result yet, about 8 seconds of CPU time each, in ``runs/length-generalisation``; after a
stop, the same command goes on. Then writes ``results.json``, ``runs.jsonl``, the tables of ``README.md`` and ``accuracy.png`` here, from all combinations
whose three seeds are there. ``--tables`` trains nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from toolkit import figures, report, store
from toolkit.jobs import length_generalisation as job
from toolkit.jobs import length_tables
from toolkit.jobs.length_generalisation import Run, Size
from toolkit.metrics import with_interval

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "data"))
import publish  # noqa: E402

KEPT = ROOT / "runs" / "length-generalisation"
SEEDS = (0, 1, 2)
NAMED = ("task", "encoding", "hint", "seed")
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


def write(results: length_tables.Results, seconds: float) -> None:
    """Write results, tables and the figure from all complete combinations."""
    numbers = length_tables.accuracies(results)
    orderings, hints = length_tables.encodings_compared(results), length_tables.hints_compared(results)
    heads, likeness = length_tables.attention_by_head(results), length_tables.likeness(maps(results))
    tables = {"accuracy": numbers, "orderings": orderings, "hints": hints, "attention": heads, "likeness": likeness}
    code = store.key([store.sources()[name].digest for name in CODE])
    about = {
        "made_by": store.made_by(code),
        "size": asdict(SIZE),
        "seeds": SEEDS,
        "runs_planned": len(planned()),
        "cpu_seconds": seconds,
    }
    rows = {name: store_rows(table) for name, table in tables.items()}
    store.write_json(about | rows, HERE / "results.json")
    store.write_rows((run for runs in results.values() for run in runs), HERE / "runs.jsonl")
    publish.splice("study", page(about, rows), HERE / "README.md")
    tasks = numbers["task"].nunique()
    publish.draw(figures.accuracy_by_length(numbers, metric="tokens"), HERE / "accuracy.png", 980, 260 + 220 * math.ceil(tasks / 3))


def store_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as JSON objects, without missing values."""
    return [{k: v for k, v in row.items() if v == v} for row in table.to_dict("records")]


def maps(results: length_tables.Results) -> dict[tuple[str, str], list[Tensor]]:
    """Return the attention maps of decoders without hints, by task and encoding."""
    return {
        (task, encoding): [
            store.read_tensors(KEPT / f"{Run(**{k: r[k] for k in NAMED}).name}.safetensors")[0]["attention"] for r in runs
        ]
        for (task, encoding, hint), runs in results.items()
        if hint == job.NO_HINT
    }


def page(about: Mapping[str, Any], rows: Mapping[str, list[dict[str, Any]]]) -> str:
    """Return the tables of the README."""
    done = len({(r["task"], r["encoding"], r["hint"]) for r in rows["accuracy"]})
    planned_combinations = about["runs_planned"] // len(SEEDS)
    head = f"{done} of {planned_combinations} combinations are done, {about['cpu_seconds'] / 60:.0f} minutes of CPU time. {about['made_by']}."
    parts = [
        ("Accuracy, percent: whole answer right; in brackets: share of right tokens", accuracy_table(rows["accuracy"])),
        (
            f"Published orderings of encodings at {length_tables.JUDGED} times the trained length, points",
            verdict_table(rows["orderings"]),
        ),
        (f"Hints at {length_tables.JUDGED} times the trained length, points", verdict_table(rows["hints"])),
        ("Attention of NoPE is like that of T5's encoding? Divergence from NoPE, nats", likeness_table(rows["likeness"])),
        ("Attention distance per head at the trained length, tokens", head_table(rows["attention"])),
    ]
    return "\n\n".join([head, *(f"### {title}\n\n{table}" for title, table in parts if table)])


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return accuracy by combination and multiple of the trained length."""
    cells = {(r["task"], r["encoding"], r["hint"], r["multiple"], r["metric"]): r for r in rows}
    lines = {}
    for task, encoding, hint in dict.fromkeys(name[:3] for name in cells):
        both = [[cells[task, encoding, hint, m, metric] for metric in length_tables.METRICS] for m in job.MULTIPLES]
        lines[f"{task}, {encoding}, {hint}"] = [f"{100 * exact['mean']:.0f} ({100 * tokens['mean']:.0f})" for exact, tokens in both]
    columns = [f"{m} x" for m in job.MULTIPLES]
    return report.markdown(pd.DataFrame.from_dict(lines, orient="index", columns=columns).rename_axis("task, encoding, hint"))


def verdict_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return differences with intervals and verdicts of both metrics."""
    lines: dict[str, list[str]] = {}
    for r in rows:
        cell = with_interval(r["mean"], r["low"], r["high"], "share", sign="+")
        p = f" (p {r['p_holm']:.3f})" if "p_holm" in r else ""
        lines.setdefault(f"{r['where']}: {r['ordering']}", []).extend([cell, r["verdict"] + p])
    columns = ["whole answer", "verdict on whole answers (p)", "tokens", "verdict on tokens (p)"]
    return report.markdown(pd.DataFrame.from_dict(lines, orient="index", columns=columns)) if lines else ""


def likeness_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how far attention is from NoPE's, and how much further than T5's."""
    lines = {
        f"{r['task']}, {'NoPE, another seed' if r['encoding'] == 'none' else r['encoding']}": [
            with_interval(r["mean"], r["low"], r["high"], "nats", digits=3),
            with_interval(r["further"], r["further_low"], r["further_high"], "nats", sign="+", digits=3) if "further" in r else "",
            r["verdict"] + (f" (p {r['p_holm']:.3f})" if "p_holm" in r else "") if "verdict" in r else "",
        ]
        for r in rows
    }
    columns = ["divergence", "further than T5", "T5 is nearer"]
    return report.markdown(pd.DataFrame.from_dict(lines, orient="index", columns=columns)) if lines else ""


def head_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the attention distances of the heads of each layer, nearest first."""
    lines: dict[str, dict[str, str]] = {}
    for r in rows:
        line = lines.setdefault(f"{r['task']}, {r['encoding']}", {})
        before = line.get(f"layer {r['layer']}", "")
        line[f"layer {r['layer']}"] = f"{before}{', ' * bool(before)}{r['distance']:.1f}"
        line["uniform attention"] = f"{r['uniform']:.1f}"
    table = pd.DataFrame.from_dict(lines, orient="index")
    return report.markdown(table[sorted(table.columns)]) if lines else ""  # layers before "uniform attention"


def main() -> None:
    """Perform the runs that are missing, and write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="train nothing; write everything from the runs that are kept")
    tables_only = parser.parse_args().tables
    torch.set_num_threads(1)
    store.writable(KEPT)
    for run in tqdm([] if tables_only else [run for run in planned() if kept(run) is None], unit="run"):
        perform(run)
    found = [result for run in planned() if (result := kept(run))]
    results = length_tables.complete(found, SEEDS)
    if not results:
        sys.exit(f"{KEPT} has no combination of which all {len(SEEDS)} seeds are done: run this script without --tables.")
    write(results, sum(r["cpu_seconds"] for runs in results.values() for r in runs))


if __name__ == "__main__":
    main()
