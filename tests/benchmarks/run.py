"""The suite: ``python tests/benchmarks/run.py [--quick] [--device cuda] [--only collect,grpo] [--again] [--keep]``.

Each group of rows runs in its own process, bound to one core (a quick run has two at a time), and leaves its rows in a file under
``runs/bench``, so that the same command resumes a stopped suite. ``--keep`` copies the report and its table to
``tests/benchmarks``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import Queue
from threading import Lock

HERE = Path(__file__).parent
OUT = HERE.parents[1] / "runs" / "bench"
GROUPS = {
    "import": "imports.py", "rewards": "rewarding.py", "edit": "editing.py", "scale": "scaling.py", "collect": "collecting.py",
    "capture": "capture.py", "steering": "steering.py", "rollouts": "rolling.py", "grpo": "training.py", "retrieval": "retrieval.py",
}  # fmt: skip
QUICK_SECONDS = {  # about: those that take longest begin first
    "steering": 83, "retrieval": 65, "capture": 59, "rollouts": 55, "collect": 55, "grpo": 52, "scale": 34, "rewards": 27, "import": 21,
    "edit": 7,
}  # fmt: skip
ABSENT = "absent"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "transformer-lens", "nnsight", "numpy")


def machine(device: str) -> dict:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    found = {"processor": model, "cores": os.cpu_count(), "threads used": 1, "system": platform.system(), "device": device}
    if device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else ABSENT
    return found


def versions() -> dict:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ABSENT
    peers = HERE / "peers-requirements.txt"
    lines = [line.split("==") for line in peers.read_text().splitlines() if "==" in line]
    return found | {
        f"{name} (own environment)": number for name, number in lines if name in ("repeng", "steering-vectors", "transformers")
    }


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def table(report: dict) -> str:
    lines = [
        "| row | ratio | quartiles | aim | met | correctness check | bottleneck | absolute numbers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        spread = " to ".join(number(v) for v in row["spread"]) if row["spread"] else ""
        reached = {True: "yes", False: "**no**", None: ""}[row["reached"]]
        cells = (row["name"], number(row["ratio"]), spread, row["reach"] or "", reached, row["gate"], row["bound_by"], row["note"])
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    facts = [", ".join(f"{k} {v}" for k, v in report[name].items()) for name in ("machine", "versions", "measured")]
    told = ["# Last full run", f"Machine: {facts[0]}.", f"Versions: {facts[1]}.", f"Measured, one process per group: {facts[2]}."]
    return "\n\n".join([*told, "\n".join(lines)]) + "\n"


def cores() -> list[int | None]:
    """The processor's cores this process may use; one without a number where a process cannot be bound to them."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]


def measured_by(
    groups: list[str], where: Path, env: dict[str, str], on: list[int | None], note: Callable[[dict[str, list[dict]]], None]
) -> dict[str, list[dict]]:
    """Run each group in a process of its own, one at a time on each core; the rows of those that failed.

    Args:
        note: Called with the rows of those that failed so far, whenever a group has ended.
    """
    free: Queue[int | None] = Queue()
    for core in on:
        free.put(core)
    failed: dict[str, list[dict]] = {}
    writing = Lock()

    def run(group: str) -> None:
        core, began = free.get(), time.perf_counter()
        (where / f"{group}.json").unlink(missing_ok=True)
        bound = [] if core is None or not shutil.which("taskset") else ["taskset", "-c", str(core)]
        done = subprocess.run([*bound, sys.executable, str(HERE / GROUPS[group])], env=env, capture_output=True, text=True)
        with writing:
            print(f"{group}: {time.perf_counter() - began:.0f} s", flush=True)
            if done.returncode:
                (where / f"{group}.log").write_text(done.stderr)
                failed[group] = [unmeasured(group, done.stderr)]
            note(failed)
        free.put(core)

    longest_first = sorted(groups, key=lambda g: -QUICK_SECONDS[g])
    with ThreadPoolExecutor(len(on)) as pool:
        list(pool.map(run, longest_first))
    return failed


def unmeasured(group: str, said: str) -> dict:
    """The row of a group that ended with an error: a package that is missing here is no failure."""
    why = said.strip().splitlines()[-1] if said.strip() else "no message"
    missing = re.match(r"ModuleNotFoundError: No module named '([\w-]+)'$", why)
    gate = f"{ABSENT}: {missing[1]} is not installed" if missing else f"FAILED: {why[:200]}"
    return {"name": group, "ratio": None, "spread": None, "reach": None, "reached": None if missing else False, "gate": gate,
            "bound_by": "", "note": ""}  # fmt: skip


def write_report(asked: argparse.Namespace, where: Path, failed: dict[str, list[dict]]) -> dict:
    """Write the report of all groups measured so far, and return it."""
    rows = []
    for group in GROUPS:
        kept = where / f"{group}.json"
        rows += failed.get(group, []) or (json.loads(kept.read_text()) if kept.exists() else [])
    times = {g: where / f"{g}.json" for g in GROUPS if (where / f"{g}.json").exists()}
    measured = {g: datetime.fromtimestamp(file.stat().st_mtime).isoformat(" ", "minutes") for g, file in times.items()}
    report = {"rows": rows, "machine": machine(asked.device), "versions": versions(), "measured": measured}
    for place in [OUT] + ([HERE] if asked.keep else []):
        (place / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        (place / "report.md").write_text(table(report))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, few turns, two groups at a time: under five minutes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, with commas between")
    parser.add_argument("--again", action="store_true", help="measure groups again that have been")
    parser.add_argument("--keep", action="store_true", help="copy the report to tests/benchmarks")
    asked = parser.parse_args()
    where = OUT / ("quick" if asked.quick else f"full-{asked.device}")
    where.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "BENCH_QUICK": "1" if asked.quick else "0", "BENCH_DEVICE": asked.device, "HF_HUB_OFFLINE": "1",
           "OMP_NUM_THREADS": "1", "TOOLKIT_FAST": "1", "TOKENIZERS_PARALLELISM": "false",
           "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))}  # fmt: skip
    wanted = [
        g for g in GROUPS if g in asked.only.split(",") and (asked.again or asked.quick or not (where / f"{g}.json").exists())
    ]
    # On a GPU one group at a time, on any core: the card is shared, not the cores.
    on = [None] if asked.device == "cuda" else cores()[: 2 if asked.quick else 1]
    failed = measured_by(wanted, where, env, on, lambda so_far: write_report(asked, where, so_far))
    rows = write_report(asked, where, failed)["rows"]
    for row in rows:
        mark = {True: "ok ", False: "NO ", None: "   "}[row["reached"]]
        print(f"{mark} {row['name']:100.100} {number(row['ratio']):>8}  {row['reach'] or '':10} {row['gate'][:70]}")
    sys.exit(any(row["gate"].startswith("FAILED") for row in rows))


if __name__ == "__main__":
    main()
