"""Compute a board from the saved results: estimates with intervals, differences from base, examples, learning curves, figures.

The board is one mapping that JSON can store. ``write`` saves it as JSON, as a table and as a web page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy import ndarray

from toolkit import figures, stats, store
from toolkit.board import statistics
from toolkit.board.ground import Ground, Sizes
from toolkit.board.measure import Result, read_result
from toolkit.board.page import write_page
from toolkit.board.spec import BASE, Spec
from toolkit.difficulty import LEVELS, levels_of
from toolkit.metrics import METRICS, Judge, MetricEffect, Outcomes, assumed_aes, cell, described
from toolkit.progress import stage
from toolkit.stats import Effect
from toolkit.tags import ThinkTags


@dataclass(frozen=True)
class ConditionResults:
    """All saved results of one condition.

    Attributes:
        spec: The condition.
        results: One result per seed that was measured, without those of the same condition (see ``distinct``).
    """

    spec: Spec
    results: tuple[Result, ...]

    @property
    def seeds(self) -> list[int]:
        """Seeds that were measured."""
        return [int(r.about["seed"]) for r in self.results]


def condition_results(ground: Ground, specs: Sequence[Spec]) -> dict[str, ConditionResults]:
    """Return a dict from the name of a condition to its results saved so far. Conditions without a result are left out.

    Raises:
        FileNotFoundError: base was not measured yet.
    """
    by_name: dict[str, ConditionResults] = {}
    for spec in specs:
        seeds = range(ground.sizes.seeds if spec.seeded else 1)
        results = distinct([r for seed in seeds if (r := read_result(ground, spec, seed)) is not None])
        if results:
            by_name[spec.name] = ConditionResults(spec, tuple(results))
    if BASE not in by_name:
        raise FileNotFoundError(f"{ground.out} holds no result of {BASE!r}: measure the board first.")
    return by_name


def distinct(results: Sequence[Result]) -> list[Result]:
    """Return the results without those whose seed made the same condition as an earlier seed: same weights, same interventions.

    Few random controls exist if, for example, half of a layer's heads are masked. To count one of them several times would make the spread
    over seeds look too small.
    """
    made = {(r.about["fingerprint"], *r.about["interventions"]): r for r in reversed(results)}
    return sorted(made.values(), key=lambda r: r.about["seed"])


class AlignedResults:
    """Results of all conditions with their problems in the same order, for paired comparisons.

    Attributes:
        by_name: Name of the condition -> its results. Base must be one of the conditions.
        problems: Metric -> sorted ids of the problems for which base has a value of this metric. Only metrics that are means over problems
            are keys. Other metrics, such as quantiles of length, are computed from outcomes (``metrics.Judge``).
        main: Sorted ids of the board's test problems, without those of the unseen tasks.
    """

    def __init__(self, by_name: Mapping[str, ConditionResults]) -> None:
        self.by_name = by_name
        base = by_name[BASE].results[0]
        self.problems = {m: sorted(part["problem_id"]) for m, part in base.points.groupby("metric", sort=False)}
        self.main = sorted(base.rows["problem_id"].unique())
        self._cache: dict[tuple[str, str], ndarray] = {}

    def value(self, name: str, metric: str) -> ndarray:
        """Return the values of a metric for one condition, ``[seeds, problems]``; NaN where a problem has no value.

        Args:
            name: Name of the condition.
            metric: Key in ``problems``; the values are in the order of ``problems[metric]``.
        """
        key = (name, metric)
        if key not in self._cache:
            rows = []
            for r in self.by_name[name].results:
                values = r.points[r.points["metric"] == metric].set_index("problem_id")["value"]
                rows.append(values.reindex(self.problems[metric]).to_numpy(float))
            self._cache[key] = np.stack(rows)
        return self._cache[key]

    @cached_property
    def judge(self) -> Judge:
        """Object that computes the metrics that are not means over problems, such as quantiles of length (see ``metrics.Judge``).

        For each metric it computes a condition's value and the difference from base, with intervals.
        """
        # The board shows ``never_closed`` instead of ``closed``.
        names = [m for m, about in METRICS.items() if about.how and m not in self.problems and m != "closed"]
        return Judge.against(self.outcomes(BASE)[0], names)

    @cached_property
    def base(self) -> dict[str, MetricEffect]:
        """Metric -> a ``metrics.MetricEffect``, whose field ``estimate`` holds the value of base with its 95 % interval.

        Intervals are not clipped to the possible values of the metric, such as 0 to 1.
        """
        return _unbounded(self, BASE)

    def change(self, metric: str, name: str, other: str = BASE) -> Effect:
        """Return the difference in one metric between two conditions, ``name`` minus ``other``, paired by problem.

        If both conditions have several seeds, seed k is compared with seed k. If one has a single seed, that seed is compared with every
        seed of the other. The estimate is the mean over these comparisons.

        Args:
            metric: Name of the metric.
            name: Name of the condition that is compared.
            other: Name of the condition that is subtracted.

        Raises:
            ValueError: both conditions have several seeds, but different numbers of them.
            KeyError: the results have no values of this metric, or the board has too few samples per problem for it.
        """
        seeds = {n: len(self.by_name[n].results) for n in (name, other)}
        if len({*seeds.values(), 1}) > 2:  # two different numbers of seeds, neither of them 1
            counts = " and ".join(f"{count} of {n!r}" for n, count in seeds.items())
            raise ValueError(
                f"Seeds cannot be paired: {counts}. Measure the same number for both, or a single seed for one of them."
            )
        seeded = any(self.by_name[n].spec.varies for n in (name, other))
        if metric in self.problems:
            return stats.mean_effect(self.value(name, metric), self.value(other, metric), seeded=seeded)
        own, subtracted = self.outcomes(name), self.outcomes(other)
        pairs = [(own[i % len(own)], subtracted[i % len(subtracted)]) for i in range(max(len(own), len(subtracted)))]
        differences = [_difference(metric, a, b) for a, b in pairs]
        return stats.effect(differences, len(self.main), seeded=seeded)

    def outcomes(self, name: str) -> list[Outcomes]:
        """Return the outcomes of a condition, such as correctness and length (``metrics.Outcomes``), on the board's test problems.

        Problems of the unseen tasks are left out. The list has one entry per seed.

        Args:
            name: Name of the condition.
        """
        return [Outcomes.from_rows(r.rows, self.main) for r in self.by_name[name].results]


def _difference(metric: str, own: Outcomes, other: Outcomes) -> stats.Statistic:
    """Return a function that computes the difference in a metric between two conditions, ``own`` minus ``other``, from resampled problems.

    The function is a ``stats.Statistic``: its argument is an array of problem indices, one row per resample. Some metrics, such as the
    accuracy-efficiency score, are themselves a comparison with base. For these, the function computes the metric of ``own``, with ``other``
    in the place of base.

    Args:
        metric: Name of a metric that is computed from outcomes (see ``metrics.METRICS``).
        own: Outcomes of the condition that is compared.
        other: Outcomes of the condition that is subtracted.

    Raises:
        KeyError: the outcomes have no values of this metric, or too few samples per problem for it.
    """
    about = METRICS[metric]
    of_own, of_other = (about.how(outcomes, other) if about.how else None for outcomes in (own, other))
    if of_own is None or of_other is None:
        raise KeyError(f"These results have no values of {metric!r}, or too few samples per problem for it.")
    return of_own if about.against_base else stats.difference(of_own, of_other)


def estimates(table: AlignedResults, name: str) -> tuple[dict[str, Effect], dict[str, Effect]]:
    """Return two dicts for one condition: metric -> its value, and metric -> difference from base (condition minus base, paired).

    Values and differences come with 95 % intervals, clipped to what is possible. For example, a share is between 0 and 1.

    Args:
        table: Results of all conditions.
        name: Name of the condition.
    """
    # Intervals are clipped to possible values, such as 0 to 1 for a share.
    judged = {m: e.within_bounds(m, table.base[m].estimate) for m, e in _unbounded(table, name).items()}
    return {m: e.estimate for m, e in judged.items()}, {m: e.change for m, e in judged.items()}


def _unbounded(table: AlignedResults, name: str) -> dict[str, MetricEffect]:
    """Return a dict from metric to its value and its difference from base, for one condition.

    Intervals are not clipped to what is possible for the metric, such as 0 to 1 for a share.
    """
    seeded, judged = table.by_name[name].spec.varies, dict[str, MetricEffect]()
    for metric in table.problems:
        values, base = table.value(name, metric), table.value(BASE, metric)[:1]  # base: first seed only; [:1] keeps the axis
        if not np.isnan(values).all():
            estimate, change = (stats.mean_effect(values, minus, seeded=seeded) for minus in (None, base))
            judged[metric] = MetricEffect(estimate, change)
    return judged | table.judge.effects(table.outcomes(name), seeded=seeded)


def cells(table: AlignedResults, name: str) -> dict[str, dict[str, Any]]:
    """Return accuracy and think tokens of one condition for every task and difficulty level of the board's test problems.

    Returns:
        task -> level -> ``{"n": number of problems, "accuracy": {...}, "think_tokens": {...}}``. Each ``{...}`` holds ``mean, low, high``,
        with a 95 % interval. Task and level can be ``"all"``. Combinations without problems are left out.
    """
    base = table.by_name[BASE].results[0].rows
    task = base.groupby("problem_id", sort=False)["task"].first().reindex(table.main).to_numpy(str)
    level = levels_of(base).reindex(table.main).to_numpy(str)
    by_task: dict[str, dict[str, Any]] = {}
    seeded = table.by_name[name].spec.varies
    for t in ("all", *dict.fromkeys(task)):
        for d in ("all", *LEVELS):
            chosen = ((task == t) | (t == "all")) & ((level == d) | (d == "all"))
            if not chosen.any():
                continue
            values = {m: _aligned(table, name, m)[:, chosen] for m in statistics.HEADLINE}
            intervals = {m: _interval(stats.mean_effect(v, seeded=seeded).within(described(m).bounds)) for m, v in values.items()}
            by_task.setdefault(t, {})[d] = {"n": int(chosen.sum()), **intervals}
    return by_task


def _aligned(table: AlignedResults, name: str, metric: str) -> ndarray:
    """Return the values of a metric for one condition, ``[seeds, problems]``, one column per main problem in the order of ``table.main``.

    Different metrics thus have the same columns. Raise KeyError if a main problem has no value of the metric in base.
    """
    position = {p: i for i, p in enumerate(table.problems[metric])}
    return table.value(name, metric)[:, [position[p] for p in table.main]]


def _interval(e: Effect) -> dict[str, float | str | None]:
    """Return ``mean, low, high`` of an effect as a dict for JSON (``None`` for NaN), with its ``note`` (such as ``"2 seeds"``) if set."""
    fields: dict[str, float | str | None] = {
        # v != v: NaN, which JSON does not have.
        k: None if v != v else float(f"{v:.6g}")
        for k, v in asdict(e).items()
        if k not in ("p", "note")
    }
    return fields | {"note": e.note} if e.note else fields


def make_board(ground: Ground, specs: Sequence[Spec], title: str) -> dict[str, Any]:
    """Return the board of all results saved so far, as one mapping that JSON can store.

    The top of ``page.py`` lists its parts. ``write`` adds two of them, ``figures`` and ``methods``.

    Args:
        ground: Base model, sizes and output directory of the board.
        specs: Conditions of the board; those without results are left out.
        title: Title of the page.
    """
    results = condition_results(ground, specs)
    table = AlignedResults(results)
    metrics, paired = {}, {}
    with stage("statistics", len(results), "condition") as bar:
        for name in results:
            metrics[name], paired[name] = estimates(table, name)
            bar.update()
    paired.pop(BASE)
    corrected = statistics.holm_corrected(paired)
    # The Pareto front needs accuracy and think tokens of the same problems.
    both = {m: {name: _aligned(table, name, m) for name in results} for m in statistics.HEADLINE}
    front = statistics.on_front(both["accuracy"], both["think_tokens"])
    conditions = {name: _about(table, name, metrics[name]) | {"front": front[name]} for name in results}
    differences = {
        name: {m: {**_interval(e), "p": _number(e.p), "p_holm": _number(corrected[name].get(m))} for m, e in effects.items()}
        for name, effects in paired.items()
    }
    present = {m for effects in metrics.values() for m in effects}
    trained_on = training_tasks(ground)
    first = results[BASE].results[0].rows
    return {
        "title": title,
        "base": BASE,
        "conditions": conditions,
        "paired": differences,
        "metrics": {
            m: metric_texts(m, ground.sizes, trained_on) for m in [*METRICS, *sorted(present - {*METRICS})] if m in present
        },
        "tasks": ["all", *dict.fromkeys(first["task"])],
        "difficulties": ["all", *LEVELS],
        "examples": examples(ground, results),
        "curves": curves(ground, results),
        "provenance": {
            **asdict(ground.lm.provenance(0)),
            "made_by": made_by(results),
            "sizes": ground.sizes.record,
            "problems": len(table.main),
            "trained_on": trained_on,
        },
    }


def training_tasks(ground: Ground) -> list[str]:
    """Return the sorted names of the tasks on which a board's policies are trained.

    A task can be a mixture of tasks. For example, ``tiny`` mixes two, and training on it gives ``["arithmetic", "lookup"]``. If the
    problems come from a file and none of them names its task, the result holds only the path of the file.
    """
    named = {str(p.meta.get("task", "")) for p in ground.study.load("train", ground.lm)} - {""}
    return sorted(named) or [ground.sizes.training.task]


def metric_texts(name: str, sizes: Sizes, trained_on: Sequence[str]) -> dict[str, str]:
    """Return the texts that describe a metric on a board, with the keys ``label, unit, better, group, help`` (see ``metrics.Metric``).

    Some depend on the board. ``accuracy_TASK`` is in the group ``main`` if the policies are trained on the task, else in ``damage``.

    Args:
        name: Name of the metric.
        sizes: Tasks and sizes of the board.
        trained_on: Names of the tasks on which policies are trained, from ``training_tasks``.
    """
    about, task = described(name).about, name.removeprefix("accuracy_")
    if task != name and task in trained_on:
        about |= {"group": "main"}
    elif task != name:
        label = f"{about['label']} (never trained on)" if task in dict(sizes.main) else about["label"]
        about |= {"group": "damage", "label": label, "help": f"{about['help']} This board trains no policy on this task."}
    low, high = sizes.horizons
    return about | {"help": about["help"].replace("chains of additions", f"chains of {low} to {high} additions")}


def made_by(by_name: Mapping[str, ConditionResults]) -> str:
    """Return one line of text with the toolkit's version and a hash. The hash changes if any result was made by other code.

    Args:
        by_name: Name of the condition -> its results, from ``condition_results``.
    """
    return store.made_by(store.key(sorted({str(r.about["made_by"]) for m in by_name.values() for r in m.results})))


def _number(value: float | None) -> float | None:
    """Return a p-value rounded to four significant digits for JSON; ``None`` for NaN."""
    return None if value is None or value != value else float(f"{value:.4g}")


def _about(table: AlignedResults, name: str, metrics: Mapping[str, Effect]) -> dict[str, Any]:
    """Return the entry of one condition in the board's ``conditions``: description, metrics, cells, costs, shift of hidden states.

    Args:
        table: Results of all conditions.
        name: Name of the condition.
        metrics: Metric -> estimate of the condition, from ``estimates``.
    """
    condition = table.by_name[name]
    spec, notes = condition.spec, [r.about for r in condition.results]
    costs = {
        k: [note[k] for note in notes if note[k] is not None] for k in ("tokens", "seconds", "parameters_changed", "training_steps")
    }
    cost = {k: float(np.mean(values)) for k, values in costs.items() if values}
    shifts = [note["shift"] for note in notes if note["shift"]]
    return {
        "family": spec.family,
        # A model's name may end with a note on rounding, after a semicolon.
        "note": "; ".join([spec.note, *notes[0]["model"].split("; ")[1:]]),
        "paper": spec.paper,
        "seeds": condition.seeds,
        "fingerprints": [note["fingerprint"] for note in notes],
        "interventions": notes[0]["interventions"],
        "metrics": {m: _interval(e) for m, e in metrics.items()},
        "cells": cells(table, name),
        "cost": cost,
        # ``short_push`` has one value for each problem whose responses the shift was measured in.
        "shift": _mean_shift(shifts, len(table.problems["short_push"])) if shifts else {},
    }


def _mean_shift(shifts: Sequence[Mapping[str, float]], n: int) -> dict[str, float]:
    """Return the mean over seeds of shifts of hidden states (``measure.References.shift``); ``low, high`` hold the 95 % interval of the mean.

    The interval is that of ``stats.effect``. The seeds share their problems, so the variance over problems is not divided by their number.

    Args:
        shifts: One shift per seed.
        n: Number of problems in whose responses the shifts were measured.
    """
    mean = {k: float(np.mean([s[k] for s in shifts])) for k in shifts[0]}
    if len(shifts) == 1:
        return mean
    # A normal interval is 2 x 1.96 standard errors wide.
    by_problem = float(np.mean([((s["high"] - s["low"]) / 3.92) ** 2 for s in shifts]))
    by_seed = float(np.var([s["cosine"] for s in shifts], ddof=1)) / len(shifts)
    half = float(stats.half_width(0.05, by_problem, by_seed, n, len(shifts)))
    return mean | {"low": max(mean["cosine"] - half, -1.0), "high": min(mean["cosine"] + half, 1.0)}


def examples(ground: Ground, by_name: Mapping[str, ConditionResults], count: int = 12) -> list[dict[str, Any]]:
    """Return example problems, spread evenly over tasks and difficulty levels, each with one response of every condition.

    The response is the first sample of the first seed.

    Args:
        ground: Base model, sizes and problems of the board.
        by_name: Name of the condition -> its results, from ``condition_results``.
        count: Largest number of example problems.

    Returns:
        One dict per problem, with the keys ``id``, ``task``, ``difficulty`` (``"easy"``, ``"medium"``, ``"hard"``, or ``""`` if the
        task states none), ``prompt``, ``answer`` (right answer) and ``responses`` (name of the condition -> ``text, correct, think_tokens``, and the
        keys of ``response_parts``).
    """
    rows = by_name[BASE].results[0].rows
    grouped = (
        levels_of(rows).fillna("").to_frame("level").join(rows.groupby("problem_id", sort=False)[["task", "difficulty"]].first())
    )
    each = max(1, count // max(1, grouped.groupby(["task", "level"]).ngroups))  # examples per task and level
    chosen = grouped.groupby(["task", "level"], sort=False).head(each).index[:count]
    by_id = {p.id: p for p in ground.problems}
    responses = {name: m.results[0].rows.query("sample == 0").set_index("problem_id") for name, m in by_name.items()}
    return [
        {
            "id": i,
            "task": str(grouped.loc[i, "task"]),
            "difficulty": str(grouped.loc[i, "level"]),
            "prompt": str(by_id[i].messages[-1]["content"]),
            "answer": by_id[i].answer,
            "responses": {
                name: {
                    "text": first.loc[i, "text"],
                    **response_parts(ground.lm.tags, first.loc[i]),
                    "correct": bool(first.loc[i, "correct"]),
                    "think_tokens": int(first.loc[i, "think_tokens"]),
                }
                for name, first in responses.items()
            },
        }
        for i in chosen
    ]


def response_parts(tags: ThinkTags | None, row: pd.Series) -> dict[str, Any]:
    """Return thinking and answer of a response, split where its spans were split.

    Args:
        tags: Think tags of the model; ``None`` if it has none.
        row: The response, a row of ``Result.rows``.

    Returns:
        A dict with the keys ``think`` (text, or ``None`` without thinking), ``answer`` (text, or ``None`` if there is none, or if it is the
        thinking) and ``open`` (True if thinking was never closed).
    """
    text, closed = row["text"], bool(row["closed"])
    answer = None if pd.isna(row["answer"]) else row["answer"]  # pandas holds a missing text as NaN
    if tags is not None and tags.close is None:  # the whole response is the thinking, and the answer too
        return {"think": text, "answer": None, "open": not closed}
    # The row has no spans. Thinking that begins in the prompt, or never closes, is told by the number of think tokens and by ``closed``.
    before, closing, _ = text.partition(tags.close) if tags is not None and closed else (text, "", "")
    thinks = tags is not None and (not closed or bool(closing) or row["think_tokens"] > 0)
    if not thinks:
        return {"think": None, "answer": text if answer is None else answer, "open": False}
    inside = before.partition(tags.open)[2] if tags is not None and tags.open and tags.open in before else before
    return {"think": inside, "answer": answer if closed else None, "open": not closed}


def curves(ground: Ground, by_name: Mapping[str, ConditionResults]) -> dict[str, list[dict[str, Any]]]:
    """Return the learning curves of the policies that the board trained (family "trained").

    Returns:
        Name of the condition -> list with one dict per seed. Keys: ``seed``, and the lists ``step, accuracy, think_tokens``, which have one
        entry per measured training step. ``accuracy`` and ``think_tokens`` are means on held-out problems. A seed without a training log
        in the board's directory is left out of the list.
    """
    from toolkit.grpo.log import LOG, read  # imports transformers' trainer and peft

    logs = {}
    for name, condition in by_name.items():
        spec = condition.spec
        if spec.family != "trained" or spec.recipe is None:
            continue
        lines = []
        for seed in condition.seeds:
            folder = ground.folder_of(spec.recipe, seed, spec.reward, plan=spec.plan(ground, seed))
            if not (folder / LOG).exists():
                continue
            rows = [row for row in read(folder / LOG) if row.get("held_out/accuracy") is not None]
            columns = {"step": "step", "accuracy": "held_out/accuracy", "think_tokens": "held_out/think_tokens"}
            lines.append({"seed": seed} | {key: [row[column] for row in rows] for key, column in columns.items()})
        logs[name] = lines
    return logs


def write(ground: Ground, specs: Sequence[Spec], title: str, directory: str | Path, *, command: str = "") -> dict[str, Any]:
    """Write the board of all results saved so far into a directory, and return the board as a mapping.

    The files are ``board.json``, ``table.parquet`` (one row per condition and metric, see ``long_table``) and the web page ``report.html``.

    Args:
        ground: Base model, sizes and output directory of the board.
        specs: Conditions of the board; those without results are left out.
        title: Title of the page.
        directory: Directory to write to.
        command: Command that makes the board again, to be shown on the page.
    """
    board, out = make_board(ground, specs, title), store.writable(directory)
    board |= {"figures": sections(board), "methods": methods(), "command": command}
    store.write_json(board, out / "board.json")
    store.save_table(long_table(board), out / "table.parquet")
    write_page(board, out / "report.html")
    return board


DAMAGE = (
    "accuracy", "accuracy_arithmetic", "accuracy_lookup", "shortest_20", "never_closed", "looping", "leaking", "no_think", "failed_steps",
    "accuracy_running_sum", "running_sum_step", "retrieved", "pass_at_4x", "vote_at_4x",
)  # fmt: skip
"""Metrics in the figure "Gains and damage", one column each; all are shares. ``metrics.METRICS`` describes them."""


def sections(board: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the figures for the web page of a board, as dicts with ``title``, ``text`` (explanation) and ``figure`` (plotly JSON).

    Without a condition beside base there is nothing to compare, and only the last figure is made.

    Args:
        board: The board, from ``make_board``.
    """
    trained_on = board["provenance"].get("trained_on", ())  # files of version 0.1.0 lack it
    trained = any(about["family"] in ("trained", "combined") for about in board["conditions"].values())
    where = f" This board trains policies on {' and '.join(trained_on)} only." if trained and trained_on else ""
    chains = figures.chain_accuracy(board)
    drawn = (
        ("Gains and damage", "Condition minus base. Blue: better; brown: worse; grey: neither. Cells with a colour have p < .05 after Holm's correction. In "
         f"brackets: fewer than three seeds, not tested.{where}", figures.metric_differences(board, DAMAGE)),
        ("Do trained policies move along the direction that the edit removes?", "Every condition reads the same responses of base. The shift is the difference (condition "
         "minus base) of the mean hidden state after the last block, at the first token of each line of thinking. Grey: 97.5 % of the differences between random groups "
         "of responses lie in this band.", figures.state_shifts(board)),
        ("Short-thinking heads", "Every condition reads the same responses of base. If a trained policy thinks longer although these heads write the same, other parts of the "
         "model changed.", figures.head_change(board)),
        ("Chains of additions", "Below the line: worse than the step accuracy predicts. Above the line: re-checks repair wrong steps.", chains),
    )  # fmt: skip
    return [
        {"title": title, "text": text, "figure": figure.to_plotly_json()}
        for title, text, figure in drawn
        if board["paired"] or figure is chains
    ]


