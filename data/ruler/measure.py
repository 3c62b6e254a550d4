"""Fine-tune the tiny reasoner with Ruler's meta length tokens, and measure how well lengths match: ``python data/ruler/measure.py``.

Writes ``results.json``, ``figure.png`` and the tables of ``README.md`` here. Models and measurements are kept in ``runs/ruler``, so after a
stop the same command goes on; about 4 minutes of CPU time.

Problems have 5 or 6 operands. Their responses are written by rule, right, and of many lengths, since re-checks lengthen and skipped steps
shorten them. Lengths are in words, as the paper counts them; targets and ranges are ours, since the paper's begin where these responses
end. Arms: the model before training (it gets no request), Ruler, and the same data with shuffled tokens. Responses are greedy.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from toolkit import finetune, report, stats, store
from toolkit import lm as lms
from toolkit.figures.base import error_bars, styled
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM
from toolkit.methods import ruler
from toolkit.metrics import with_interval
from toolkit.tasks import arithmetic
from toolkit.tasks.generators.traces import Habits
from toolkit.types import Problem, Rollout

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

STEPS, BATCH, SEEDS, POOL, PER_TARGET, TESTS, OPERANDS, LONGEST = 120, 16, (0, 1, 2), 3000, 300, 50, (5, 6), 200
PRECISE: stats.Ranges = {6: (4, 8), 12: (10, 14), 18: (16, 20), 24: (22, 26), 28: (28, math.inf)}
FLEXIBLE: stats.Ranges = {6: (3, 9), 12: (9, 15), 18: (15, 21), 24: (21, 27), 28: (28, math.inf)}
LEVELS = {"level 0": (6, 12), "level 1": (18, 24), "level 2": (28,)}
BEFORE, RULER, CONTROL = "before training", "Ruler", "shuffled tokens (control)"
COLOURS = {BEFORE: "#7f7f7f", RULER: "#1f77b4", CONTROL: "#ff7f0e"}
CODE = store.code_of("toolkit.finetune", "toolkit.methods.ruler", "toolkit.generate", "toolkit.tasks.arithmetic")


def words(lm: LM, ids: list[int]) -> int:
    """Return the number of words of a response, without tags and length tokens."""
    return stats.words(lm.text(ids, special=False))


def responses(n: int, split: str, seed: int) -> list[tuple[Problem, str]]:
    """Return problems with right responses of many lengths."""
    rng = random.Random(f"ruler-{seed}")
    pairs = []
    for p in arithmetic.load(split, n, seed, operands=OPERANDS):
        habits = Habits(
            default_haste=rng.choice((0, 0.1, 0.3)), wait_calm=rng.choice((0, 0.3, 0.6, 0.9)),
            ease_push=0, cue_push=0, mood_push=0, slip_easy=0, slip_hard=0, max_waits=6,
        )  # fmt: skip
        trace = arithmetic.write_trace(p, rng, habits)
        pairs.append((p, f"<think>{trace.text}</think>{trace.conclusion}"))
    return pairs


def trained(lm: LM, arm: str, seed: int, work: Path) -> LM:
    """Return the model of an arm and seed, trained if it is not kept."""
    grown = ruler.with_tokens(lm, PRECISE)

    def length(text: str) -> int:
        return words(lm, lm.tokenizer(text, add_special_tokens=False)["input_ids"])

    data = ruler.examples(grown, responses(POOL, "train", seed), PRECISE, length=length, most=PER_TARGET)
    data = ruler.shuffled(data, seed) if arm == CONTROL else data
    settings = finetune.Settings(steps=STEPS, batch=BATCH, seed=seed)
    return finetune.train(grown, data, settings, work / f"{store.safe_name(arm)}-{seed}", name=f"{arm} {seed}")


def measured(lm: LM, arm: str, seed: int, work: Path) -> dict[str, Any]:
    """Return lengths and grades of an arm: per target one number per test problem, and the same without a request."""
    path = work / f"{store.safe_name(arm)}-{seed}.json"
    if path.is_file():
        return store.read_json(path, dict[str, Any])
    model = lm if arm == BEFORE else trained(lm, arm, seed, work)
    tests = arithmetic.load("test", TESTS, operands=OPERANDS)
    sampling = Sampling(temperature=0, max_new_tokens=LONGEST)

    def lengths(sampled: list[Rollout]) -> list[int]:
        return [words(model, list(r.token_ids[r.prompt_len :])) for r in sampled]

    free = rollouts(model, tests, sampling)
    found: dict[str, Any] = {"lengths": {}, "right": {}}
    for target in PRECISE:
        sampled = free if arm == BEFORE else rollouts(model, [ruler.requested(p, target, PRECISE) for p in tests], sampling)
        found["lengths"][str(target)], found["right"][str(target)] = lengths(sampled), [float(r.correct) for r in sampled]
    found["own"] = [ruler.written(r.text, PRECISE)[0] for r in free]
    found["free"], found["free_right"] = lengths(free), [float(r.correct) for r in free]
    store.write_json(found, path)
    return found


def hits(part: Mapping[str, Any], ranges: stats.Ranges) -> np.ndarray:
    """Return for each test problem the share of targets that its responses match."""
    return np.mean([stats.hits(n, [float(t)] * len(n), ranges) for t, n in part["lengths"].items()], axis=0)


def results(parts: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return scores per level, match rates with intervals, and the lengths of each arm."""
    found: dict[str, Any] = {"levels": {}, "lengths": {}, "own": {}, "right": {}, "match": {}, "differences": {}}
    rates = {m: {a: [hits(p, r) for p in ps] for a, ps in parts.items()} for m, r in (("PM", PRECISE), ("FM", FLEXIBLE))}
    for arm, ps in parts.items():
        pairs = [(n, int(t)) for p in ps for t, numbers in p["lengths"].items() for n in numbers]
        scores = stats.length_match(*zip(*pairs, strict=True), precise=PRECISE, flexible=FLEXIBLE, levels=LEVELS)
        found["levels"][arm] = {
            name: {k: None if math.isnan(v) else v for k, v in asdict(scores[name]).items()} for name in (*LEVELS, "all")
        }
        found["lengths"][arm] = {t: publish.estimate([p["lengths"][t] for p in ps], unit="tokens") for t in ps[0]["lengths"]}
        found["right"][arm] = publish.estimate([np.mean(list(p["right"].values()), axis=0) for p in ps])
        found["match"][arm] = {m: publish.estimate(rates[m][arm]) for m in rates}
        own = [(n, t) for p in ps for n, t in zip(p["free"], p["own"], strict=True) if t is not None]
        near = [bool(stats.hits([n], [t], FLEXIBLE)[0]) for n, t in own]
        found["own"][arm] = {"written": len(own) / sum(len(p["own"]) for p in ps), "FM": float(np.mean(near)) if near else None}
    for other in (BEFORE, CONTROL):
        base = {m: rates[m][other] for m in rates}
        found["differences"][other] = {m: publish.estimate(rates[m][RULER], base[m]) for m in rates}
    return found


