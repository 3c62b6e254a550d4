"""Compare conditions (base, edited, steered, trained, random controls) on the same problems with the same random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from toolkit import identity, origins, stats, store
from toolkit.engines import OWN_LOOP, CannotSampleError, Engine
from toolkit.generate import Sampling, begin_session, rollouts, task_and_split
from toolkit.leaks import leaks
from toolkit.lm import LM, Condition
from toolkit.metrics import Judge, Outcomes, right_within
from toolkit.tags import ThinkTags
from toolkit.types import Problem, Provenance, Report, Rollout, problems_by_id

ANOTHER_SPLIT = (
    "Judge it on another split (train is for making, test for judging), or allow it: allow_overlap=True, --allow-overlap."
)
REPORTED = (
    "accuracy", "think_tokens", "response_tokens", "closed", "looping", "leaking",
    "shortest_5", "shortest_10", "shortest_20", "shortest_5_same", "shortest_10_same", "shortest_20_same",
)  # fmt: skip
"""Metrics of ``summary``.

``shortest_20`` is the accuracy of the condition's own 20 % of responses with the shortest thinking, as in ThinkEdit's tables.
``shortest_20_same`` is its accuracy on the 20 % of problems on which base thinks least: the same problems for all conditions. The other
numbers, 5 and 10, are also percentages. ``metrics.METRICS`` describes each metric.
"""


class OverlapError(ValueError):
    """Raised if a condition would be judged on problems that were used to edit, steer or train it."""


def made_from(condition: Condition) -> list[origins.Record]:
    """Return records of the problems that were used to edit, steer or train a condition, without duplicates.

    A record holds hashes of problem ids (see ``origins.record``). A held-out evaluation must not use any of these problems.
    """
    return list(origins.distinct(_records(condition)))


def _records(value: Any) -> Iterator[origins.Record]:
    """Yield the records in a condition, its interventions and rules, and in all values that these hold, such as directions and donors."""
    if isinstance(value, Provenance):
        yield origins.record_in(value.notes)
    elif isinstance(value, Condition):
        yield from value.lm.made_from
        for part in (*value.during, *value.rules):
            yield from _records(part)
    elif is_dataclass(value) and not isinstance(value, type | LM):
        for f in fields(value):
            yield from _records(getattr(value, f.name))


def check_held_out(
    conditions: Mapping[str, Condition], problems: Sequence[Problem], *, allow: bool = False, remedy: str = ANOTHER_SPLIT
) -> dict[str, int]:
    """Check that the problems are held out, that is, that none of them was used to edit, steer or train any of the conditions.

    Args:
        conditions: Conditions by name.
        problems: Problems on which the conditions are to be judged.
        allow: True to count the problems that are not held out, instead of raising an error.
        remedy: Last sentence of the error message: advice to the user.

    Returns:
        Name of a condition -> number of ``problems`` that are not held out for it. All are 0 unless ``allow`` is True.

    Raises:
        OverlapError: one of the problems was used to edit, steer or train a condition, and ``allow`` is False.
    """
    ids = [p.id for p in problems]
    shared = {name: origins.overlap(made_from(condition), ids) for name, condition in conditions.items()}
    for name, same in shared.items():
        if same and not allow:
            raise OverlapError(
                f"{name!r} was made from {len(same)} of the {len(ids)} problems it would be judged on, such as {same[0][:60]!r} "
                f"(ids are compared: give other questions other ids, or none). {remedy}"
            )
    return {name: len(same) for name, same in shared.items()}


def compare(
    conditions: Mapping[str, Condition | LM],
    problems: Sequence[Problem],
    sampling: Sampling = Sampling(n=8),
    *,
    base: str = "base",
    engine: Engine = OWN_LOOP,
    out: str | Path | None = None,
    allow_overlap: bool = False,
    progress: bool = True,
) -> Report:
    """Sample responses from every condition to the same problems with the same random numbers. Return the graded responses as a report.

    The random numbers of a sample depend only on ``sampling.seed``, the problem and the sample index.

    Args:
        conditions: Conditions or models, by name.
        problems: Problems that every condition answers.
        sampling: Sampling settings of all conditions.
        base: Name of the condition with which the others are compared.
        engine: Program that samples the responses: by default the toolkit's own loop. ``engines.connect`` returns others.
        out: Directory for the rollouts, with one folder per condition. Repeat the call to resume after an interruption. ``None`` stores
            nothing.
        allow_overlap: True to judge conditions even on problems that were used to edit, steer or train them. Reports and model cards then
            say so.
        progress: True to show a progress bar.

    Raises:
        ValueError: ``base`` is not among the conditions.
        OverlapError: one of the problems was used to edit, steer or train a condition, and ``allow_overlap`` is False.
        engines.EngineError: the engine cannot sample responses from one of the conditions.
    """
    if base not in conditions:
        raise ValueError(f"The base condition {base!r} is not among {', '.join(conditions)}: pass base=...")
    judged = {name: c if isinstance(c, Condition) else Condition(c) for name, c in conditions.items()}
    overlap = check_held_out(judged, problems, allow=allow_overlap)
    folders = {name: None if out is None else rollout_folder(out, name) for name in judged}
    expected = len(problems) * sampling.n
    if any(folder is None or store.count_rollouts(folder) < expected for folder in folders.values()):
        _check_engine(engine, judged, problems, sampling)  # not for results that need no sampling any more
    tables, about = [], {}
    for number, (name, condition) in enumerate(judged.items(), 1):
        label = progress and f"sampling {name}"[:40] + f" ({number} of {len(judged)})"
        try:
            sampled = rollouts(condition, problems, sampling, engine=engine, out=folders[name], progress=label)
        except BaseException as stop:  # including Ctrl-C: the message then names the condition that was interrupted
            stop.add_note(f"condition {number} of {len(judged)}")
            raise
        tables.append(rollout_table(sampled, problems, condition.lm.tags).assign(condition=name))
        about[name] = {
            "model": condition.lm.name,
            "fingerprint": condition.lm.fingerprint,
            "parent": condition.lm.parent,
            "interventions": identity.describe_interventions(condition),
            "note": condition.note,
            "made_from": origins.describe_all(made_from(condition)),
            "overlap": overlap[name],
        }
    notes = {"sampling": sampling.identity, "problems": len(problems), **task_and_split(problems), **engine.header}
    provenance = judged[base].lm.provenance(sampling.seed, **notes)
    return Report(pd.concat(tables, ignore_index=True), about, base, provenance)


def _check_engine(engine: Engine, conditions: Mapping[str, Condition], problems: Sequence[Problem], sampling: Sampling) -> None:
    """Check, before anything is sampled, that an engine can sample responses from every condition.

    Raises:
        engines.EngineError: it cannot for one of the conditions, or it would use the same model for two conditions with different weights.
    """
    for condition in conditions.values():
        engine.check(condition, sampling)
    weights: dict[str, tuple[str, str]] = {}  # what the engine uses -> name and fingerprint of a condition
    for name, condition in conditions.items() if engine is not OWN_LOOP else ():
        serves = begin_session(condition, problems, sampling, engine).serves
        other, fingerprint = weights.setdefault(serves, (name, condition.lm.fingerprint))
        if fingerprint != condition.lm.fingerprint:
            raise CannotSampleError(
                f"{engine.name} would sample {name!r} and {other!r}, which have different weights, from the same model {serves!r}: serve each of "
                "them under a name of its own."
            )


def rollout_folder(out: str | Path, name: str) -> Path:
    """Return the folder in which ``compare(..., out=out)`` stores the rollouts of the condition ``name``."""
    return Path(out) / store.safe_name(name)


def rollout_table(rollouts: Sequence[Rollout], problems: Sequence[Problem], tags: ThinkTags | None) -> pd.DataFrame:
    """Return a table with one row per rollout: its grade, its lengths and whether it loops or goes on thinking in the answer.

    ``difficulty`` is NaN for a problem whose task states none. The columns are those of ``Report.rows`` except ``condition``: ``problem_id, sample, task, difficulty, correct, think_tokens,
    response_tokens, closed, looping, leaking, finish``.

    Args:
        rollouts: Rollouts of one condition.
        problems: The problems that the rollouts answer, in any order.
        tags: Think tags of the model that sampled the rollouts; ``None`` if it has none.
    """
    by_id = problems_by_id(problems, rollouts)
    return pd.DataFrame(
        {
            "problem_id": r.problem_id,
            "sample": r.sample,
            "task": by_id[r.problem_id].meta.get("task", ""),
            "difficulty": by_id[r.problem_id].meta.get("difficulty", math.nan),
            "correct": r.correct,
            "think_tokens": r.think_tokens,
            "response_tokens": r.response_tokens,
            "closed": r.closed,
            # Only a response that was cut off at the token limit can be stuck in a loop.
            "looping": r.finish == "length" and stats.looping(r.token_ids[r.prompt_len :]),
            "leaking": leaks(r, tags),
            "finish": r.finish,
        }
        for r in rollouts
    )


def outcomes(report: Report, condition: str) -> Outcomes:
    """Return the outcomes of one condition as ``[problems, samples]`` arrays, with problems sorted by id.

    Raise KeyError if the report has no such condition.
    """
    if condition not in report.conditions:
        raise KeyError(f"No condition {condition!r} in this report: it holds {', '.join(report.conditions)}.")
    rows = report.rows[report.rows["condition"] == condition]
    return Outcomes.from_rows(rows, sorted(rows["problem_id"].unique()))


BUDGETS = tuple(round(0.1 * i, 1) for i in range(21))
"""Token budgets of ``accuracy_at_budgets``, as multiples of base's mean response length."""


