"""A board read off its results: intervals and differences, examples, curves, figures; written for machines and for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy import ndarray
from tqdm.auto import tqdm

from toolkit import figures, stats, store
from toolkit.board import statistics
from toolkit.board.ground import Ground
from toolkit.board.measure import Result, result
from toolkit.board.page import page
from toolkit.board.spec import BASE, Spec
from toolkit.metrics import METRICS, Judge, MetricEffect, Outcomes, assumed_aes, cell, described
from toolkit.stats import Effect

LEVELS = ("easy", "medium", "hard")


@dataclass(frozen=True)
class Measured:
    """The results of one condition, one a seed."""

    spec: Spec
    results: tuple[Result, ...]

    @property
    def seeds(self) -> list[int]:
        """Seeds measured."""
        return [int(r.about["seed"]) for r in self.results]


def measured(ground: Ground, specs: Sequence[Spec]) -> dict[str, Measured]:
    """What has been measured so far; conditions without any result are left out.

    Raises:
        FileNotFoundError: base was not measured.
    """
    found: dict[str, Measured] = {}
    for spec in specs:
        seeds = range(ground.sizes.seeds if spec.seeded else 1)
        own = [r for seed in seeds if (r := result(ground, spec, seed)) is not None]
        if own:
            found[spec.name] = Measured(spec, tuple(own))
    if BASE not in found:
        raise FileNotFoundError(f"{ground.out} holds no result of {BASE!r}: measure the board first.")
    return found


class Table:
    """Values of every metric, aligned: ``value(name, metric) -> [seeds, problems]`` problems in the order of their ids, NaN where missing."""

    def __init__(self, found: Mapping[str, Measured]) -> None:
        self.found = found
        base = found[BASE].results[0]
        self.problems = {m: sorted(own["problem_id"]) for m, own in base.points.groupby("metric", sort=False)}
        self.main = sorted(base.rows["problem_id"].unique())
        self._cache: dict[tuple[str, str], ndarray] = {}

    def value(self, name: str, metric: str) -> ndarray:
        """``[seeds, problems]``."""
        key = (name, metric)
        if key not in self._cache:
            rows = []
            for r in self.found[name].results:
                own = r.points[r.points["metric"] == metric].set_index("problem_id")["value"]
                rows.append(own.reindex(self.problems[metric]).to_numpy(float))
            self._cache[key] = np.stack(rows)
        return self._cache[key]

    @cached_property
    def judge(self) -> Judge:
        """Compares by what is computed from the main rollouts and is no mean of one value per problem."""
        # The board shows the share that never closed instead of the share that did.
        names = [m for m, about in METRICS.items() if about.how and m not in self.problems and m != "closed"]
        return Judge.against(self.outcomes(BASE)[0], names)

    @cached_property
    def base(self) -> dict[str, MetricEffect]:
        """Every metric of base."""
        return _unbounded(self, BASE)

    def change(self, metric: str, name: str, other: str = BASE) -> Effect:
        """Return the difference of two conditions in one metric, paired by problem.

        Args:
            other: What ``name`` is compared with. If it has several seeds, ``name`` needs as many or one.
        """
        seeded = any(self.found[n].spec.varies for n in (name, other))
        if metric in self.problems:
            return stats.mean_effect(self.value(name, metric), self.value(other, metric), seeded=seeded)
        judge = Judge.against(self.outcomes(other)[0], [metric])
        return judge.effects(self.outcomes(name), seeded=seeded)[metric].change

    def outcomes(self, name: str) -> list[Outcomes]:
        """The main rollouts of each seed."""
        return [Outcomes.from_rows(r.rows, self.main) for r in self.found[name].results]


def estimates(table: Table, name: str) -> tuple[dict[str, Effect], dict[str, Effect]]:
    """Every metric of a condition, and its paired difference to base."""
    judged = {m: e.within_bounds(m, table.base[m].estimate) for m, e in _unbounded(table, name).items()}
    return {m: e.estimate for m, e in judged.items()}, {m: e.change for m, e in judged.items()}


def _unbounded(table: Table, name: str) -> dict[str, MetricEffect]:
    seeded, judged = table.found[name].spec.varies, dict[str, MetricEffect]()
    for metric in table.problems:
        values, base = table.value(name, metric), table.value(BASE, metric)[:1]
        if not np.isnan(values).all():
            own, change = (stats.mean_effect(values, minus, seeded=seeded) for minus in (None, base))
            judged[metric] = MetricEffect(own, change)
    return judged | table.judge.effects(table.outcomes(name), seeded=seeded)


def levels(rows: pd.DataFrame) -> pd.Series:
    """Easy, medium or hard: thirds of each task's range of difficulty, by problem."""
    each = rows.groupby("problem_id", sort=False)[["task", "difficulty"]].first()

    def third(own: pd.Series) -> pd.Series:
        low, high = own.min(), own.max()
        place = (own - low) / max(high - low, 1)
        return pd.Series(np.select([place < 1 / 3, place < 2 / 3], LEVELS[:2], LEVELS[2]), own.index)

    return each.groupby("task", group_keys=False)["difficulty"].apply(third)


