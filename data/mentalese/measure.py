"""Fine-tune the tiny reasoner on traces in Mentalese (ORION), then train with SLPO: ``python data/mentalese/measure.py``.

Writes ``results.json``, ``figure.png`` and the tables of ``README.md`` here. Models and measurements are kept in ``runs/mentalese``, so after
a stop the same command goes on; about 6 minutes of CPU time.

Traces are right, with many re-checks. Arms: the whole traces, their Mentalese, and the control: the same traces without some steps, chosen at
random, as long as their Mentalese. SLPO is trained from the model of whole traces and from that of Mentalese.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from toolkit import finetune, report, store
from toolkit import lm as lms
from toolkit.figures.base import error_bars, styled
from toolkit.generate import Sampling, rollouts
from toolkit.grpo import recipes
from toolkit.grpo.run import MODEL, Run, train
from toolkit.grpo.saved import read_back
from toolkit.lm import LM
from toolkit.methods import mentalese
from toolkit.metrics import with_interval
from toolkit.tasks import arithmetic
from toolkit.tasks.generators.traces import Habits
from toolkit.types import Problem

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

STEPS, BATCH, REINFORCED, RATE, SEEDS, POOL, TESTS, SAMPLES, LONGEST = 120, 16, 20, 3e-4, (0, 1, 2), 1500, 100, 2, 120
OPERANDS = (3, 5)
WHOLE, SYMBOLS, CONTROL = "whole traces", "Mentalese", "steps removed at random (control)"
AFTER = ", then SLPO"
ARMS = (WHOLE, SYMBOLS, CONTROL, WHOLE + AFTER, SYMBOLS + AFTER)
COLOURS = dict(zip(ARMS, ("#7f7f7f", "#9ecae1", "#ff7f0e", "#404040", "#1f77b4"), strict=True))
VERBOSE = Habits(default_haste=0, ease_push=0, cue_push=0, mood_push=0, slip_easy=0, slip_hard=0, wait_calm=0.4)
METRICS = {"right": "share", "tokens": "tokens"}
CODE = store.code_of(
    "toolkit.finetune", "toolkit.methods.mentalese", "toolkit.grpo.run", "toolkit.grpo.recipes:slpo", "toolkit.rewards.slpo", "toolkit.generate",
    "toolkit.tasks.arithmetic",
)  # fmt: skip


def problems_of(seed: int) -> list[Problem]:
    """Return the training problems of a seed."""
    return arithmetic.load("train", POOL, seed, operands=OPERANDS)


def traces(seed: int) -> dict[str, list[str]]:
    """Return the traces of each kind for the training problems. A trace ends with a line break, as the model's own."""
    rng = random.Random(f"mentalese-{seed}")
    whole = [arithmetic.write_trace(p, rng, VERBOSE).text for p in problems_of(seed)]
    short = [f"{mentalese.compress(text)}\n" for text in whole]
    thin = [mentalese.thinned(text, len(s), rng) for text, s in zip(whole, short, strict=True)]
    return {WHOLE: whole, SYMBOLS: short, CONTROL: thin}


def taught(lm: LM, arm: str, seed: int, work: Path) -> LM:
    """Return the model of an arm and seed after supervised training."""
    pairs = zip(problems_of(seed), traces(seed)[arm], strict=True)
    data = [finetune.example(lm, p, f"<think>{text}</think>{p.answer}") for p, text in pairs]
    settings = finetune.Settings(steps=STEPS, batch=BATCH, seed=seed)
    return finetune.train(lm, data, settings, work / f"{store.safe_name(arm)}-{seed}", name=arm)


def policy(lm: LM, arm: str, seed: int, work: Path) -> LM:
    """Return the model of an arm and seed, trained if it is not kept."""
    if not arm.endswith(AFTER):
        return taught(lm, arm, seed, work)
    folder = work / f"{store.safe_name(arm)}-{seed}"
    if store.is_whole(folder / MODEL):
        return read_back(lm, folder / MODEL)
    recipe = replace(recipes.slpo().scaled(), problems=8, samples=8, max_tokens=LONGEST, learning_rate=RATE)
    begun = taught(lm, arm.removesuffix(AFTER), seed, work)
    run = Run(folder, REINFORCED, seed, evaluate_every=0, micro_batch=64)
    return train(begun, recipe, problems_of(seed), run, resume=True).lm


