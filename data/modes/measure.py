"""Train the two modes of Adaptive Deep Reasoning on the tiny reasoner, then reward the choice: ``python data/modes/measure.py``.

Writes ``results.json``, ``figure.png`` and the tables of ``README.md`` here. Models and measurements are kept in ``runs/modes``, so after a
stop the same command goes on; about 5 minutes of CPU time.

Supervised training teaches both modes, with and without a request. Then a short GRPO run uses the group reward and the mode-switching loss.
The control is trained on the same responses with requests dealt out at random. Two more runs start from its model, so that the reward cannot
compare the modes. Each model then answers without a request: how often does it think long, by number of operands?
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
from toolkit.grpo.draws import Modes
from toolkit.grpo.losses import ModeSwitch
from toolkit.grpo.run import MODEL, Run, train
from toolkit.grpo.saved import read_back
from toolkit.lm import LM
from toolkit.methods import adaptive_deep_reasoning as adr
from toolkit.metrics import with_interval
from toolkit.tasks import arithmetic
from toolkit.tasks.generators.traces import Habits
from toolkit.types import Problem

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

STEPS, BATCH, REINFORCED, RATE, SEEDS, POOL, TESTS, SAMPLES, LONGEST = 120, 16, 30, 3e-4, (0, 1, 2), 600, 40, 2, 100
OPERANDS = (2, 3, 4, 5)
UNITS = {"long": "share", "right": "share", "tokens": "tokens"}  # measure -> its unit
REQUESTS: Mapping[adr.Mode, str] = {"long": " long", "short": " short"}
MODES, REWARDED, CONTROL, CONTROL_REWARDED = "modes", "modes, then reward", "shuffled requests", "shuffled requests, then reward"
ARMS = (MODES, REWARDED, CONTROL, CONTROL_REWARDED)
COLOURS = dict(zip(ARMS, ("#9ecae1", "#1f77b4", "#fdbe85", "#ff7f0e"), strict=True))
STEPWISE = Habits(
    default_haste=0, ease_push=0, cue_push=0, mood_push=0, slip_easy=0, slip_hard=0, wait_calm=0.1
)  # right, step by step
CODE = store.code_of(
    "toolkit.finetune", "toolkit.methods.adaptive_deep_reasoning", "toolkit.grpo.run", "toolkit.grpo.recipes:adaptive_deep_reasoning",
    "toolkit.rewards.adaptive_deep_reasoning", "toolkit.generate", "toolkit.tasks.arithmetic",
)  # fmt: skip


def pairs(seed: int) -> list[adr.Pair]:
    """Return training problems with a right response in each mode."""
    rng = random.Random(f"modes-{seed}")
    problems = arithmetic.load("train", POOL, seed, operands=(OPERANDS[0], OPERANDS[-1]))
    return [adr.pair(p, arithmetic.write_trace(p, rng, STEPWISE).text, p.answer) for p in problems]


def taught(lm: LM, arm: str, seed: int, work: Path) -> LM:
    """Return the model of an arm and seed after supervised training."""
    data = pairs(seed)
    data = adr.exchanged(data, seed) if arm == CONTROL else data
    settings = finetune.Settings(steps=STEPS, batch=BATCH, seed=seed)
    return finetune.train(lm, adr.examples(lm, data, REQUESTS), settings, work / f"{store.safe_name(arm)}-{seed}", name=arm)


def policy(lm: LM, arm: str, seed: int, work: Path) -> LM:
    """Return the model of an arm and seed, trained if it is not kept."""
    if arm in (MODES, CONTROL):
        return taught(lm, arm, seed, work)
    folder = work / f"{store.safe_name(arm)}-{seed}"
    if store.is_whole(folder / MODEL):
        return read_back(lm, folder / MODEL)
    begun = taught(lm, MODES if arm == REWARDED else CONTROL, seed, work)
    recipe = recipes.adaptive_deep_reasoning(ModeSwitch(long="<think>", short="</think>"))
    sized = replace(
        recipe.scaled(), modes=Modes(**REQUESTS), problems=8, samples=8, max_tokens=LONGEST, learning_rate=RATE
    )  # fmt: skip
    problems = arithmetic.load("train", POOL, seed, operands=(OPERANDS[0], OPERANDS[-1]))
    return train(begun, sized, problems, Run(folder, REINFORCED, seed, evaluate_every=0, micro_batch=64), resume=True).lm


def measured(lm: LM, arm: str, seed: int, work: Path) -> dict[str, Any]:
    """Return, per kind of request and number of operands, one number per test problem and metric."""
    path = work / f"{store.safe_name(arm)}-{seed}.json"
    if path.is_file():
        return store.read_json(path, dict[str, Any])
    model = policy(lm, arm, seed, work)
    sampling = Sampling(n=SAMPLES, max_new_tokens=LONGEST, seed=seed)
    tests = {str(n): arithmetic.load("test", TESTS, operands=(n, n)) for n in OPERANDS}
    found: dict[str, Any] = {}
    for asked in ("", "long", "short"):
        rows: dict[str, Any] = {}
        for n, problems in tests.items():
            rows[n] = _means(model, [adr.request(p, REQUESTS[asked]) if asked else p for p in problems], sampling)
        found[asked or "free"] = rows
    store.write_json(found, path)
    return found


def _means(model: LM, problems: list[Problem], sampling: Sampling) -> dict[str, list[float]]:
    table = pd.DataFrame(
        {
            "problem": r.problem_id,
            "long": adr.mode_of(r.text) == "long",
            "right": r.correct,
            "tokens": r.response_tokens,
        }
        for r in rollouts(model, problems, sampling)
    )
    means = table.groupby("problem", sort=False).mean()
    return {name: means[name].astype(float).tolist() for name in ("long", "right", "tokens")}


def results(parts: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return shares of the long mode, accuracy and tokens, and the differences that the claims are about."""

    def rows(arm: str, asked: str, metric: str, numbers: tuple[int, ...] = OPERANDS) -> np.ndarray:
        return np.array([[v for n in numbers for v in p[asked][str(n)][metric]] for p in parts[arm]], float)

    easy, hard = OPERANDS[:1], OPERANDS[-1:]
    found: dict[str, Any] = {"free": {}, "long by operands": {}, "requested": {}, "rise": {}, "differences": {}}
    for arm in parts:
        found["free"][arm] = {m: publish.estimate(rows(arm, "free", m), unit=UNITS[m]) for m in UNITS}
        found["long by operands"][arm] = {str(n): publish.estimate(rows(arm, "free", "long", (n,))) for n in OPERANDS}
        found["requested"][arm] = {
            f"{m}, {asked} requested": publish.estimate(rows(arm, asked, m)) for asked in REQUESTS for m in ("long", "right")
        }
        found["rise"][arm] = publish.estimate(rows(arm, "free", "long", hard), rows(arm, "free", "long", easy))
    for name, (a, b) in {
        "obeys: long requested minus short requested": (("modes", "long"), ("modes", "short")),
        "the same, shuffled requests": ((CONTROL, "long"), (CONTROL, "short")),
    }.items():
        found["differences"][name] = {"long": publish.estimate(rows(*a, "long"), rows(*b, "long"))}
    for a, b in ((REWARDED, MODES), (REWARDED, CONTROL_REWARDED)):
        found["differences"][f"{a} minus {b}"] = {
            m: publish.estimate(rows(a, "free", m), rows(b, "free", m), unit=UNITS[m]) for m in UNITS
        }
    return found


