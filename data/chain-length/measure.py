"""Train the tiny reasoner on chains of thought of several lengths, after "When more is less": ``python data/chain-length/measure.py``.

Writes ``results.json``, the tables in ``README.md`` and ``figure.png`` (accuracy by difficulty) here. Models and answers are kept in
``runs/chain-length``, so after a stop the same command goes on. About 15 minutes on one core.

The task is to add digits modulo 10 (``toolkit/tasks/generators/chunked.py``); the difficulty is the number of additions. A line of the chain
of thought has a certain number of additions, its *size*. Every arm trains all weights of the tiny reasoner for the same number of steps on the
same problems; seeds differ in the order of the problems. (Small models with random weights learnt to copy the digits, but not to add them, in
1,500 steps.) Arms differ in the size:

- *size 1*, *size 2*, *size 3*: the same for all problems;
- *mixed*: drawn anew for each problem;
- *optimal*: for each difficulty, the size whose model has the highest accuracy on dev problems (mean over seeds);
- *shuffled* (control): the optimal sizes, assigned to the difficulties in another order.

If one size is optimal for every difficulty, the optimal arm equals that of this size, and there is no control to shuffle. Answers are greedy.
Intervals of 95 % are over problems and seeds, and paired by problem.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.colors import qualitative

from toolkit import finetune, report, store
from toolkit import lm as lms
from toolkit.figures.base import error_bars, styled
from toolkit.generate import Sampling, rollouts
from toolkit.metrics import with_interval
from toolkit.tasks import splits
from toolkit.tasks.generators import chunked
from toolkit.types import Problem

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

CODE = store.code_of("toolkit.finetune", "toolkit.generate", "toolkit.tasks.generators.chunked")
SIZES, DIFFICULTIES, SEEDS = (1, 2, 3), (3, 6, 9, 12), (0, 1, 2)
POOL, STEPS, BATCH, RATE, TESTED, LONGEST = 6000, 150, 16, 1e-3, 100, 120
OPTIMAL, SHUFFLED = "optimal", "optimal sizes, shuffled (control)"

SizeOf = Callable[[int, random.Random], int]
"""Function from a difficulty and a source of random numbers to the size of the lines."""


def pool(split: str, n: int, difficulty: int | None = None) -> list[Problem]:
    """Return n different problems of a split, of one difficulty or (``None``) of all."""
    rng = random.Random(f"chain-length-{split}-{difficulty}")
    return splits.distinct(lambda: chunked.problem(rng, split, difficulty or rng.choice(DIFFICULTIES)), n)


def accuracies(arm: str, size_of: SizeOf, seed: int, work: Path) -> dict[str, dict[str, list[float]]]:
    """Return correctness (0 or 1) on each dev and test problem by difficulty, after training on chains with the sizes of an arm."""
    name = f"{store.safe_name(arm)}-{seed}"
    path = work / f"{name}.json"
    if path.is_file():
        return store.read_json(path, dict[str, dict[str, list[float]]])
    lm, rng = lms.load(lms.TINY_REASONER, device="cpu"), random.Random(f"{arm}-{seed}")
    end = lm.tokenizer.convert_ids_to_tokens(min(lm.eos_ids))
    examples = [
        finetune.Example(
            problem=p.id,
            prompt=lm.prompt_ids(p.messages),
            response=lm.tokenizer.encode(chunked.response(p, size_of(p.meta["difficulty"], rng)) + end),
        )
        for p in pool("train", POOL)
    ]
    settings = finetune.Settings(steps=STEPS, batch=BATCH, rate=RATE, seed=seed)
    trained = finetune.train(lm, examples, settings, work / name, name=f"{arm}, seed {seed}")
    found = {
        split: {
            str(t): [float(r.correct) for r in rollouts(trained, pool(split, TESTED, t), Sampling(n=1, temperature=0.0, max_new_tokens=LONGEST), progress=False)]
            for t in DIFFICULTIES
        }
        for split in ("dev", "test")
    }  # fmt: skip
    store.write_json(found, path)
    return found


def fixed(size: int) -> SizeOf:
    return lambda difficulty, rng: size


def mixed(difficulty: int, rng: random.Random) -> int:
    return rng.choice(SIZES)


def by_difficulty(sizes: dict[int, int]) -> SizeOf:
    return lambda difficulty, rng: sizes[difficulty]


def results(parts: dict[str, list[Any]], base: str) -> dict[str, Any]:
    """Return accuracies on test problems by arm and difficulty, and the differences of the base arm minus each other arm."""

    def values(arm: str, t: int | None) -> np.ndarray:
        return np.array([np.concatenate([part["test"][str(d)] for d in DIFFICULTIES if t in (None, d)]) for part in parts[arm]])

    columns = {"all": None} | {str(t): t for t in DIFFICULTIES}
    return {
        "accuracy": {arm: {c: publish.estimate(values(arm, t)) for c, t in columns.items()} for arm in parts},
        "differences": {
            f"{base} minus {arm}": {c: publish.estimate(values(base, t), values(arm, t)) for c, t in columns.items()}
            for arm in parts
            if arm != base
        },
    }


def page(found: dict[str, Any]) -> str:
    """Return the tables of the README."""

    def table(rows: dict[str, Any], sign: str) -> pd.DataFrame:
        cells = {arm: {c: with_interval(e["mean"], e["low"], e["high"], "share", sign=sign) for c, e in row.items()} for arm, row in rows.items()}  # fmt: skip
        return pd.DataFrame(cells).T

    best = ", ".join(f"{size} at difficulty {t}" for t, size in found["optimal sizes"].items())
    arms = report.markdown(table(found["accuracy"], "").rename_axis("accuracy, % by difficulty"))
    picture = "![Accuracy by difficulty and size of the steps](figure.png)"
    return f"{picture}\n\nOptimal sizes on dev problems: {best}.\n\n{arms}\n\n{report.markdown(table(found['differences'], '+').rename_axis('difference, points'))}"


def figure(found: dict[str, Any]) -> go.Figure:
    """Return accuracy against difficulty, one line per arm."""
    drawn = go.Figure()
    dashes = itertools.cycle(("solid", "dash"))  # lines that coincide are both seen
    for (arm, row), colour, dash in zip(found["accuracy"].items(), qualitative.D3, dashes, strict=False):  # more colours than arms
        points = [row[str(t)] for t in DIFFICULTIES]
        bars = error_bars([p["mean"] for p in points], [p["low"] for p in points], [p["high"] for p in points], colour)
        drawn.add_scatter(
            x=list(DIFFICULTIES),
            y=[p["mean"] for p in points],
            error_y=bars,
            name=arm,
            mode="lines+markers",
            line={"color": colour, "dash": "dot" if "control" in arm else dash},
        )
    drawn.update_xaxes(title="additions per problem").update_yaxes(title="accuracy", range=[0, 1.02])
    return styled(drawn, "Accuracy by difficulty and size of the steps")


def main() -> None:
    torch.set_num_threads(1)
    work = publish.work_folder(__file__, CODE, lms.load(lms.TINY_REASONER, device="cpu").fingerprint)
    arms: dict[str, SizeOf] = {f"size {size}": fixed(size) for size in SIZES} | {"mixed": mixed}
    parts = {arm: [accuracies(arm, size_of, seed, work) for seed in SEEDS] for arm, size_of in arms.items()}
    dev = {(t, s): np.mean([part["dev"][str(t)] for part in parts[f"size {s}"]]) for t in DIFFICULTIES for s in SIZES}
    best = {t: max(SIZES, key=lambda s: dev[t, s]) for t in DIFFICULTIES}
    base = f"size {best[DIFFICULTIES[0]]}"
    if len(set(best.values())) > 1:
        base = OPTIMAL
        moved = list(best.values())[1:] + list(best.values())[:1]
        more = {OPTIMAL: by_difficulty(best), SHUFFLED: by_difficulty(dict(zip(best, moved, strict=True)))}
        parts |= {arm: [accuracies(arm, size_of, seed, work) for seed in SEEDS] for arm, size_of in more.items()}
    settings = {"sizes": SIZES, "difficulties": DIFFICULTIES, "seeds": SEEDS, "pool": POOL, "steps": STEPS, "batch": BATCH, "rate": RATE,
                "tested": TESTED, "model": lms.TINY_REASONER}  # fmt: skip
    found = {"optimal sizes": {str(t): s for t, s in best.items()}, **results(parts, base)}
    store.write_json({"made_by": store.made_by(CODE), "settings": settings, **found}, HERE / "results.json")
    publish.splice("chain-length", page(found), HERE / "README.md")
    publish.draw(figure(found), HERE / "figure.png", 800, 420)


if __name__ == "__main__":
    main()