def cells(table: Table, name: str) -> dict[str, dict[str, Any]]:
    """Accuracy and think tokens by task and level of difficulty, with intervals: task -> level -> metric."""
    base = table.found[BASE].results[0].rows
    task = base.groupby("problem_id", sort=False)["task"].first().reindex(table.main).to_numpy(str)
    level = levels(base).reindex(table.main).to_numpy(str)
    found: dict[str, dict[str, Any]] = {}
    seeded = table.found[name].spec.varies
    for t in ("all", *dict.fromkeys(task)):
        for d in ("all", *LEVELS):
            chosen = ((task == t) | (t == "all")) & ((level == d) | (d == "all"))
            if not chosen.any():
                continue
            values = {m: _aligned(table, name, m)[:, chosen] for m in statistics.HEADLINE}
            shown = {m: _interval(stats.mean_effect(own, seeded=seeded).within(described(m).bounds)) for m, own in values.items()}
            found.setdefault(t, {})[d] = {"n": int(chosen.sum()), **shown}
    return found


def _aligned(table: Table, name: str, metric: str) -> ndarray:
    place = {p: i for i, p in enumerate(table.problems[metric])}
    return table.value(name, metric)[:, [place[p] for p in table.main]]


def _interval(e: Effect) -> dict[str, float | str | None]:
    found: dict[str, float | str | None] = {
        k: None if v != v else float(f"{v:.6g}") for k, v in asdict(e).items() if k not in ("p", "note")
    }
    return found | {"note": e.note} if e.note else found


def board(ground: Ground, specs: Sequence[Spec], title: str) -> dict[str, Any]:
    """The board of everything measured so far as one JSON-serialisable mapping: see ``page.py`` for its parts."""
    found = measured(ground, specs)
    table = Table(found)
    own, paired = {}, {}
    for name in tqdm(found, desc="statistics", unit="condition", leave=False):
        own[name], paired[name] = estimates(table, name)
    paired.pop(BASE)
    corrected = statistics.holm_corrected(paired)
    both = {m: {name: _aligned(table, name, m) for name in found} for m in statistics.HEADLINE}
    front = statistics.on_front(both["accuracy"], both["think_tokens"])
    conditions = {name: _about(ground, table, name, own[name]) | {"front": front[name]} for name in found}
    differences = {
        name: {m: {**_interval(e), "p": _number(e.p), "p_holm": _number(corrected[name].get(m))} for m, e in effects.items()}
        for name, effects in paired.items()
    }
    present = {m for effects in own.values() for m in effects}
    first = found[BASE].results[0].rows
    return {
        "title": title,
        "base": BASE,
        "conditions": conditions,
        "paired": differences,
        "metrics": {m: described(m).about for m in [*METRICS, *sorted(present - {*METRICS})] if m in present},
        "tasks": ["all", *dict.fromkeys(first["task"])],
        "difficulties": ["all", *LEVELS],
        "examples": examples(ground, found),
        "curves": curves(ground, found),
        "provenance": {
            **asdict(ground.lm.provenance(0)),
            "made_by": made_by(found),
            "sizes": asdict(ground.sizes),
            "problems": len(table.main),
        },
    }


