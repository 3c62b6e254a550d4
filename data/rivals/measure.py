"""Compare training-free rivals with steering and with the edit on the tiny reasoner: ``python data/rivals/measure.py``.

Writes ``results.json``, ``figure.png`` and the tables of ``README.md`` here. Measurements are kept in ``runs/rivals``, so after a stop the same
command goes on; about 5 minutes of CPU time.

Each method has four values of its one main knob, tried on problems of the dev split. The rule, stated before any measurement: the shortest
thinking whose accuracy on dev is at most 2 points below base; if there is none, the most accurate. Only that value is then judged, once, on the
test split, beside three draws of its random control. Tokens of forced answers count as thinking.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from toolkit import lm as lms
from toolkit import report, store
from toolkit.baselines import Budget
from toolkit.board import rivals, spec
from toolkit.board.ground import Ground, Sizes
from toolkit.board.spec import Spec
from toolkit.exits import EarlyExit
from toolkit.figures.base import COLOURS, CONTROL, error_bars, styled
from toolkit.figures.labels import placed
from toolkit.generate import Sampling, rollouts
from toolkit.lm import Condition
from toolkit.methods.code_stop import CodeStop, probe_tokens
from toolkit.metrics import with_interval
from toolkit.tasks import arithmetic

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

DEV, TESTS, SAMPLES, LONGEST, DRAWS, LOSS = 48, 100, 2, 100, (0, 1, 2), 0.02
SIZES = Sizes(main=(("arithmetic", TESTS),), extraction=(100, 4), max_new_tokens=LONGEST)
BASE = "base"
METRICS = {"right": "share", "tokens": "tokens"}
CODE = store.code_of("toolkit.board.rivals", "toolkit.board.spec", "toolkit.generate")


def thresholds(low: float) -> CodeStop:
    """Return CoDE-Stop with a first threshold. The last one is half as far from 1, as published."""
    return replace(rivals.ANSWERS, low=low, high=(1 + low) / 2)


class Method(NamedTuple):
    """A method with four values of its knob.

    Attributes:
        knob: Name of the knob.
        values: Its four values.
        make: Function ``(value, seed) -> Spec``; the seed is ``None`` for the method, else that of a draw of its control.
    """

    knob: str
    values: tuple[float, ...]
    make: Callable[[Any, int | None], Spec]


METHODS: Mapping[str, Method] = {
    "steering (ours)": Method("strength", (-0.125, -0.25, -0.5, -1.0), lambda v, s: spec.steered("x", v, during="think", control=s is not None)),
    "edit (ours)": Method("strength", (-1.0, -0.5, 0.5, 1.0), lambda v, s: spec.edited("x", v, control="" if s is None else "heads")),
    "stable direction": Method("strength", (-0.05, -0.1, -0.2, -0.4), lambda v, s: rivals.stable("x", v, control=s is not None)),
    "manifold": Method("share removed", (0.25, 0.5, 1.0, 2.0), lambda v, s: rivals.projected("x", v, control=s is not None)),
    "CREST": Method("heads", (1, 2, 4, 8), lambda v, s: rivals.rotated("x", v, control=s is not None)),
    "ReBalance": Method("scale", (0.5, 1.0, 2.0, 4.0), lambda v, s: rivals.confident("x", v, control=s is not None)),
    "CoDE-Stop": Method("first threshold", (0.95, 0.99, 0.999, 0.9999), lambda v, s: rivals.answered("x", thresholds(v), control=s is not None)),
    "exit probe": Method("threshold", (0.3, 0.5, 0.7, 0.9), lambda v, s: rivals.probed("x", v, control=s is not None)),
    "NoWait": Method("from think token", (0, 10, 20, 40), lambda v, s: rivals.suppressed("x", first=v, others=() if s is None else rivals.STARTS)),
    "budget": Method("tokens", (16, 24, 36, 48), lambda v, s: spec.with_rule("x", Budget(v, before="\n")) if s is None else rivals.closed("x", v)),
}  # fmt: skip


def measured(ground: Ground, condition: Callable[[], Condition], name: str, split: str, work: Path) -> dict[str, list[float]]:
    """Return one number per problem and metric. ``condition`` is called only if they are not kept."""
    path = work / split / f"{store.safe_name(name)}.json"
    if path.is_file():
        return store.read_json(path, dict[str, list[float]])
    lm, made = ground.lm, condition()
    problems = arithmetic.load(split, DEV if split == "dev" else TESTS)
    sampled = rollouts(made, problems, Sampling(SAMPLES, max_new_tokens=LONGEST), progress=f"{split}: {name}")
    asked = [rule for rule in made.rules if isinstance(rule, EarlyExit) and isinstance(rule.check, CodeStop)]
    rows = [
        {"problem": r.problem_id, "right": r.correct, "tokens": r.think_tokens + sum(probe_tokens(lm, rule, r) for rule in asked)}
        for r in sampled
    ]
    means = pd.DataFrame(rows).groupby("problem", sort=False).mean()
    found = {metric: means[metric].astype(float).tolist() for metric in METRICS}
    store.write_json(found, path)
    return found


def chosen(tries: Mapping[float, Mapping[str, Sequence[float]]], base: Mapping[str, Sequence[float]]) -> float:
    """Return the value that the rule of the module's docstring chooses."""
    means = {value: {m: float(np.mean(each[m])) for m in METRICS} for value, each in tries.items()}
    good = [v for v, m in means.items() if m["right"] >= float(np.mean(base["right"])) - LOSS - 1e-9]
    if good:
        return min(good, key=lambda v: (means[v]["tokens"], -means[v]["right"]))
    return max(means, key=lambda v: (means[v]["right"], -means[v]["tokens"]))


