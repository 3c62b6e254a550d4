"""Run checks one after the other, each guarded, timed and written down at once; and the report made from what was written.

``OUT/rows.jsonl`` grows by one line per row. ``OUT/report.json`` and ``OUT/report.md`` are written anew after every check, so that a stage
that is killed leaves what it measured.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aims import AIMS, STAGES, Aim

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "datasets",
    "accelerate",
    "peft",
    "numpy",
    "pandas",
    "pyarrow",
    "safetensors",
    "tokenizers",
)
OPTIONAL = ("trl", "datasets", "pyarrow", "plotly", "peft", "accelerate")  # a check that misses one of these is "absent"
ROWS, REPORT, PAGE = "rows.jsonl", "report.json", "report.md"

Value = float | tuple[float, str]
"""A measured number, or the number and a note."""
Check = Callable[[Any], Mapping[str, Value] | Iterator[tuple[str, Value]]]
"""A function that measures rows. As a generator it yields them one by one, so that a late failure keeps the earlier rows."""


class Absent(Exception):
    """Raised by a check that cannot be run here, such as one that needs a GPU. The message says what is missing."""


class TimeUp(BaseException):
    """Raised inside a check when the stage's time is over. No ``except Exception`` stops it."""


class Ledger:
    """The rows of one stage.

    Args:
        out: Directory of the report.
        stage: Name of the stage.
        small: True for toy sizes.
        limit: Seconds that the stage may take, from now on.
        aims: All rows that are expected.
    """

    def __init__(self, out: Path, stage: str, *, small: bool, limit: float, aims: Sequence[Aim] = AIMS) -> None:
        self.out, self.stage, self.small, self.aims = out, stage, small, [aim for aim in aims if aim.stage == stage]
        self.ends = time.monotonic() + limit
        self.judged = on_card() and not small
        out.mkdir(parents=True, exist_ok=True)
        append(out, [{"stage": stage, "machine": machine(), "small": small, "limit": limit}])

    def run(self, checks: Mapping[str, Check], setting: Any) -> None:
        """Run the checks in the order of the aims. A check that fails does not stop the others."""
        for name in dict.fromkeys(aim.check for aim in self.aims):
            rows: dict[str, Value] = {}
            reset_peak()
            began, why, verdict = time.perf_counter(), "", "failed"
            try:
                with time_limit(self.ends - time.monotonic()):
                    found = checks[name](setting)
                    for row, value in found.items() if isinstance(found, Mapping) else found:
                        rows[row] = value
                    synchronize()
            except TimeUp:
                verdict, why = "not run", "the stage's time was over"
            except Absent as missing:
                verdict, why = "absent", str(missing)
            except Exception as error:  # noqa: BLE001
                missing_package = absent_package(error)
                verdict = "absent" if missing_package else "failed"
                why = f"{missing_package} is not installed" if missing_package else traceback.format_exc()
            self._note(name, rows, verdict, why, time.perf_counter() - began)
            forget()

    def _note(self, check: str, rows: Mapping[str, Value], verdict: str, why: str, seconds: float) -> None:
        peak, expected = peak_mb(), [aim for aim in self.aims if aim.check == check]
        lines = []
        for aim in expected:
            line: dict[str, Any] = {"stage": self.stage, "check": check, "row": aim.row, "reach": aim.reach}
            if aim.row in rows:
                measured = rows[aim.row]
                value, note = measured if isinstance(measured, tuple) else (measured, "")
                line |= {"value": float(value), "note": note, "verdict": self._judge(aim, float(value))}
            else:
                line |= {"value": None, "note": "", "verdict": verdict, "why": why or f"{check} did not measure it"}
            lines.append(line | {"seconds": round(seconds, 2), "peak_mb": round(peak)})
        append(self.out, lines)
        write_report(self.out)

    def _judge(self, aim: Aim, value: float) -> str:
        if aim.reach is None or (aim.on_card and not self.judged):
            return "measured"
        return "met" if aim.met(value) else "missed"


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TimeUp`` inside the context after so many seconds, as soon as Python gets to run."""

    def stop(*_: Any) -> None:
        raise TimeUp

    if seconds <= 0:
        raise TimeUp
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def absent_package(error: BaseException | None) -> str | None:
    """Return the optional package whose absence an error, or one that it was raised from, reports.

    A missing module inside an installed package is no absence: the package has changed.
    """
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL:
            return error.name
        error = error.__cause__ or error.__context__
    return None


# --- the report ----------------------------------------------------------------------------------------------


def append(out: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Add lines to ``OUT/rows.jsonl``, safe on the disk. A line that a kill cut off stays alone."""
    path = out / ROWS
    cut = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as stream:
        stream.write("\n" * cut + "".join(json.dumps(line) + "\n" for line in lines))
        stream.flush()
        os.fsync(stream.fileno())