def made_by(found: Mapping[str, Measured]) -> str:
    """The toolkit and the code that the results were made by, as one hash over that of each."""
    return store.made_by(store.key(sorted({str(r.about["made_by"]) for m in found.values() for r in m.results})))


def _number(value: float | None) -> float | None:
    return None if value is None or value != value else float(f"{value:.4g}")


def _about(ground: Ground, table: Table, name: str, own: Mapping[str, Effect]) -> dict[str, Any]:
    found = table.found[name]
    spec, notes = found.spec, [r.about for r in found.results]
    costs = {
        k: [note[k] for note in notes if note[k] is not None] for k in ("tokens", "seconds", "parameters_changed", "training_steps")
    }
    cost = {k: float(np.mean(values)) for k, values in costs.items() if values}
    shifts = [note["shift"] for note in notes if note["shift"]]
    return {
        "family": spec.family,
        "note": "; ".join(
            [spec.note, *notes[0]["model"].split("; ")[1:]]
        ),  # after the model's name: what rounding left of its change
        "paper": spec.paper,
        "seeds": found.seeds,
        "fingerprints": [note["fingerprint"] for note in notes],
        "interventions": notes[0]["interventions"],
        "metrics": {m: _interval(e) for m, e in own.items()},
        "cells": cells(table, name),
        "cost": cost,
        "shift": {k: float(np.mean([s[k] for s in shifts])) for k in shifts[0]} if shifts else {},
    }


