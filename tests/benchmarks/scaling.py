"""Scale: 1x, 4x, 16x the work in time and memory; two processes give the numbers of one."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from clock import OUT, QUICK, Row, apart, median, start, turns, write
from models import by_parity, tiny, traces

from toolkit import collect, generate, store, tasks
from toolkit.generate import Sampling

SAMPLING = Sampling(n=4, max_new_tokens=200)
UNIT = 8 if QUICK else 32


def shard(index: int, of: int) -> None:
    """One process's share: moments and rollouts, left in files."""
    lm = tiny()
    store.save(collect.moments(lm, traces(lm, 4 * UNIT)[index::of], by_parity), OUT / f"shard{index}of{of}.safetensors")
    found = generate.rollouts(lm, tasks.load("arithmetic", "train", UNIT)[index::of], SAMPLING, progress=False)
    ids = {f"{r.problem_id}/{r.sample}": r.token_ids for r in found}
    print(json.dumps(ids))


def processes() -> list[Row]:
    with ThreadPoolExecutor() as pool:
        whole = apart("scaling.py", "shard", "0", "1")
        parts = list(pool.map(lambda i: apart("scaling.py", "shard", str(i), "2"), range(2)))
    from toolkit.types import Moments

    one = store.load(OUT / "shard0of1.safetensors", Moments)
    two = store.load(OUT / "shard0of2.safetensors", Moments) + store.load(OUT / "shard1of2.safetensors", Moments)
    far = max(((one.sums[k] - two.sums[k]).abs().max() / one.sums[k].abs().max()).item() for k in one.sums)
    together = {**parts[0], **parts[1]}
    same = sum(together[key] == ids for key, ids in whole.items()) / len(whole)
    return [
        Row(
            "scale: two processes over one, sums of moments: largest relative difference",
            far,
            None,
            "<= 1e-6",
            "",
            "rounding of fp64 sums of fp32 means",
        ),
        Row(
            "scale: two processes over one, share of equal rollouts",
            same,
            None,
            ">= 1",
            "",
            "random streams are keyed by problem and sample",
        ),
    ]


def main() -> None:
    start()
    lm = tiny()
    sizes = (1, 4) if QUICK else (1, 4, 16)
    problems = tasks.load("arithmetic", "train", UNIT * sizes[-1])
    found, rows = traces(lm, UNIT * sizes[-1]), []
    for name, run in {
        "collect": lambda n: collect.moments(lm, found[:n], by_parity),
        "rollouts": lambda n: generate.rollouts(lm, problems[:n], SAMPLING, progress=False),
    }.items():
        seconds = turns({str(size): partial(run, UNIT * size) for size in sizes}, 3)
        base = median(seconds["1"])
        for size in sizes[1:]:
            each = sorted(s / size / base for s in seconds[str(size)])
            rows.append(Row(f"scale, {name}: time for {size}x the work over {size} times the time for 1x", median(each), (each[0], each[-1]), "<= 1.1", "",
                            "work per token; larger batches share the cost of a step"))  # fmt: skip
        if QUICK:
            continue
        peaks = [apart("memory.py", name, str(UNIT * size))["peak"] for size in (sizes[0], sizes[-1])]
        rows.append(Row(f"scale, {name}: peak memory for {sizes[-1]}x the work over 1x", peaks[1] / peaks[0], None, "<= 1.1", "",
                        "one batch and the returned values", f"{peaks[0]:.0f} and {peaks[1]:.0f} MB"))  # fmt: skip
    write("scale", rows + processes())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        torch.set_num_threads(1)
        shard(int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