def accuracy_at_budgets(report: Report, *, budgets: Sequence[float] = BUDGETS, seed: int = 0) -> pd.DataFrame:
    """Return the accuracy of every condition at token budgets: a response that is longer than the budget counts as wrong (``metrics``).

    Args:
        report: Results of ``compare``.
        budgets: Budgets per response, as multiples of base's mean response length.
        seed: Random seed of the bootstrap over problems.

    Returns:
        One row per condition and budget. Columns: ``condition, budget`` (multiple), ``tokens`` (the budget in tokens), ``mean, low, high``.
    """
    base, rows = outcomes(report, report.base), []
    for name in report.conditions:
        own = outcomes(report, name)
        for budget in budgets:
            e = stats.effect([right_within(budget)(own, base)], own.shape[0], seed=seed).within((0.0, 1.0))
            rows.append((name, budget, budget * base.response_tokens.mean(), e.mean, e.low, e.high))
    return pd.DataFrame(rows, columns=["condition", "budget", "tokens", "mean", "low", "high"])


def summary(report: Report, *, seed: int = 0) -> pd.DataFrame:
    """Return a table with one row per condition and metric: the metric's value and its paired difference from base (condition minus base).

    Columns: ``condition, metric, mean, low, high, difference, difference_low, difference_high``. ``low`` and ``high`` are the ends of the
    95 % interval of ``mean``, ``difference_low`` and ``difference_high`` those of ``difference``. Intervals come from a bootstrap over
    problems. Shares, such as accuracies, are between 0 and 1. The metrics are ``REPORTED``; ``metrics.METRICS`` describes each.

    Args:
        report: Results of ``compare``.
        seed: Random seed of the bootstrap.
    """
    judge, rows = Judge.against(outcomes(report, report.base), REPORTED, seed=seed), []
    of_base = judge.effects([judge.base])
    for name in report.conditions:
        for metric, effect in judge.effects([outcomes(report, name)]).items():
            bounded = effect.within_bounds(metric, of_base[metric].estimate)
            e, change = bounded.estimate, bounded.change
            rows.append((name, metric, e.mean, e.low, e.high, change.mean, change.low, change.high))
    return pd.DataFrame(
        rows, columns=["condition", "metric", "mean", "low", "high", "difference", "difference_low", "difference_high"]
    )