def tables(found: Mapping[str, Any]) -> str:
    """Return the results as Markdown tables."""

    def cell(e: Mapping[str, float], sign: str = "") -> str:
        return with_interval(e["mean"], e["low"], e["high"], "share", sign=sign)

    levels = pd.DataFrame(
        {
            arm: {name: f"{s['precise']:.0f} / {s['flexible']:.0f}" for name, s in scores.items()}
            for arm, scores in found["levels"].items()
        }
    )
    own = found["own"]
    rows = {
        arm: {
            "PM, %": cell(e["PM"]), "FM, %": cell(e["FM"]), "right, %": cell(found["right"][arm]),
            "writes a token of its own, %": f"{100 * own[arm]['written']:.0f}",
            "FM of its own token, %": "" if own[arm]["FM"] is None else f"{100 * own[arm]['FM']:.0f}",
        }
        for arm, e in found["match"].items()
    }  # fmt: skip
    minus = {f"Ruler minus {arm}": {f"{m}, points": cell(e, "+") for m, e in d.items()} for arm, d in found["differences"].items()}
    frames = (
        levels.rename_axis("PM / FM, %"),
        pd.DataFrame(rows).T.rename_axis("arm"),
        pd.DataFrame(minus).T.rename_axis("difference"),
    )
    return "\n\n".join(map(report.markdown, frames))


def figure(found: Mapping[str, Any]) -> go.Figure:
    """Return the length of responses against the requested length, with the wide ranges."""
    drawn = go.Figure()
    for t, (low, high) in FLEXIBLE.items():
        top = min(high, 36)
        drawn.add_shape(type="rect", x0=t - 1, x1=t + 1, y0=low, y1=top, fillcolor="#dddddd", line_width=0, layer="below")
    for arm, rows in found["lengths"].items():
        means, lows, highs = ([e[k] for e in rows.values()] for k in ("mean", "low", "high"))
        drawn.add_scatter(
            x=[int(t) for t in rows], y=means, name=arm, mode="lines+markers", line={"color": COLOURS[arm]},
            error_y=error_bars(means, lows, highs, COLOURS[arm]),
        )  # fmt: skip
    drawn.update_xaxes(title="requested words (28: more than 28)", tickvals=list(FLEXIBLE)).update_yaxes(title="words")
    return styled(drawn, "Length against requested length; grey: flexible match")


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    lm = lms.load("tiny-reasoner", device="cpu")
    work = publish.work_folder(__file__, CODE, lm.fingerprint)
    arms = {BEFORE: (0,), RULER: SEEDS, CONTROL: SEEDS}
    parts = {arm: [measured(lm, arm, seed, work) for seed in seeds] for arm, seeds in arms.items()}
    found = results(parts)
    sizes = {
        "steps": STEPS, "batch": BATCH, "seeds": SEEDS, "pool": POOL, "per_target": PER_TARGET, "tests": TESTS, "operands": OPERANDS,
    }  # fmt: skip
    store.write_json(
        {"made_by": store.made_by(CODE), "sizes": sizes, "fingerprint": lm.fingerprint, **found}, HERE / "results.json"
    )
    publish.draw(figure(found), HERE / "figure.png", 800, 420)
    publish.splice("ruler", tables(found), HERE / "README.md")


if __name__ == "__main__":
    main()
