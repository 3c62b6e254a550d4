"""Measure the toolkit on a GPU: ``python tests/gpu/run.py OUT [--stage right|fast|train] [--small] [--limit-seconds N]``.

Each stage runs in a process of its own. ``OUT/report.md`` is the table to read; ``report.json`` and ``rows.jsonl`` hold the same. They are
written after every check, so that nothing is lost if the machine is taken away. ``README.md`` beside this file says how to run it on a
borrowed machine. Without a GPU every stage runs on the CPU, at toy size with ``--small``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# The toolkit need not be installed. ``benchmarks`` holds the rivals, ``tests`` the model families.
sys.path[:0] = [str(ROOT), str(HERE.parent), str(HERE.parent / "benchmarks"), str(HERE)]

import ledger  # noqa: E402
from aims import STAGES  # noqa: E402

GRACE = 15  # seconds after its limit at which a stage that does not answer is killed


def here(out: Path, stage: str, *, small: bool, limit: float) -> None:
    """Run one stage in this process."""
    import torch

    os.environ["BENCH_DEVICE"] = "cuda" if torch.cuda.is_available() else "cpu"
    if small:
        os.environ["BENCH_QUICK"] = "1"
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(1)  # the CPU's share is small models, which more threads slow down
    book = ledger.Ledger(out, stage, small=small, limit=limit)
    module = importlib.import_module(f"stage_{stage}")
    book.run(module.CHECKS, module.setting(small=small, out=out, ends=book.ends))


def apart(out: Path, stage: str, *, small: bool, limit: float) -> None:
    """Run one stage in a process of its own, and write down what it did not measure if it crashes or hangs."""
    command = [sys.executable, str(HERE / "run.py"), str(out), "--stage", stage, "--limit-seconds", str(limit), "--here"]
    # Without these, downloads are tried and threads fight over the cores. The allocator stays as it is: recorded steps rely on it.
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", **os.environ}
    began = time.monotonic()
    with subprocess.Popen(command + ["--small"] * small, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, said = process.communicate(timeout=limit + GRACE)
            why = f"the stage's process ended with status {process.returncode}:\n{said[-3000:]}"
        except subprocess.TimeoutExpired:
            process.kill()
            _, said = process.communicate()
            why = f"the stage's process was killed {GRACE} s after its limit of {limit:g} s:\n{said[-3000:]}"
    ledger.missing_rows(out, stage, why)
    rows = [row for row in ledger.read_rows(out)[1] if row["stage"] == stage]
    told = ", ".join(f"{sum(r['verdict'] == v for r in rows)} {v}" for v in dict.fromkeys(r["verdict"] for r in rows))
    print(f"{stage}: {time.monotonic() - began:.0f} s; {told}", flush=True)
    for row in rows:
        if row["verdict"] == "missed":
            print(f"  missed: {row['row']}: {row['value']:.4g} (reach {row['reach']}) {row['note']}")
    for why in dict.fromkeys(row["why"] for row in rows if row["verdict"] == "failed"):
        print(f"  failed: {', '.join(dict.fromkeys(r['check'] for r in rows if r.get('why') == why))}: ...{why.strip()[-400:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of the report")
    parser.add_argument("--stage", choices=STAGES, help="run only this stage (default: all)")
    parser.add_argument("--small", action="store_true", help="toy sizes: a rehearsal, of a minute on a CPU")
    limits = ", ".join(f"{name} {seconds}" for name, seconds in STAGES.items())
    parser.add_argument(
        "--limit-seconds",
        type=float,
        help=f"seconds that each stage may take, and what the stages before it leave (default: {limits})",
    )
    parser.add_argument("--keep", action="store_true", help="copy the report to tests/gpu; only of a full run on a GPU")
    parser.add_argument("--here", action="store_true", help="run the stage in this process, without a guard against crashes")
    asked = parser.parse_args()
    if asked.keep and (asked.small or not ledger.on_card()):
        parser.error("--keep is for full runs on a GPU: a rehearsal must not replace what was measured")
    asked.out.mkdir(parents=True, exist_ok=True)
    left = 0.0  # seconds that the stages before did not need
    for stage in [asked.stage] if asked.stage else STAGES:
        limit, began = (asked.limit_seconds or STAGES[stage]) + left, time.monotonic()
        (here if asked.here else apart)(asked.out, stage, small=asked.small, limit=limit)
        left = max(0.0, limit - (time.monotonic() - began))
    for name in (ledger.REPORT, ledger.PAGE) if asked.keep else ():
        shutil.copyfile(asked.out / name, HERE / name)


if __name__ == "__main__":
    main()
