"""Timing: everything that is compared runs in turns inside one process, and a row is the ratio of its turns."""

from __future__ import annotations

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEVICE = torch.device(os.environ.get("BENCH_DEVICE", "cpu"))
QUICK = os.environ.get("BENCH_QUICK") == "1"
OUT = ROOT / "runs" / "bench"
WARM_UPS = 1 if QUICK else 2
REPEATS = 3 if QUICK else 7

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        ratio: Median over turns of ours / theirs (or as ``name`` says).
        spread: Its quartiles.
        reach: The aim, such as ``"<= 1.05"``; ``None`` for a line that only informs.
        gate: The correctness check before the timing, and its result.
        bound_by: The bottleneck, and how far the ratio is from that bound.
        note: Absolute numbers, for orientation; they mean little on a shared machine.
    """

    name: str
    ratio: float | None
    spread: tuple[float, float] | None
    reach: str | None
    gate: str
    bound_by: str
    note: str = ""

    @property
    def reached(self) -> bool | None:
        if self.reach is None or self.ratio is None:
            return None
        sign, number = self.reach.split()[:2]
        return self.ratio <= float(number) if sign == "<=" else self.ratio >= float(number)


def now() -> float:
    """Seconds of this process's processor (all threads), or of a GPU's clock: other work on the machine hardly counts."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def turns(work: Mapping[str, Work], repeats: int | None = None) -> dict[str, list[float]]:
    """Seconds of every piece of work, in turns (A B C A B C ...), after two rounds that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(WARM_UPS + (repeats or REPEATS)):
        for name, run in work.items():
            gc.collect()
            began = now()
            run()
            took = now() - began
            if turn >= WARM_UPS:
                seconds[name].append(took)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, tuple[float, float]]:
    """Median of the ratios within each turn, and their quartiles."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    if len(each) < 2:
        return each[0], (each[0], each[0])
    low, _, high = statistics.quantiles(each, n=4, method="inclusive")
    return statistics.median(each), (low, high)


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)


GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": ("scaled_dot_product", "flash_attention", "softmax"),
    "copies": ("aten::cat", "aten::copy_", "index_select", "aten::index", "aten::clone", "index_copy", "aten::stack"),
}


def split(events: Iterable[Any]) -> tuple[dict[str, float], float]:
    """Seconds of each kind of operations, and of all, from a profiler's averages.

    On a GPU a kernel's time is in two events: that of the operation which launched it, and its own. Only the first is counted.
    """
    totals, own = dict.fromkeys(GROUPS, 0.0), 0.0
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            continue
        took = (event.self_device_time_total if DEVICE.type == "cuda" else event.self_cpu_time_total) / 1e6
        own += took
        for group, names in GROUPS.items():
            if any(name in event.key for name in names):
                totals[group] += took
                break
    return totals, own


def shares(run: Work) -> dict[str, float]:
    """Where one run spends its time: the share of each kind of operations, and of what is Python and dispatch between them."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])
    run()
    began = now()
    run()
    whole = now() - began
    with profile(activities=activities) as found:
        run()
    totals, own = split(found.key_averages())
    whole = max(whole, own)
    totals |= {"other operations": own - sum(totals.values()), "Python and dispatch": max(0.0, whole - own)}
    return {kind: took / whole for kind, took in totals.items()}


def words(found: Mapping[str, float]) -> str:
    """Shares in words; kinds of operations below half a percent are left out."""
    return ", ".join(f"{kind} {share:.0%}" for kind, share in found.items() if share >= 0.005 or kind not in GROUPS)


def profile(run: Work) -> str:
    """Where one run spends its time, in words."""
    return words(shares(run))


def peak() -> float:
    """Largest memory this process has had, MB (of the GPU, if on one)."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def apart(script: str, *args: str, python: str = sys.executable, timeout: float = 7200) -> dict:
    """What a script of this directory prints as its last line (JSON), run in a process of its own: for peaks of memory and peers."""
    # Another interpreter has packages of its own; ours may have the toolkit only through this variable.
    env = dict(os.environ) if python == sys.executable else {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([python, str(HERE / script), *args], capture_output=True, text=True, timeout=timeout, env=env)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(args)}: {done.stderr.strip()[-800:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def write(group: str, rows: list[Row]) -> None:
    """Keep the rows of a group, so that a stopped suite can resume."""
    where = OUT / ("quick" if QUICK else f"full-{DEVICE.type}")
    where.mkdir(parents=True, exist_ok=True)
    found = [{**asdict(row), "reached": row.reached} for row in rows]
    (where / f"{group}.json").write_text(json.dumps(found, indent=1) + "\n")


def start() -> None:
    """Threads and warnings, the same in every script."""
    import warnings

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