def long_table(board: Mapping[str, Any]) -> pd.DataFrame:
    """Return the numbers of a board as a table with one row per condition and metric.

    Intervals are 95 %. Units are those of the metrics; shares are from 0 to 1. Columns:

    * ``condition, family, metric``.
    * ``mean, low, high``: value of the metric for the condition, with its interval.
    * ``difference, difference_low, difference_high``: condition minus base, with its interval. They have no value for base.
    * ``p``: p-value of the difference. ``p_holm``: the same after Holm's correction.
    * ``note``: ``"2 seeds"`` if these are too few seeds for a p-value; ``"no variance"`` if nothing varies, so that the interval has width
      0; usually empty.

    Args:
        board: The board, from ``make_board``.
    """
    rows = []
    for name, about in board["conditions"].items():
        for metric, e in about["metrics"].items():
            d = board["paired"].get(name, {}).get(metric, {})
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


def text_table(board: Mapping[str, Any], metrics: Sequence[str]) -> pd.DataFrame:
    """Return the board as a table of text cells, for a terminal or the README: one row per condition, one column per metric.

    A cell holds the mean and, in brackets, the difference from base (condition minus base) with its 95 % interval. The cells of base hold
    only the mean, and so do those of metrics that are themselves a comparison with base. Shares are in percent.

    A star marks a difference with p < .05 after Holm's correction. A random or trained condition with fewer than three seeds gets no star;
    its cells state the number of seeds in brackets.

    Args:
        board: The board, from ``make_board``.
        metrics: Names of the metrics to show. Metrics that the board does not have are left out.
    """
    rows = {}
    for name, about in board["conditions"].items():
        row = {}
        for metric in (m for m in metrics if m in board["metrics"]):
            e, d = about["metrics"].get(metric), board["paired"].get(name, {}).get(metric)
            row[board["metrics"][metric]["label"]] = _cell(metric, e, d) if e else ""
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("condition")


