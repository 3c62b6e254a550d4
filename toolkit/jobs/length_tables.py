"""Statistics of length generalisation: accuracy by length, differences between encodings and hints with verdicts, and attention.

They read results of ``jobs/length_generalisation``, one mapping per trained decoder: the fields of ``Run`` and of ``measure``. A
combination of task, encoding and hint is used once all seeds are there.

Units: accuracies and their differences are shares, attention distances tokens, divergences between attention maps nats. Intervals
are 95 % intervals over seeds and test examples (``stats.seeds``).
Test examples with the same prompt are resampled as if they were
independent, so intervals are too narrow for tasks with few different prompts: counting, and parity at its trained length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from toolkit import stats
from toolkit.jobs.length_generalisation import NO_HINT
from toolkit.methods.positional_encodings import attention_js
from toolkit.stats import Effect

Results = Mapping[tuple[str, str, str], Sequence[Mapping[str, Any]]]
"""Task, encoding and hint -> the results of all seeds, in the order of the seeds."""
METRICS = ("exact", "tokens")
"""``exact``: is the whole answer right? ``tokens``: the share of an answer's tokens that are right after the right tokens before them."""
JUDGED = 2  # multiple of the trained length at which orderings are judged, as in arXiv 2305.19466
LEARNT = 0.5  # accuracy at the trained length from which on a decoder counts as trained: ours
LEVEL, FLOOR = 0.05, 0.02  # of p-values after Holm; shares right that are too low to compare (both ours)
PUBLISHED = (
    ("none", "absolute"), ("none", "alibi"), ("none", "rope"), ("t5", "absolute"), ("t5", "alibi"), ("t5", "rope"),
)  # fmt: skip
"""Encodings of which the first generalises better, according to arXiv 2305.19466."""
HINTS = (
    ("successor", NO_HINT), ("successor", "any element"), ("any element", NO_HINT), ("successor", "rank"),
    ("successor so far", NO_HINT), ("successor so far", "relabelled"), ("parity so far", NO_HINT), ("parity so far", "relabelled"),
)  # fmt: skip
"""Hints of which the first is to help more: than training without, than a random control, or than counting (arXiv 2310.00726)."""