UNITS = {"long": "share", "right": "share", "tokens": "tokens"}


def tables(found: Mapping[str, Any]) -> str:
    """Return the results as Markdown tables."""

    def cell(e: Mapping[str, float], unit: str, sign: str = "") -> str:
        return with_interval(e["mean"], e["low"], e["high"], unit, sign=sign)

    heads = {"long": "thinks long, %", "right": "right, %", "tokens": "tokens"}
    free = {arm: {heads[m]: cell(e, UNITS[m]) for m, e in row.items()} for arm, row in found["free"].items()}
    for arm, row in found["long by operands"].items():
        free[arm] |= {f"long, {n} operands, %": cell(e, "share") for n, e in row.items()}
        free[arm]["rise, points"] = cell(found["rise"][arm], "share", "+")
    asked = {arm: {f"{name}, %": cell(e, "share") for name, e in row.items()} for arm, row in found["requested"].items()}
    minus = {name: {heads[m]: cell(e, UNITS[m], "+") for m, e in row.items()} for name, row in found["differences"].items()}
    frames = (
        pd.DataFrame(free).T.rename_axis("without a request"),
        pd.DataFrame(asked).T.rename_axis("with a request"),
        pd.DataFrame(minus).T.fillna("").rename_axis("difference"),
    )
    return "\n\n".join(map(report.markdown, frames))


def figure(found: Mapping[str, Any]) -> go.Figure:
    """Return the share of long thinking against the number of operands."""
    drawn = go.Figure()
    for arm, rows in found["long by operands"].items():
        means, lows, highs = ([100 * e[k] for e in rows.values()] for k in ("mean", "low", "high"))
        drawn.add_scatter(
            x=[int(n) for n in rows], y=means, name=arm, mode="lines+markers", line={"color": COLOURS[arm]},
            error_y=error_bars(means, lows, highs, COLOURS[arm]),
        )  # fmt: skip
    drawn.update_xaxes(title="operands", tickvals=list(OPERANDS)).update_yaxes(title="thinks long, %", range=[0, 105])
    return styled(drawn, "Choice of the long mode by difficulty, without a request")


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
    publish.splice("modes", tables(found), HERE / "README.md")


if __name__ == "__main__":
    main()
