"""Import: what the toolkit adds to ``import torch, transformers``."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

from clock import QUICK, WARM_UPS, Row, median, write

BASE = "import torch, transformers"
CASES = {
    "import toolkit": "import toolkit",
    "import lm, generate, collect, edits": "from toolkit import lm, generate, collect, edits",
    "import what a notebook uses": "from toolkit import baselines, collect, directions, edits, evaluate, figures, generate, lm, tasks",
}


def cpu(code: str) -> float:
    """Processor seconds of an interpreter that runs ``code``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"}, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def slowest(code: str, base: str) -> str:
    """The packages that the code imports and the base does not, by time."""

    def imported(what: str) -> dict[str, int]:
        done = subprocess.run([sys.executable, "-X", "importtime", "-c", what], capture_output=True, text=True, check=True)
        found: dict[str, int] = {}
        for line in done.stderr.splitlines():
            if line.startswith("import time:") and "|" in line and "self" not in line:
                own, _, name = line.removeprefix("import time:").split("|")
                top = name.strip().split(".")[0]
                found[top] = found.get(top, 0) + int(own)
        return found

    more = imported(f"{base}\n{code}")
    less = imported(base)
    added = sorted(((took - less.get(name, 0), name) for name, took in more.items()), reverse=True)[:4]
    return ", ".join(f"{name} {took / 1e6:.2f} s" for took, name in added if took > 20_000) or "nothing above 20 ms"


def main() -> None:
    rows, repeats = [], 3 if QUICK else 7
    cases = dict(list(CASES.items())[: 1 if QUICK else None])
    seconds: dict[str, list[float]] = {name: [] for name in ("base", *cases)}
    for turn in range(WARM_UPS + repeats):
        for name in seconds:
            took = cpu(BASE if name == "base" else f"{BASE}\n{cases[name]}")
            if turn >= WARM_UPS:
                seconds[name].append(took)
    for name, code in cases.items():
        each = sorted(a - b for a, b in zip(seconds[name], seconds["base"], strict=True))
        rows.append(Row(f"import: seconds that '{name}' adds to torch and transformers", median(each), (each[0], each[-1]),
                        "<= 0.3" if code == "import toolkit" else None, "", f"other imports: {slowest(code, BASE)}", f"base {median(seconds['base']):.2f} s"))  # fmt: skip
    write("import", rows)


if __name__ == "__main__":
    main()