def complete(results: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Results:
    """Return results by task, encoding and hint, without combinations of which a seed is missing."""
    cells: dict[tuple[str, str, str], dict[int, Mapping[str, Any]]] = {}
    for result in results:
        cells.setdefault((result["task"], result["encoding"], result["hint"]), {})[result["seed"]] = result
    return {name: [by_seed[s] for s in seeds] for name, by_seed in cells.items() if set(seeds) <= set(by_seed)}


def outcomes(runs: Sequence[Mapping[str, Any]], multiple: int, metric: str) -> Float[ndarray, "seeds examples"]:
    """Return what each seed got on each test example of one length.

    Args:
        runs: Results of the seeds of one combination.
        multiple: Test length, as a multiple of the trained one.
        metric: One of ``METRICS``.
    """
    length = _length(runs[0], multiple)
    counts = np.array([run["right_tokens"][length] for run in runs], dtype=float)
    share = counts / runs[0]["answer_tokens"][length]
    return (share == 1).astype(float) if metric == "exact" else share


def accuracies(results: Results) -> pd.DataFrame:
    """Return mean accuracy and its interval for each combination, test length and metric."""
    rows = []
    for (task, encoding, hint), runs in results.items():
        for multiple, length in enumerate(runs[0]["answer_tokens"], 1):
            for metric in METRICS:
                e = stats.mean_effect(outcomes(runs, multiple, metric)).within((0.0, 1.0))
                about = {"task": task, "encoding": encoding, "hint": hint, "multiple": multiple, "length": int(length)}
                rows.append(about | {"metric": metric, "mean": e.mean, "low": e.low, "high": e.high})
    return pd.DataFrame(rows)


def encodings_compared(results: Results) -> pd.DataFrame:
    """Return the published orderings of encodings, task by task, with paired differences at ``JUDGED`` times the length and verdicts."""
    pairs = [
        (task, f"{better} over {worse}", results[task, better, NO_HINT], results[task, worse, NO_HINT])
        for task in dict.fromkeys(task for task, _, _ in results)
        for better, worse in PUBLISHED
        if {(task, better, NO_HINT), (task, worse, NO_HINT)} <= set(results)
    ]
    return _compared(pairs)


def hints_compared(results: Results) -> pd.DataFrame:
    """Return hints beside training without and beside controls, by task and encoding; columns as in ``encodings_compared``."""
    pairs = [
        (f"{task}, {encoding}", f"{better} over {'no hint' if worse == NO_HINT else worse}", runs, results[task, encoding, worse])
        for (task, encoding, hint), runs in results.items()
        for better, worse in HINTS
        if hint == better and (task, encoding, worse) in results
    ]
    return _compared(pairs)


def attention_by_head(results: Results, multiple: int = 1) -> pd.DataFrame:
    """Return each head's attention distance in tokens, for decoders without hints at one test length.

    Heads of different seeds do not correspond. So the heads of a layer are sorted by their distance before seeds are averaged. The row
    ``uniform`` of a task is the distance of a head that attends to all tokens equally.
    """
    rows = []
    for (task, encoding, hint), runs in results.items():
        if hint != NO_HINT:
            continue
        length = _length(runs[0], multiple)
        heads = np.sort([run["attention_distance"][length] for run in runs], axis=2).mean(0)  # [layers, heads]
        uniform = (runs[0]["tokens"][length] - 1) / 4  # the mean over queries i of i / 2
        rows += [
            {"task": task, "encoding": encoding, "layer": layer, "head": head, "distance": float(distance), "uniform": uniform}
            for (layer, head), distance in np.ndenumerate(heads)
        ]
    return pd.DataFrame(rows)


def map_distance(a: Float[Tensor, "layers examples heads T T"], c: Float[Tensor, "layers examples heads T T"]) -> list[float]:
    """Return how far attention of two decoders differs on each example, in nats.

    In each layer, take the pair of heads, one of each decoder, whose divergence is smallest; average over layers.
    """
    return [
        float(np.mean([attention_js(x, y).min().item() for x, y in zip(a[:, i], c[:, i], strict=True)])) for i in range(a.shape[1])
    ]


def likeness(maps: Mapping[tuple[str, str], Sequence[Tensor]]) -> pd.DataFrame:
    """Return how far attention of decoders without encoding (NoPE) is from that of each other encoding, in nats, task by task.

    Every decoder is compared with one of the next seed, because decoders of one seed begin with equal weights. So the encoding ``none``,
    another seed of NoPE, is the reference. ``further``: how much further an encoding is than T5's, which should be the nearest
    (arXiv 2305.19466), with its interval, and with a verdict after Holm's correction over all tasks and encodings.

    Args:
        maps: Task and encoding -> attention maps of each seed, on the same examples.
    """
    rows = []
    for task in dict.fromkeys(task for task, encoding in maps if (task, "none") in maps):
        nope = maps[task, "none"]
        by_encoding = {
            encoding: np.array([map_distance(a, c) for a, c in zip(nope, [*others[1:], others[0]], strict=True)])
            for (name, encoding), others in maps.items()
            if name == task
        }
        for encoding, values in by_encoding.items():
            e = stats.mean_effect(values)
            row = {"task": task, "encoding": encoding, "mean": e.mean, "low": e.low, "high": e.high}
            if "t5" in by_encoding and encoding not in ("t5", "none"):
                d = stats.mean_effect(values, by_encoding["t5"])
                row |= {"further": d.mean, "further_low": d.low, "further_high": d.high, "p": d.p, "verdict": _verdict(d)}
            rows.append(row)
    table = pd.DataFrame(rows)
    return _corrected(table, table["p"].notna().to_numpy()) if "p" in table else table


def _compared(pairs: Sequence[tuple[str, str, Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]]) -> pd.DataFrame:
    """Return one row per pair and metric: first minus second at ``JUDGED`` times the trained length, with verdicts after Holm's correction."""
    rows: list[dict[str, Any]] = []
    for where, what, better, worse in pairs:
        learnt = [float(outcomes(runs, 1, "exact").mean()) >= LEARNT for runs in (better, worse)]
        for metric in METRICS:
            e = stats.mean_effect(outcomes(better, JUDGED, metric), outcomes(worse, JUDGED, metric))
            highest = max(float(outcomes(runs, JUDGED, metric).mean()) for runs in (better, worse))
            verdict = "not judged: neither learnt the task" if not any(learnt) else ""
            if not verdict and highest < FLOOR:
                verdict = f"not judged: both below {100 * FLOOR:.0f} %"
            verdict = verdict or _verdict(e)
            about = {"where": where, "ordering": what, "metric": metric, "mean": e.mean, "low": e.low, "high": e.high, "p": e.p}
            rows.append(about | {"verdict": verdict})
    table = pd.DataFrame(rows)
    for metric in METRICS if len(table) else ():  # one family of tests per metric
        table = _corrected(table, (table["metric"] == metric).to_numpy())
    return table


def _corrected(table: pd.DataFrame, family: Bool[ndarray, " rows"]) -> pd.DataFrame:
    """Return the table with ``p_holm``, the p-values of one family of tests after Holm's correction, and verdicts that follow them."""
    judged = family & ~table["verdict"].astype(str).str.startswith("not judged")
    corrected = table.assign(p_holm=table.get("p_holm", np.nan))
    corrected.loc[judged, "p_holm"] = stats.holm(table.loc[judged, "p"].to_numpy(dtype=float))
    lost = judged & table["verdict"].isin(["holds", "reversed"]) & (corrected["p_holm"] > LEVEL)
    corrected.loc[lost, "verdict"] = "no effect detectable"
    return corrected


def _verdict(effect: Effect) -> str:
    if not effect.excludes_zero:
        return "no effect detectable"
    return "holds" if effect.low > 0 else "reversed"


def _length(run: Mapping[str, Any], multiple: int) -> str:
    """Return the key of a test length in a result; lengths are stored in the order of their multiples."""
    return list(run["answer_tokens"])[multiple - 1]