def examples(ground: Ground, found: Mapping[str, Measured], count: int = 12) -> list[dict[str, Any]]:
    """The first response of every condition (first seed) to a few problems of every task and level."""
    rows = found[BASE].results[0].rows
    grouped = levels(rows).to_frame("level").join(rows.groupby("problem_id", sort=False)[["task", "difficulty"]].first())
    each = max(1, count // max(1, grouped.groupby(["task", "level"]).ngroups))
    chosen = grouped.groupby(["task", "level"], sort=False).head(each).index[:count]
    by_id = {p.id: p for p in ground.problems}
    said = {name: m.results[0].rows.query("sample == 0").set_index("problem_id") for name, m in found.items()}
    return [
        {
            "id": i,
            "task": str(grouped.loc[i, "task"]),
            "difficulty": str(grouped.loc[i, "level"]),
            "prompt": str(by_id[i].messages[-1]["content"]),
            "answer": by_id[i].answer,
            "responses": {
                name: {
                    "text": own.loc[i, "text"],
                    "correct": bool(own.loc[i, "correct"]),
                    "think_tokens": int(own.loc[i, "think_tokens"]),
                }
                for name, own in said.items()
            },
        }
        for i in chosen
    ]


def curves(ground: Ground, found: Mapping[str, Measured]) -> dict[str, list[dict[str, Any]]]:
    """Held-out accuracy and think tokens while training, a line a seed, of every condition that was trained alone."""
    from toolkit.grpo.log import LOG, read  # transformers' trainer, which loads peft

    logs = {}
    for name, m in found.items():
        how = getattr(m.spec.make, "keywords", {})
        if m.spec.family != "trained" or "recipe" not in how:
            continue
        lines = []
        for seed in m.seeds:
            folder = ground.folder_of(how["recipe"], seed, how["reward"])
            if not (folder / LOG).exists():
                continue
            rows = [row for row in read(folder / LOG) if row.get("held_out/accuracy") is not None]
            columns = {"step": "step", "accuracy": "held_out/accuracy", "think_tokens": "held_out/think_tokens"}
            lines.append({"seed": seed} | {name: [row[column] for row in rows] for name, column in columns.items()})
        logs[name] = lines
    return logs


def write(ground: Ground, specs: Sequence[Spec], title: str, directory: str | Path) -> dict[str, Any]:
    """Write ``board.json``, ``table.parquet`` (one row a condition and metric) and ``report.html``; returns the board."""
    found, out = board(ground, specs, title), store.writable(directory)
    found |= {"figures": sections(found), "methods": methods()}
    store.write_json(found, out / "board.json")
    store.save_table(flat(found), out / "table.parquet")
    page(found, out / "report.html")
    return found


DAMAGE = (
    "accuracy", "accuracy_arithmetic", "accuracy_lookup", "shortest_20", "never_closed", "looping", "no_think", "failed_steps",
    "accuracy_running_sum", "running_sum_step", "retrieved", "pass_at_4x", "vote_at_4x",
)  # fmt: skip


def sections(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Further figures of the page: title, how to read it, figure."""
    shown = (
        ("What it gains and what it breaks", "Differences to base; no policy was trained on lookup.", figures.metric_differences(found, DAMAGE)),
        ("Do trained policies move along the direction that the edit removes?", "Every condition reads the same base responses; how the mean "
         "state at the end of the stream moves, where lines of thinking begin. Grey: what differences between random classes of responses reach.", figures.state_shifts(found)),
        ("Short-thinking heads", "On the same texts: a trained policy that thinks longer without these heads found another way.", figures.head_change(found)),
        ("Chains of additions", "Below the line: worse than its own step accuracy explains. Above: re-checks mend steps.", figures.chain_accuracy(found)),
    )  # fmt: skip
    return [{"title": title, "text": text, "figure": figure.to_plotly_json()} for title, text, figure in shown]


def flat(found: Mapping[str, Any]) -> pd.DataFrame:
    """One row a condition and metric: ``condition, family, metric, mean, low, high, difference, difference_low, difference_high, p, p_holm``,
    and ``note`` (``"2 seeds"``: not judged; ``"no variance"``: no interval)."""
    rows = []
    for name, about in found["conditions"].items():
        for metric, e in about["metrics"].items():
            d = found["paired"].get(name, {}).get(metric, {})
            row = [name, about["family"], metric, e["mean"], e["low"], e["high"]]
            rows.append([*row, *(d.get(k) for k in ("mean", "low", "high", "p", "p_holm")), d.get("note", e.get("note", ""))])
    columns = [
        "condition",
        "family",
        "metric",
        "mean",
        "low",
        "high",
        "difference",
        "difference_low",
        "difference_high",
        "p",
        "p_holm",
        "note",
    ]
    return pd.DataFrame(rows, columns=columns)


def shown(found: Mapping[str, Any], metrics: Sequence[str]) -> pd.DataFrame:
    """The board as text cells, for a terminal or the README: the mean, and in brackets the paired difference with its 95 % interval; a
    star where it is significant after Holm's correction. Of fewer than three seeds nothing is: the bracket says how many. Shares in percent."""
    rows = {}
    for name, about in found["conditions"].items():
        row = {}
        for metric in (m for m in metrics if m in found["metrics"]):
            e, d = about["metrics"].get(metric), found["paired"].get(name, {}).get(metric)
            row[found["metrics"][metric]["label"]] = _cell(metric, e, d) if e else ""
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("condition")


def _cell(metric: str, e: Mapping[str, Any], d: Mapping[str, Any] | None) -> str:
    if e["mean"] is None:
        return ""
    if d is None:  # base: the mean alone
        return cell(metric, {**e, "low": e["mean"], "high": e["mean"]})
    return cell(metric, e, d, star=d["p_holm"] is not None and d["p_holm"] < 0.05, note=d.get("note", ""))


def methods() -> list[dict[str, str]]:
    """How to read the board, in words."""
    a, b, c = assumed_aes
    return [
        {
            "title": "Statistics",
            "text": "Every condition answers the same problems with the same random numbers. Intervals are 95 %, over problems (bootstrap) and, "
            "for what is random or trained, over seeds; differences to base are paired by problem. A difference is marked where its p-value, "
            "Holm-corrected over all conditions (accuracy and think tokens together, any other metric by itself), is below .05. What is random "
            "or trained is judged from three seeds on: below that the interval says how many seeds it is of, and nothing is marked. Where nothing "
            "varies (no variance) there is no interval.",
        },
        {
            "title": "Accuracy-efficiency score",
            "text": f"{a:g} x relative shortening + {b:g} x relative gain of accuracy, or - {c:g} x relative loss. The constants differ between "
            "papers; these are stated, not standard.",
        },
        {
            "title": "Controls",
            "text": "Random heads of the same layers, random directions that the same heads can write, random vectors of equal norm, random heads "
            "masked: what any change of that size does.",
        },
    ]