def _cell(metric: str, e: Mapping[str, Any], d: Mapping[str, Any] | None) -> str:
    """Return the text of one cell of ``text_table``, from the value ``e`` of a metric and its difference from base ``d``."""
    if e["mean"] is None:
        return ""
    if d is None or d["mean"] is None:  # base, or a metric that base has no value of: the mean alone
        return cell(metric, {**e, "low": e["mean"], "high": e["mean"]})
    return cell(metric, e, d, star=d["p_holm"] is not None and d["p_holm"] < 0.05, note=d.get("note", ""))


def methods() -> list[dict[str, str]]:
    """Return the texts on the web page of a board that explain statistics, scores and controls, as dicts with ``title`` and ``text``."""
    a, b, c = assumed_aes
    return [
        {
            "title": "Statistics",
            "text": "Every condition answers the same problems with the same random numbers. Intervals are 95 %, over problems (bootstrap) and, "
            "for conditions that are random or trained, also over seeds. Differences are condition minus base, paired by problem. A difference is "
            "marked if its p-value is below .05 after Holm's correction over all conditions (accuracy and think tokens together, any other metric "
            "by itself). A random or trained condition needs at least three seeds to be marked; with fewer, the number of seeds stands beside the "
            'interval. If a metric does not vary ("no variance"), its interval has width 0.',
        },
        {
            "title": "Accuracy-efficiency score",
            "text": f"{a:g} x relative shortening of thinking + {b:g} x relative gain of accuracy; if accuracy falls, - {c:g} x relative loss of "
            "accuracy instead. Papers use different constants; these are ours.",
        },
        {
            "title": "Controls",
            "text": "A control makes a change of the same kind at random: other heads, other directions or vectors, exits elsewhere. Its note says which, "
            "and where its size is not that of the method. It shows how much of an effect any such change has.",
        },
    ]
