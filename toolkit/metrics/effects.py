"""Metrics of conditions over problems and seeds, compared with base, and their text format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolkit import stats
from toolkit.metrics.outcomes import Outcomes
from toolkit.metrics.table import METRICS, described
from toolkit.stats import RESAMPLES, Draws, Effect

DIGITS: Mapping[str, int] = {"score": 2, "nats": 3, "number": 2}
"""Unit -> digits after the point; all other units have one. Shares are written in percent."""


@dataclass(frozen=True)
class MetricEffect:
    """One metric of one condition.

    Attributes:
        estimate: Its value with an interval.
        change: Its paired difference to base with an interval.
    """

    estimate: Effect
    change: Effect

    def within_bounds(self, name: str, base: Effect) -> MetricEffect:
        """Return the same with intervals clipped to possible values: see ``Metric.bounds`` and ``Metric.change_bounds``.

        Args:
            name: Name of the metric.
            base: The metric's estimate for base.
        """
        metric = described(name)
        change = self.change if metric.against_base else self.change.within(metric.change_bounds(base))
        return MetricEffect(self.estimate.within(metric.bounds), change)


@dataclass(frozen=True)
class Judge:
    """Compares conditions with base on the same resampled problems.

    Attributes:
        base: Outcomes of base.
        draws: Metric -> base's values on the resampled problems, in the order in which metrics are returned.
        seed: Seed of the resamples.
        times: Number of resamples.
    """

    base: Outcomes
    draws: Mapping[str, Draws]
    seed: int
    times: int

    @staticmethod
    def against(base: Outcomes, names: Sequence[str], *, seed: int = 0, times: int = RESAMPLES) -> Judge:
        """Return a judge by the named metrics, without those that need more samples than base has."""
        statistics = {name: how(base, base) for name in names if (how := METRICS[name].how)}
        n = base.shape[0]
        return Judge(base, {k: stats.draws(f, n, seed=seed, times=times) for k, f in statistics.items() if f}, seed, times)

    def effects(self, seeds: Sequence[Outcomes], *, seeded: bool = False) -> dict[str, MetricEffect]:
        """Return every metric of a condition by name.

        Args:
            seeds: The condition's outcomes, one per seed.
            seeded: Whether the condition is random or trained, see ``stats.effect``.
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
    """Return a metric as text: the mean, and in brackets the paired difference to base with its interval. Shares are in percent.

    Args:
        name: Name of the metric.
        estimate: ``mean, low, high`` of the condition.
        change: ``mean, low, high`` of the difference; ``None``: write the interval of the estimate instead.
        star: Mark the difference with a star.
        note: Remark in the brackets, such as ``"2 seeds"`` or ``"no variance"``.

    A metric that is itself a comparison with base (``Metric.against_base``) has no brackets, except for the note.

    >>> cell("accuracy", {"mean": 0.5, "low": 0.4, "high": 0.6}, {"mean": 0.1, "low": 0.05, "high": 0.15}, star=True)
    '50.0* (+10.0 [+5.0, +15.0])'
    """
    metric = described(name)
    mean = with_interval(estimate["mean"], estimate["mean"], estimate["mean"], metric.unit) + "*" * star
    if metric.against_base:
        return mean + (f" ({note})" if note else "")
    if change is None:
        interval = with_interval(estimate["mean"], estimate["low"], estimate["high"], metric.unit)[len(mean) - star :]
        return mean + interval + (f" ({note})" if note else "")
    return f"{mean} ({with_interval(change['mean'], change['low'], change['high'], metric.unit, sign='+')}{f', {note}' if note else ''})"


def with_interval(mean: float, low: float, high: float, unit: str, *, sign: str = "", digits: int | None = None) -> str:
    """Return ``mean [low, high]`` with the digits of a unit. Shares are in percent. If low equals high, return the mean only.

    Args:
        unit: As in ``Metric.unit``.
        sign: ``"+"`` writes the sign of positive numbers too.
        digits: Digits after the point; default: those of the unit.

    >>> with_interval(0.123, 0.05, 0.2, "share", sign="+")
    '+12.3 [+5.0, +20.0]'
    """
    scale, digits = 100 if unit == "share" else 1, DIGITS.get(unit, 1) if digits is None else digits
    texts = [f"{scale * v:{sign}.{digits}f}" for v in (mean, low, high)]
    return texts[0] if low == high else f"{texts[0]} [{texts[1]}, {texts[2]}]"
