"""Search hypotheses level by level and otherwise, after MOOSE-Chem2, at equal cost: ``python data/hypotheses/measure.py``.

Needs ``make smol``. Writes ``results.json``, ``figure.png`` and the tables in ``README.md`` here. Values that SmolLM2 gives are kept in
``runs/hypotheses``, so after a stop the same command goes on. About 4 minutes on one core.

*Simulated judge.* Generated spaces of five levels with six choices each, whose optimum is known. The judge compares values with noise, in
units of the standard deviation over all complete hypotheses of the space. The gain is 0 for the mean hypothesis and 1 for the best. The control are spaces in reverse order, where
the general levels matter least. Differences are paired over the spaces, with 95 % intervals.

*SmolLM2 as judge.* The landscape is the mean log-probability of a sentence with four choices among four each; all 256 sentences are scored, so
the optimum is known. An incomplete hypothesis is the beginning of the sentence. Intervals are over random searches on this one landscape, so
they say nothing about other landscapes.
"""

from __future__ import annotations

import random
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch

from toolkit import lm as lms
from toolkit import stats, store
from toolkit.figures.base import error_bars, styled
from toolkit.methods import moose_chem2 as moose

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

CODE = store.code_of("toolkit.methods.moose_chem2", "toolkit.collect", "toolkit.stats.estimates")
SPACES, CALLS, NOISES, ENSEMBLES, RUNS, LM_CALLS = 60, (30, 60, 120), (0.0, 1.0, 2.0), (1, 3, 5), 100, (16, 32, 64)
SEARCHES = {"hierarchical": moose.hierarchical_search, "flat": moose.flat_search, "random": moose.random_search}
DECAYS = {"general choices matter more": moose.assumed_decay, "reversed (control)": 1 / moose.assumed_decay}
PROMPT = "A plan to make the battery last longer:"
PARTS = (
    (" change the electrode,", " change the electrolyte,", " change the housing,", " change the charger,"),
    (" by adding carbon", " by adding salt", " by adding silicon", " by adding glass"),
    (" in thin layers", " in small grains", " in long fibres", " in a foam"),
    (", and heat it slowly.", ", and cool it quickly.", ", and press it hard.", ", and stir it well."),
)


def estimate(values: np.ndarray) -> dict[str, float]:
    e = stats.over_problems(values, list(map(str, range(len(values)))))
    return {"mean": e.mean, "low": e.low, "high": e.high}


@cache
def made(seed: int, decay: float) -> tuple[moose.Space, float]:
    """Return a space, and the standard deviation of the values of its complete hypotheses."""
    space = moose.generated(seed, decay=decay)
    return space, float(np.std([space.value(h) for h in product(range(space.options), repeat=space.levels)]))


def gains(search: str, decay: float, noise: float, calls: int, ensemble: int = 1) -> np.ndarray:
    """Return the gain of a search in each space."""
    found = []
    for seed in range(SPACES):
        (space, spread), rng = made(seed, decay), random.Random(seed)
        judge = moose.Counted(moose.noisy_judge(space, noise * spread, random.Random(seed + 10_000)), calls, ensemble)
        found.append(space.gain(SEARCHES[search](judge, space.levels, space.options, rng)))
    return np.array(found)


def simulated() -> dict[str, Any]:
    """Return gains and paired differences on generated spaces."""
    rows, differences, ensembles = [], [], []
    for name, decay in DECAYS.items():
        for noise in NOISES:
            for calls in CALLS:
                by = {s: gains(s, decay, noise, calls) for s in SEARCHES}
                rows += [{"spaces": name, "noise": noise, "calls": calls, "search": s, **estimate(v)} for s, v in by.items()]
                differences.append({"spaces": name, "noise": noise, "calls": calls, **estimate(by["hierarchical"] - by["flat"])})
    one = {noise: gains("hierarchical", moose.assumed_decay, noise, CALLS[-1]) for noise in NOISES}
    for noise in NOISES:
        for e in ENSEMBLES[1:]:
            more = gains("hierarchical", moose.assumed_decay, noise, CALLS[-1], e)
            ensembles.append({"noise": noise, "ensemble": e, "calls": CALLS[-1], **estimate(more - one[noise])})
    return {"gains": rows, "hierarchical minus flat": differences, "ensemble minus one judge": ensembles}


def text_of(h: moose.Hypothesis) -> str:
    return "".join(part[c] for part, c in zip(PARTS, h, strict=False))


