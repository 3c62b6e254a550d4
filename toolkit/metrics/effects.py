"""Compare conditions with base (the unchanged model) metric by metric, averaged over problems and seeds; format the results as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from toolkit import stats
from toolkit.metrics.outcomes import Outcomes
from toolkit.metrics.table import METRICS, described
from toolkit.stats import NO_VARIANCE, RESAMPLES, Draws, Effect, Estimate

DIGITS: Mapping[str, int] = {"score": 2, "nats": 3, "number": 2, "calls": 2}
"""Unit of a metric -> digits after the decimal point. All other units have one digit, such as ``tokens`` and ``share`` (in percent)."""


@dataclass(frozen=True)
class MetricEffect:
    """Value of one metric for one condition, and its difference from base.

    Attributes:
        estimate: Value of the metric, with its 95 % interval.
        change: Condition minus base, paired by problem, with its 95 % interval. Equal to ``estimate`` if the metric is itself a comparison
            with base (``Metric.against_base``).
    """

    estimate: Effect
    change: Effect

    def within_bounds(self, name: str, base: Effect) -> MetricEffect:
        """Return a copy whose intervals are clipped to possible values, such as 0 to 1 for a share.

        Args:
            name: Name of the metric. ``Metric.bounds`` are its possible values, ``Metric.change_bounds`` its possible differences from
                base.
            base: Value of the metric for base. It limits ``change``: a length cannot fall by more than base's length.
        """
        metric = described(name)
        change = self.change if metric.against_base else self.change.within(metric.change_bounds(base))
        return MetricEffect(self.estimate.within(metric.bounds), change)


@dataclass(frozen=True)
class Judge:
    """Comparison of conditions with base, on the same bootstrap resamples of the problems. ``Judge.against`` makes one.

    Attributes:
        base: Outcomes of base.
        draws: Name of a metric -> its values for base, on all problems and on each resample. Its keys are the metrics to compare by.
        seed: Random seed of the resamples.
        times: Number of resamples.
    """

    base: Outcomes
    draws: Mapping[str, Draws]
    seed: int
    times: int

    @staticmethod
    def against(base: Outcomes, names: Sequence[str], *, seed: int = 0, times: int = RESAMPLES) -> Judge:
        """Return a ``Judge`` that compares conditions with ``base``.

        Args:
            base: Outcomes of base.
            names: Names of the metrics to compare by. Two kinds are left out: metrics that are not computed from outcomes, and metrics
                that need more samples per problem than ``base`` has.
            seed: Random seed of the resamples.
            times: Number of resamples.
        """
        statistics = {name: how(base, base) for name in names if (how := METRICS[name].how)}
        n = base.shape[0]
        return Judge(base, {k: stats.draws(f, n, seed=seed, times=times) for k, f in statistics.items() if f}, seed, times)

    def effects(self, seeds: Sequence[Outcomes], *, seeded: bool = False) -> dict[str, MetricEffect]:
        """Compare a condition with base: return a dict from metric name to the condition's value and its difference from base.

        The metrics, and their order, are those of the attribute ``Judge.draws``.

        Args:
            seeds: Outcomes of the condition, one entry per seed of its random or trained part; a single entry if it has no such part.
            seeded: True if the condition has a random or trained part. With fewer than ``stats.FEW_SEEDS`` (3) seeds, its p-values are NaN.
        """
        n, effects = self.base.shape[0], dict[str, MetricEffect]()
        for name, of_base in self.draws.items():
            how = METRICS[name].how
            statistics = [how(outcomes, self.base) for outcomes in seeds] if how else []
            draws = [stats.draws(f, n, seed=self.seed, times=self.times) for f in statistics if f]
            estimate = stats.combine(draws, n, seeded=seeded)
            change = estimate if METRICS[name].against_base else stats.combine(draws, n, minus=of_base, seeded=seeded)
            effects[name] = MetricEffect(estimate, change)
        return effects


def cell(
    name: str, estimate: Mapping[str, float], change: Mapping[str, float] | None = None, *, star: bool = False, note: str = ""
) -> str:
    """Return the text of one table cell: a metric's mean for a condition, and its difference from base.

    Shares are written in percent. There are three forms:

    - usually: the mean, then in brackets the difference from base with its interval;
    - if ``change`` is ``None``: the mean with its own interval;
    - if the metric is itself a comparison with base (``Metric.against_base``): the mean alone.

    Args:
        name: Name of the metric.
        estimate: Value of the condition, a mapping with the keys ``mean, low, high``.
        change: Difference from base (condition minus base), with the same keys. ``None`` if there is none, as for base itself.
        star: True to put a star, the mark of a significant difference, after the mean.
        note: Remark to add in brackets, such as ``"2 seeds"`` or ``"no variance"``; "" for none.

    >>> cell("accuracy", {"mean": 0.5, "low": 0.4, "high": 0.6}, {"mean": 0.1, "low": 0.05, "high": 0.15}, star=True)
    '50.0* (+10.0 [+5.0, +15.0])'
    """
    metric = described(name)
    mean = with_interval(estimate["mean"], estimate["mean"], estimate["mean"], metric.unit) + "*" * star
    if metric.against_base:
        return mean + (f" ({note})" if note else "")
    if change is None:
        # The mean is removed from the text of mean and interval, since ``mean`` has it already, with a star if there is one.
        interval = with_interval(estimate["mean"], estimate["low"], estimate["high"], metric.unit)[len(mean) - star :]
        return mean + interval + (f" ({note})" if note else "")
    return f"{mean} ({with_interval(change['mean'], change['low'], change['high'], metric.unit, sign='+')}{f', {note}' if note else ''})"


def row_cell(name: str, row: Mapping[str, Any] | pd.Series, *, is_base: bool) -> str:
    """Return the text of one table cell from a row of a summary, by the rules of ``cell``.

    Args:
        name: Name of the metric.
        row: Row with the numbers ``mean, low, high, difference, difference_low, difference_high``.
        is_base: True for base, which has its own interval instead of the difference from base.
    """
    estimate = {k: row[k] for k in ("mean", "low", "high")}
    change = {k: row[c] for k, c in (("mean", "difference"), ("low", "difference_low"), ("high", "difference_high"))}
    interval = estimate if is_base else change
    return cell(name, estimate, None if is_base else change, note=NO_VARIANCE if interval["low"] == interval["high"] else "")


def with_interval(mean: float, low: float, high: float, unit: str, *, sign: str = "", digits: int | None = None) -> str:
    """Return the text ``mean [low, high]``, or the mean alone if low equals high.

    Args:
        mean: The number.
        low: Lower end of its interval.
        high: Upper end of its interval.
        unit: Unit of the numbers, such as ``tokens``. Numbers with the unit ``share`` are written in percent.
        sign: ``"+"`` writes a plus sign before positive numbers; ``""`` does not.
        digits: Digits after the decimal point. ``None`` takes those of the unit from ``DIGITS``.

    >>> with_interval(0.123, 0.05, 0.2, "share", sign="+")
    '+12.3 [+5.0, +20.0]'
    """
    scale, digits = 100 if unit == "share" else 1, DIGITS.get(unit, 1) if digits is None else digits
    texts = [f"{scale * v:{sign}.{digits}f}" for v in (mean, low, high)]
    return texts[0] if low == high else f"{texts[0]} [{texts[1]}, {texts[2]}]"


def share_of(part: Float[ndarray, "problems samples"], whole: Float[ndarray, "problems samples"], *, seed: int = 0) -> Estimate:
    """Return which share of a mean effect another one is: the mean of ``part`` divided by that of ``whole``, with a 95 % interval.

    The interval is a bootstrap over problems. All numbers are NaN unless the interval of the whole effect excludes zero: a share of an
    effect that may be nothing says nothing.

    Args:
        part: Paired differences whose mean is divided, in the unit of ``whole``.
        whole: Paired differences whose mean is the whole effect.
        seed: Seed of the bootstrap.

    >>> whole = np.array([[4.0], [6.0], [5.0], [5.0]])
    >>> print(share_of(whole / 2, whole), share_of(whole / 2, whole - 5).mean)
    0.5 (no variance) nan
    """
    a, b = stats.mean_of(part), stats.mean_of(whole)
    if not stats.bootstrap(b, len(whole), seed=seed).excludes_zero:
        return Estimate(np.nan, np.nan, np.nan)

    def ratio(index: ndarray) -> ndarray:
        below = b(index)
        return a(index) / np.where(below == 0, np.nan, below)  # a resample without any whole effect says nothing about the share

    return stats.bootstrap(ratio, len(whole), seed=seed)