def read_rows(out: Path) -> tuple[dict[str, dict], list[dict]]:
    """Return the facts about each stage and the newest line of every row, in the order of the aims. A line cut off by a kill is left out."""
    stages: dict[str, dict] = {}
    rows: dict[tuple[str, str], dict] = {}
    for text in (out / ROWS).read_text().splitlines() if (out / ROWS).exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if "machine" in line:
            stages[line["stage"]] = line
            rows = {key: row for key, row in rows.items() if key[0] != line["stage"]}  # the stage was begun again
        else:
            rows[line["stage"], line["row"]] = line
    return stages, list(rows.values())


def missing_rows(out: Path, stage: str, why: str, aims: Sequence[Aim] = AIMS) -> None:
    """Write a line for each row of a stage that has none, with the reason, and the report."""
    have = {row["row"] for row in read_rows(out)[1] if row["stage"] == stage}
    lines = [
        {"stage": stage, "check": aim.check, "row": aim.row, "reach": aim.reach, "value": None, "note": "", "verdict": "failed", "why": why,
         "seconds": None, "peak_mb": None}
        for aim in aims if aim.stage == stage and aim.row not in have
    ]  # fmt: skip
    append(out, lines)
    write_report(out)


def write_report(out: Path) -> None:
    """Write ``report.json`` and ``report.md`` from the rows measured so far."""
    stages, rows = read_rows(out)
    order = list(STAGES)
    report = {"stages": {name: stages[name] for name in order if name in stages}, "rows": rows}
    for name, text in ((REPORT, json.dumps(report, indent=1) + "\n"), (PAGE, page(report))):
        part = out / f".{name}"
        part.write_text(text)
        part.replace(out / name)


def page(report: Mapping[str, Any]) -> str:
    """Return the report as markdown: a table per stage, and the reasons of the rows that have no number."""
    parts = ["# Measured on a GPU"]
    if not any(facts["machine"]["card"] for facts in report["stages"].values()):
        parts.append("**There was no GPU: this is a rehearsal on a CPU. Its speeds say nothing about a GPU.**")
    for stage in dict.fromkeys(row["stage"] for row in report["rows"]):
        mine, facts = [row for row in report["rows"] if row["stage"] == stage], report["stages"].get(stage)
        counts = {
            verdict: sum(row["verdict"] == verdict for row in mine) for verdict in dict.fromkeys(row["verdict"] for row in mine)
        }
        told = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
        if facts is None:
            parts.append(f"## {stage}\n\nThe stage did not begin. {told.capitalize()}.")
        else:
            about = ", ".join(f"{name} {value}" for name, value in facts["machine"].items() if value)
            size = "Toy size" if facts["small"] else "Full size"
            parts.append(f"## {stage}\n\n{about}. {size}, at most {facts['limit']:.0f} s. {told.capitalize()}.")
        lines = ["| row | value | reach | verdict | s | peak MB | note |", "|---|---|---|---|---|---|---|"]
        for row in mine:
            value = "" if row["value"] is None else f"{row['value']:.4g}"
            verdict = f"**{row['verdict']}**" if row["verdict"] in ("missed", "failed") else row["verdict"]
            cells = (row["row"], value, row["reach"] or "", verdict, row["seconds"], row["peak_mb"], row["note"])
            lines.append("| " + " | ".join("" if c is None else str(c).replace("|", "/").replace("\n", " ") for c in cells) + " |")
        parts.append("\n".join(lines))
        reasons: dict[str, list[str]] = {}
        for row in mine:
            if row.get("why"):
                reasons.setdefault(row["why"], []).append(row["check"])
        parts += [f"{', '.join(dict.fromkeys(checks))}:\n\n```text\n{why.strip()}\n```" for why, checks in reasons.items()]
    return "\n\n".join(parts) + "\n"


# --- the machine ---------------------------------------------------------------------------------------------


def on_card() -> bool:
    """Return True if there is a GPU."""
    import torch

    return torch.cuda.is_available()


def machine() -> dict[str, Any]:
    """Return the names of card and processor, and the versions of what is installed; ``None`` for what is not."""
    import torch

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    card = torch.cuda.get_device_name() if on_card() else None
    return {"card": card, "processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def synchronize() -> None:
    """Wait for the GPU, if there is one, so that its errors belong to the check that caused them."""
    if on_card():
        import torch

        torch.cuda.synchronize()


def reset_peak() -> None:
    if on_card():
        import torch

        torch.cuda.reset_peak_memory_stats()


def peak_mb() -> float:
    """Return the largest memory since ``reset_peak``: of the GPU, or, without one, of the process since it began."""
    if on_card():
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10


def forget() -> None:
    """Free what a check left behind."""
    gc.collect()
    if on_card():
        import torch

        torch.cuda.empty_cache()
