"""Levels of difficulty: accuracy and think tokens of conditions on easy, medium and hard problems.

A level comes from the problem (``stated_levels``: such as the number of operands), or from base's responses to it (``solved_levels``). The
second judges every response by the level that base's *other* responses give. A level that depends on the judged response itself is biased:
hard problems are then those on which base was unlucky, and any condition with other random choices seems to help on them (regression to the
mean).
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy import ndarray

from toolkit import evaluate, stats
from toolkit.metrics import MetricEffect, described, row_cell
from toolkit.types import Report

LEVELS = ("easy", "medium", "hard")
HARDER = "hard minus easy"
assumed_problems = 5  # smallest number of problems of a level that is shown: ours; bootstrap intervals over fewer are too narrow
BY_LEVEL = {"accuracy": "correct", "think_tokens": "think_tokens"}
"""Metric of ``by_level`` -> attribute of ``Outcomes`` whose mean it is."""


def levels_of(rows: pd.DataFrame) -> pd.Series:
    """Return the difficulty level of every problem: ``"easy"``, ``"medium"`` or ``"hard"``, indexed by problem id.

    Per task, the range from the lowest to the highest difficulty is cut into three parts of equal width. If all difficulties of a task are
    equal, its problems are ``"easy"``. A problem whose difficulty is NaN has no level: its entry is NaN.

    Args:
        rows: Table with the columns ``problem_id, task, difficulty`` (a number).
    """
    each = rows.groupby("problem_id", sort=False)[["task", "difficulty"]].first()

    def third(difficulty: pd.Series) -> pd.Series:
        low, high = difficulty.min(), difficulty.max()
        position = (difficulty - low) / ((high - low) or 1)  # 1: no division by 0 if all are equal
        level = np.select([position < 1 / 3, position < 2 / 3], LEVELS[:2], LEVELS[2])
        return pd.Series(level, difficulty.index, dtype=object).where(position.notna())

    return each.groupby("task", group_keys=False)["difficulty"].apply(third)


def stated_levels(report: Report) -> ndarray:
    """Return the difficulty level of every problem as its task states it, ``[problems, samples]``, with problems sorted by id.

    The levels are those of ``levels_of``; a problem without one has ``""``. All samples of a problem have the same level.
    """
    rows = report.rows[report.rows["condition"] == report.base]
    levels = levels_of(rows).fillna("").sort_index()
    return np.repeat(levels.to_numpy(str)[:, None], evaluate.outcomes(report, report.base).shape[1], axis=1)


def solved_levels(report: Report) -> ndarray:
    """Return how hard every problem is for base, judged by its *other* samples, ``[problems, samples]``, with problems sorted by id.

    A problem is hard for one sample if base answers less than a third of its other samples rightly, easy if at least two thirds, else
    medium; the thirds are our choice. Conditions share the random numbers of a sample, so a level must not depend on the sample that is
    judged. Otherwise the hard problems would seem to gain by chance alone (regression to the mean).

    Raises:
        ValueError: fewer than two samples per problem.
    """
    solved = stats.mean_of_others(evaluate.outcomes(report, report.base).correct)
    return np.select([solved < 1 / 3, solved < 2 / 3], LEVELS[:0:-1], LEVELS[0])


def by_level(report: Report, levels: ndarray, *, seed: int = 0) -> pd.DataFrame:
    """Return accuracy and think tokens of every condition per level of difficulty, with the paired difference from base.

    The last rows of a condition, with the level ``hard minus easy``, say whether the difference from base is larger for hard than for easy
    problems.

    Args:
        report: Results of ``evaluate.compare``.
        levels: Level of every response, one of ``LEVELS`` or ``""``, ``[problems, samples]``, from ``stated_levels`` or ``solved_levels``.
        seed: Random seed of the bootstrap over problems.

    Returns:
        One row per condition, level and metric. Columns: ``condition, level, metric, responses`` (number per condition), ``mean, low,
        high, difference, difference_low, difference_high``. Levels with responses to fewer than ``assumed_problems`` problems are left out.
        Intervals are 95 %.
    """
    base, rows = evaluate.outcomes(report, report.base), []
    chosen = {level: levels == level for level in LEVELS if (levels == level).any(axis=1).sum() >= assumed_problems}
    responses = {level: int(where.sum()) for level, where in chosen.items()}
    responses[HARDER] = sum(responses.get(level, 0) for level in (LEVELS[0], LEVELS[-1]))
    for name in report.conditions:
        own = evaluate.outcomes(report, name)
        for metric, column in BY_LEVEL.items():
            of_own, of_base = getattr(own, column), getattr(base, column)
            values = of_own, of_base, of_own - of_base
            parts = {level: [stats.mean_where(v, where) for v in values] for level, where in chosen.items()}
            if LEVELS[0] in chosen and LEVELS[-1] in chosen:
                parts[HARDER] = [stats.difference(h, e) for h, e in zip(parts[LEVELS[-1]], parts[LEVELS[0]], strict=True)]
            for level, statistics in parts.items():
                e, before, change = (stats.effect([s], len(levels), seed=seed) for s in statistics)
                if level != HARDER:
                    bounded = MetricEffect(e, change).within_bounds(metric, before)
                    e, change = bounded.estimate, bounded.change
                rows.append((name, level, metric, responses[level], e.mean, e.low, e.high, change.mean, change.low, change.high))
    columns = [
        "condition",
        "level",
        "metric",
        "responses",
        *("mean", "low", "high"),
        *("difference", "difference_low", "difference_high"),
    ]
    return pd.DataFrame(rows, columns=columns)


def levels_for(report: Report) -> tuple[ndarray, str]:
    """Return the levels by which a report is best divided, and a sentence that says where they come from.

    These are the levels that the tasks state. If the problems that have a level all have the same, and base has several responses to each
    problem, the levels come from base's other responses.
    """
    stated = stated_levels(report)
    if len(np.unique(stated[stated != ""])) > 1 or stated.shape[1] < 2:
        return stated, "Levels are thirds of the range of difficulty that the task states."
    return solved_levels(report), (
        "The level of a response is the share of base's other responses to its problem that are right: less than a third (hard), or at least "
        "two thirds (easy). The judged responses do not count, so hard problems do not gain by chance."
    )


def text_table(table: pd.DataFrame, *, base: str = "base") -> pd.DataFrame:
    """Return a table of text cells, one row per condition and metric and one column per level.

    A cell holds the mean and, in brackets, the paired difference from base with its 95 % interval. In the column ``hard minus easy``, both
    are the value on hard problems minus that on easy ones. Shares are in percent.

    Args:
        table: Table from ``by_level``.
        base: Name of the base condition. Its cells hold the mean with the interval of the mean.
    """
    rows: dict[str, dict[str, str]] = {}
    for (name, metric), part in table.groupby(["condition", "metric"], sort=False):
        rows[f"{name}, {described(metric).label}"] = {
            row["level"]: row_cell(metric, row, is_base=name == base) for _, row in part.iterrows()
        }
    return pd.DataFrame(rows).T.fillna("")