def of_smollm2() -> dict[str, Any]:
    """Return gains on the landscape of SmolLM2's own preference."""
    lm = lms.load(lms.smollm2_path(), device="cpu", tags=lms.ThinkTags(None, None))
    path = publish.work_folder(__file__, CODE, lm.fingerprint) / "values.json"
    levels, options = len(PARTS), len(PARTS[0])
    every = [h for k in range(1, levels + 1) for h in product(range(options), repeat=k)]
    if not path.is_file():
        value = moose.likelihood_judge(lm, PROMPT, text_of)
        with torch.inference_mode():
            store.write_json({",".join(map(str, h)): value(h) for h in every}, path)
    kept = store.read_json(path, dict[str, float], remedy="Remove it: the sentences are then scored again.")
    values = {h: kept[",".join(map(str, h))] for h in every}
    whole = [h for h in every if len(h) == levels]
    mean, best = float(np.mean([values[h] for h in whole])), max(whole, key=lambda h: values[h])
    rows = []
    for calls in LM_CALLS:
        for name, search in SEARCHES.items():
            found = []
            for seed in range(RUNS):
                judge = moose.Counted(lambda a, b: values[a] > values[b], calls)
                h = search(judge, levels, options, random.Random(seed))
                found.append((values[h] - mean) / (values[best] - mean))
            rows.append({"calls": calls, "search": name, **estimate(np.array(found))})
    smooth = [
        {
            "level": k,
            "correlation": float(
                np.corrcoef(
                    [values[h] for h in every if len(h) == k],
                    [np.mean([values[w] for w in whole if w[:k] == h]) for h in every if len(h) == k],
                )[0, 1]
            ),
        }
        for k in range(1, levels)
    ]
    return {"gains": rows, "beginning and mean of completions": smooth, "best": text_of(best), "fingerprint": lm.fingerprint}


def cell(e: dict[str, float], sign: str = "") -> str:
    return f"{e['mean']:{sign}.2f} [{e['low']:{sign}.2f}, {e['high']:{sign}.2f}]"


def tables(found: dict[str, Any]) -> str:
    """Return the results as Markdown tables."""
    sim, real = found["simulated"], found["SmolLM2"]
    lines = ["| spaces | noise | calls | hierarchical | flat | random | hierarchical minus flat |", "| --- " * 7 + "|"]
    for d in sim["hierarchical minus flat"]:
        key = {k: d[k] for k in ("spaces", "noise", "calls")}
        by = {r["search"]: cell(r) for r in sim["gains"] if key.items() <= r.items()}
        lines.append(f"| {d['spaces']} | {d['noise']:g} | {d['calls']} | {' | '.join(by[s] for s in SEARCHES)} | {cell(d, '+')} |")
    lines += ["", "| ensemble minus one judge, equal calls | noise | gain |", "| --- | --- | --- |"]
    lines += [f"| {r['ensemble']} judges | {r['noise']:g} | {cell(r, '+')} |" for r in sim["ensemble minus one judge"]]
    lines += ["", "| SmolLM2's preference: calls | hierarchical | flat | random |", "| --- | --- | --- | --- |"]
    for calls in LM_CALLS:
        by = {r["search"]: cell(r) for r in real["gains"] if r["calls"] == calls}
        lines.append(f"| {calls} | {' | '.join(by[s] for s in SEARCHES)} |")
    shares = ", ".join(f"{r['correlation']:.2f} (level {r['level']})" for r in real["beginning and mean of completions"])
    return "\n".join([*lines, "", f"Correlation of the value of a beginning with the mean of its completions: {shares}."])


def figure(found: dict[str, Any]) -> go.Figure:
    """Return gain against noise, at the middle budget, where general choices matter more."""
    drawn = go.Figure()
    for name in SEARCHES:
        rows = [
            r
            for r in found["simulated"]["gains"]
            if r["search"] == name and r["calls"] == CALLS[1] and r["spaces"] == next(iter(DECAYS))
        ]
        drawn.add_scatter(
            x=[r["noise"] for r in rows],
            y=[r["mean"] for r in rows],
            error_y=error_bars([r["mean"] for r in rows], [r["low"] for r in rows], [r["high"] for r in rows]),
            name=name,
        )
    drawn.update_layout(
        xaxis_title="noise of the judge, in standard deviations of the values", yaxis_title=f"gain with {CALLS[1]} calls"
    )
    return styled(drawn, "Searches at equal cost: gain against the noise of the judge")


def main() -> None:
    torch.set_num_threads(1)
    kept = publish.work_folder(__file__, CODE) / "simulated.json"
    if not kept.is_file():
        store.write_json(simulated(), kept)
    found = {"simulated": store.read_json(kept), "SmolLM2": of_smollm2()}
    settings = {"spaces": SPACES, "calls": CALLS, "noises": NOISES, "ensembles": ENSEMBLES, "runs": RUNS, "lm_calls": LM_CALLS}
    store.write_json({"made_by": store.made_by(CODE), "settings": settings, **found}, HERE / "results.json")
    publish.draw(figure(found), HERE / "figure.png", 700, 400)
    publish.splice("hypotheses", tables(found), HERE / "README.md")


if __name__ == "__main__":
    main()