def results(ground: Ground, work: Path) -> dict[str, Any]:
    """Return the choice of each method on dev, and its judgement on test."""

    def run(name: str, split: str, make: Callable[[], Condition]) -> dict[str, list[float]]:
        return measured(ground, make, name, split, work)

    base = {split: run(BASE, split, lambda: Condition(ground.lm)) for split in ("dev", "test")}
    found: dict[str, Any] = {BASE: {m: publish.estimate([base["test"][m]], unit=u) for m, u in METRICS.items()}}
    dev = {}
    for name, method in METHODS.items():
        tries = {
            v: run(f"{name} {v}", "dev", lambda method=method, v=v: method.make(v, None).make(ground, 0)) for v in method.values
        }
        value = chosen(tries, base["dev"])
        test = run(f"{name} {value}", "test", lambda method=method, value=value: method.make(value, None).make(ground, 0))
        controls = [
            run(f"{name} {value} control {seed}", "test", lambda method=method, value=value, seed=seed: method.make(value, seed).make(ground, seed))
            for seed in DRAWS
        ]  # fmt: skip
        dev[name] = {str(v): {m: float(np.mean(each[m])) for m in METRICS} for v, each in tries.items()}
        entry: dict[str, Any] = {"knob": method.knob, "value": value}
        for m, unit in METRICS.items():
            mine, others = [test[m]], [each[m] for each in controls]
            change = np.array(test[m]) - np.array(base["test"][m])
            entry[m] = {
                "mean": publish.estimate(mine, unit=unit),
                "control": publish.estimate(others, unit=unit),
                "minus base": publish.estimate(mine, [base["test"][m]], unit=unit),
                "minus control": publish.estimate(mine * len(others), others, unit=unit),
                # 80 % power at a two-sided level of 5 %, for the difference from base
                "detectable": float(2.8 * change.std(ddof=1) / math.sqrt(len(change))),
            }
        found[name] = entry
    means = {m: float(np.mean(base["dev"][m])) for m in METRICS}
    return {"base": found.pop(BASE), "methods": found, "dev": {BASE: {"": means}, **dev}}


