"""The one combination and the one text cell: metrics of conditions over problems and seeds, beside base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolkit import stats
from toolkit.metrics.outcomes import Outcomes
from toolkit.metrics.table import METRICS, described
from toolkit.stats import RESAMPLES, Draws, Effect

DIGITS: Mapping[str, int] = {"score": 2, "nats": 3, "number": 2}
"""Unit -> digits after the point; any other unit has one. Shares are shown in percent."""


@dataclass(frozen=True)
class Judged:
    """One metric of one condition: its estimate, and its paired difference to base."""

    own: Effect
    change: Effect

    def bounded(self, name: str, base: Effect) -> Judged:
        """Return the same with intervals that end where the quantity and its change can: see ``Metric.change_bounds``.

        Args:
            base: Base's own estimate.
        """
        metric = described(name)
        change = self.change if metric.against_base else self.change.within(metric.change_bounds(base))
        return Judged(self.own.within(metric.bounds), change)


@dataclass(frozen=True)
class Judge:
    """Compares conditions with base on the same resampled problems.

    Attributes:
        base: Outcomes of base.
        draws: Metric -> base's draws, in the order in which metrics are returned.
        seed: Seed of the resamples.
        times: Number of resamples.
    """

    base: Outcomes
    draws: Mapping[str, Draws]
    seed: int
    times: int

    @staticmethod
    def of(base: Outcomes, names: Sequence[str], *, seed: int = 0, times: int = RESAMPLES) -> Judge:
        """Return a judge by these metrics; one that needs more samples than base has is left out."""
        statistics = {name: how(base, base) for name in names if (how := METRICS[name].how)}
        n = base.shape[0]
        return Judge(base, {k: stats.draws(f, n, seed=seed, times=times) for k, f in statistics.items() if f}, seed, times)

    def judged(self, seeds: Sequence[Outcomes], *, seeded: bool = False) -> dict[str, Judged]:
        """Return every metric of a condition.

        Args:
            seeds: Its outcomes, one per seed.
            seeded: Whether the condition is random or trained, see ``stats.effect``.
        """
        n, judged = self.base.shape[0], dict[str, Judged]()
        for name, of_base in self.draws.items():
            how = METRICS[name].how
            statistics = [how(own, self.base) for own in seeds] if how else []
            drawn = [stats.draws(f, n, seed=self.seed, times=self.times) for f in statistics if f]
            own = stats.combine(drawn, n, seeded=seeded)
            change = own if METRICS[name].against_base else stats.combine(drawn, n, minus=of_base, seeded=seeded)
            judged[name] = Judged(own, change)
        return judged


def cell(
    name: str, own: Mapping[str, float], change: Mapping[str, float] | None = None, *, star: bool = False, note: str = ""
) -> str:
    """Return a metric as text: the mean, and in brackets the paired difference to base with its interval; shares in percent.

    Args:
        own: ``mean, low, high`` of the condition.
        change: ``mean, low, high`` of the difference; ``None`` shows the condition's own interval.
        star: Whether the difference is marked.
        note: Why it is not judged, or that nothing varies.

    >>> cell("accuracy", {"mean": 0.5, "low": 0.4, "high": 0.6}, {"mean": 0.1, "low": 0.05, "high": 0.15}, star=True)
    '50.0* (+10.0 [+5.0, +15.0])'
    """
    metric = described(name)
    mean = with_interval(own["mean"], own["mean"], own["mean"], metric.unit) + "*" * star
    if metric.against_base:
        return mean + (f" ({note})" if note else "")
    if change is None:
        return mean + with_interval(own["mean"], own["low"], own["high"], metric.unit)[len(mean) - star :]
    return f"{mean} ({with_interval(change['mean'], change['low'], change['high'], metric.unit, sign='+')}{f', {note}' if note else ''})"


def with_interval(mean: float, low: float, high: float, unit: str, *, sign: str = "", digits: int | None = None) -> str:
    """Return ``mean [low, high]`` with the digits of a unit, shares in percent; without the bracket where nothing varies.

    Args:
        digits: After the point; default: those of the unit.

    >>> with_interval(0.123, 0.05, 0.2, "share", sign="+")
    '+12.3 [+5.0, +20.0]'
    """
    scale, digits = 100 if unit == "share" else 1, DIGITS.get(unit, 1) if digits is None else digits
    texts = [f"{scale * v:{sign}.{digits}f}" for v in (mean, low, high)]
    return texts[0] if low == high else f"{texts[0]} [{texts[1]}, {texts[2]}]"