def measured(lm: LM, arm: str, seed: int, work: Path) -> dict[str, list[float]]:
    """Return one number per test problem and metric."""
    path = work / f"{store.safe_name(arm)}-{seed}.json"
    if path.is_file():
        return store.read_json(path, dict[str, list[float]])
    tests = arithmetic.load("test", TESTS, operands=OPERANDS)
    sampled = rollouts(policy(lm, arm, seed, work), tests, Sampling(n=SAMPLES, max_new_tokens=LONGEST, seed=seed))
    table = pd.DataFrame({"problem": r.problem_id, "right": r.correct, "tokens": r.think_tokens} for r in sampled)
    means = table.groupby("problem", sort=False).mean()
    found = {name: means[name].astype(float).tolist() for name in METRICS}
    store.write_json(found, path)
    return found


def results(parts: Mapping[str, list[dict[str, list[float]]]]) -> dict[str, Any]:
    """Return accuracy, thinking tokens and compression of each arm, and the differences between arms."""

    def rows(arm: str, metric: str) -> list[list[float]]:
        return [p[metric] for p in parts[arm]]

    arms = {arm: {m: publish.estimate(rows(arm, m), unit=METRICS[m]) for m in METRICS} for arm in parts}
    for arm in arms:
        arms[arm]["compression"] = arms[WHOLE]["tokens"]["mean"] / arms[arm]["tokens"]["mean"]
    compared = [
        (SYMBOLS, WHOLE),
        (SYMBOLS, CONTROL),
        (SYMBOLS + AFTER, SYMBOLS),
        (WHOLE + AFTER, WHOLE),
        (SYMBOLS + AFTER, WHOLE + AFTER),
    ]
    minus = {f"{a} minus {b}": {m: publish.estimate(rows(a, m), rows(b, m), unit=METRICS[m]) for m in METRICS} for a, b in compared}
    data = {arm: float(np.mean([len(text) for seed in SEEDS for text in traces(seed)[arm]])) for arm in (WHOLE, SYMBOLS, CONTROL)}
    return {"arms": arms, "differences": minus, "tokens of the data": data}


def tables(found: Mapping[str, Any]) -> str:
    """Return the results as Markdown tables."""

    def cell(row: Mapping[str, Any], metric: str, sign: str = "") -> str:
        e = row[metric]
        return with_interval(e["mean"], e["low"], e["high"], METRICS[metric], sign=sign)

    data = found["tokens of the data"]
    arms = {
        arm: {
            "right, %": cell(row, "right"), "tokens of thinking": cell(row, "tokens"), "compression": f"{row['compression']:.1f}",
            "tokens of its training traces": f"{data[arm]:.1f}" if arm in data else "",
        }
        for arm, row in found["arms"].items()
    }  # fmt: skip
    minus = {
        name: {"right, points": cell(row, "right", "+"), "tokens": cell(row, "tokens", "+")}
        for name, row in found["differences"].items()
    }
    frames = (pd.DataFrame(arms).T.rename_axis("arm"), pd.DataFrame(minus).T.rename_axis("difference"))
    return "\n\n".join(map(report.markdown, frames))


def figure(found: Mapping[str, Any]) -> go.Figure:
    """Return accuracy against tokens of thinking: one mark per arm."""
    drawn = go.Figure()
    for arm, row in found["arms"].items():
        right = {k: 100 * v for k, v in row["right"].items()}
        bars = {
            axis: error_bars([e["mean"]], [e["low"]], [e["high"]], COLOURS[arm])
            for axis, e in (("error_x", row["tokens"]), ("error_y", right))
        }
        drawn.add_scatter(
            x=[row["tokens"]["mean"]],
            y=[right["mean"]],
            name=arm,
            mode="markers",
            marker={"size": 10, "color": COLOURS[arm]},
            **bars,
        )
    drawn.update_xaxes(title="tokens of thinking", rangemode="tozero").update_yaxes(title="right, %")
    return styled(drawn, "Compression against accuracy")


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    lm = lms.load("tiny-reasoner", device="cpu")
    work = publish.work_folder(__file__, CODE, lm.fingerprint)
    found = results({arm: [measured(lm, arm, seed, work) for seed in SEEDS] for arm in ARMS})
    sizes = {
        "steps": STEPS, "batch": BATCH, "reinforced": REINFORCED, "rate": RATE, "seeds": SEEDS, "pool": POOL, "tests": TESTS,
        "samples": SAMPLES, "operands": OPERANDS,
    }  # fmt: skip
    store.write_json(
        {"made_by": store.made_by(CODE), "sizes": sizes, "fingerprint": lm.fingerprint, **found}, HERE / "results.json"
    )
    publish.draw(figure(found), HERE / "figure.png", 800, 420)
    publish.splice("mentalese", tables(found), HERE / "README.md")


if __name__ == "__main__":
    main()