def tables(found: Mapping[str, Any]) -> str:
    """Return the results as Markdown tables."""

    def cell(e: Mapping[str, float], metric: str, sign: str = "") -> str:
        return with_interval(e["mean"], e["low"], e["high"], METRICS[metric], sign=sign)

    rows = {
        BASE: {"value": "", "right, %": cell(found["base"]["right"], "right"), "tokens": cell(found["base"]["tokens"], "tokens")}
    }
    for name, e in found["methods"].items():
        rows[name] = {
            "value": f"{e['knob']} {e['value']:g}",
            "right, %": cell(e["right"]["mean"], "right"),
            "tokens": cell(e["tokens"]["mean"], "tokens"),
            "right, minus base": cell(e["right"]["minus base"], "right", "+"),
            "tokens, minus base": cell(e["tokens"]["minus base"], "tokens", "+"),
            "right, minus control": cell(e["right"]["minus control"], "right", "+"),
            "tokens, minus control": cell(e["tokens"]["minus control"], "tokens", "+"),
            "detectable, points": f"{100 * e['right']['detectable']:.1f}",
        }
    dev = {
        name: {f"try {i + 1}": f"{value + ': ' if value else ''}{100 * m['right']:.0f} %, {m['tokens']:.1f}" for i, (value, m) in enumerate(tries.items())}
        for name, tries in found["dev"].items()
    }  # fmt: skip
    frames = (pd.DataFrame.from_dict(rows, orient="index").fillna(""), pd.DataFrame.from_dict(dev, orient="index").fillna(""))
    names = ("on test", "on dev: value: right, tokens")
    return "\n\n".join(report.markdown(frame.rename_axis(name)) for frame, name in zip(frames, names, strict=True))


def figure(found: Mapping[str, Any]) -> go.Figure:
    """Return accuracy against tokens: the methods in colour, base and the controls grey."""
    drawn, points, names = go.Figure(), [], []
    for name, e in found["methods"].items():
        colour = COLOURS[1] if "(ours)" in name else COLOURS[0]
        for tone, part, label in ((colour, "mean", name), (CONTROL, "control", "")):
            x, y = e["tokens"][part], {k: 100 * v for k, v in e["right"][part].items()}
            bars = {
                axis: error_bars([v["mean"]], [v["low"]], [v["high"]], tone, opacity=0.2)
                for axis, v in (("error_x", x), ("error_y", y))
            }
            drawn.add_scatter(
                x=[x["mean"]], y=[y["mean"]], mode="markers", marker={"color": tone, "size": 9 if label else 6}, showlegend=False, **bars
            )  # fmt: skip
            points.append((x["mean"], y["mean"]))
            names.append(label)
    base = found["base"]
    points.append((base["tokens"]["mean"], 100 * base["right"]["mean"]))
    names.append(BASE)
    drawn.add_scatter(x=[points[-1][0]], y=[points[-1][1]], mode="markers", marker={"color": CONTROL, "size": 11, "symbol": "diamond"}, showlegend=False)  # fmt: skip
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*points, strict=True))
    x_range, y_range = (left - 3, right + 3), (low - 10, high + 10)
    drawn.update_layout(annotations=placed(points, names, x_range, y_range))
    drawn.update_xaxes(title="think tokens, with forced answers", range=x_range).update_yaxes(title="right, %", range=y_range)
    return styled(drawn, "Training-free methods on the tiny reasoner (grey: base and random controls)")


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    lm = lms.load("tiny-reasoner", device="cpu")
    work = publish.work_folder(__file__, CODE, lm.fingerprint)
    found = results(Ground(lm, SIZES, work / "ground"), work)
    sizes = {
        "dev": DEV,
        "tests": TESTS,
        "samples": SAMPLES,
        "longest": LONGEST,
        "draws": DRAWS,
        "loss": LOSS,
        "extraction": SIZES.extraction,
    }
    store.write_json(
        {"made_by": store.made_by(CODE), "sizes": sizes, "fingerprint": lm.fingerprint, **found}, HERE / "results.json"
    )
    publish.draw(figure(found), HERE / "figure.png", 800, 480)
    publish.splice("rivals", tables(found), HERE / "README.md")


if __name__ == "__main__":
    main()
