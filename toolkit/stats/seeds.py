"""An effect over problems and seeds: estimate, 95 % interval and p-value. The one rule of the toolkit; the board, masking and results use it.

A condition has S results (seeds of what is random or trained in it; one for a deterministic condition) on the same n problems. For a
statistic f (a mean over problems, or anything else of resampled problems), with f_s of seed s::

    estimate   mean_s f_s
    B_p        n / (n - 1) x var over resampled problems of mean_s f_s
    B_s        var_s(f_s) / S
    h(a)       sqrt(t(1 - a/2; n - 1)^2 B_p  +  t(1 - a/2; S - 1)^2 B_s)
    interval   S = 1: percentiles of the resampled problems; S > 1: estimate +- h(.05)
    p          the a at which h(a) = |estimate|

The seeds' variance is added because a conclusion about a *method* must hold for another seed. Each variance keeps its own degrees of
freedom (Banerjee, 1960, Sankhya 22): the interval then covers at least at its level, for any ratio of the two variances and at any level,
also at the small ones that Holm's correction reads. Satterthwaite's approximation, which pools the two into estimated degrees of freedom,
does not: with three seeds that differ far more than problems do it is wrong there by a factor of 7 (``tests/simulate_seeds.py``).

Below ``FEW_SEEDS`` seeds of what is random or trained there is no p-value: the interval stands, and ``note`` says how many seeds it is of
(of one seed it is over problems alone). A p-value is never 0: it is at least the smallest p of an exact sign-flip test of n problems,
2^(1 - n), and where nothing varies it is at least what the resamples can tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import optimize, special
from scipy import stats as scipy_stats

from toolkit.stats.estimates import RESAMPLES, Bounds, Estimate, Statistic, resamples

FEW_SEEDS = 3  # seeds from which on a p-value is given: two know their spread to a factor of 30 at best
NO_VARIANCE = "no variance"
SMALLEST = 1e-300  # p-values are searched for above it


@dataclass(frozen=True)
class Effect(Estimate):
    """An estimate with its 95 % interval and two-sided p-value against 0.

    Attributes:
        p: NaN where it is not judged.
        note: Why it is not judged (``"2 seeds"``), or that the interval has no width because nothing varies (``"no variance"``).
    """

    p: float
    note: str = ""

    def within(self, bounds: Bounds) -> Effect:
        """The same estimate with an interval that ends where the quantity does. It is cut, not transformed: a share of 0 or a
        difference of -100 points is possible, and has no logit."""
        low, high = (min(max(end, bounds[0]), bounds[1]) if end == end else end for end in (self.low, self.high))
        return replace(self, low=low, high=high)


def effect(seeds: Sequence[Statistic], n: int, *, seed: int = 0, times: int = RESAMPLES, seeded: bool = False) -> Effect:
    """The mean over seeds of a statistic of n problems; see the module's equations.

    Args:
        seeds: The statistic of each seed, or of each seed minus base.
        seeded: Whether the condition is random or trained, so that a single result is one seed of many.

    Raises:
        ValueError: no seed or no problem.
    """
    if not seeds or n < 1:
        raise ValueError(f"{len(seeds)} seeds, {n} problems: nothing to estimate from.")
    return combine([draws(f, n, seed=seed, times=times) for f in seeds], n, seeded=seeded)


def mean_effect(
    values: Float[ndarray, "seeds problems"], minus: Float[ndarray, "one_or_seeds problems"] | None = None, *, seed: int = 0,
    times: int = RESAMPLES, seeded: bool = False,
) -> Effect:  # fmt: skip
    """Return the effect of the mean over problems of one value per seed and problem; see the module's equations.

    Args:
        values: NaN where a problem has no value. A problem without any value does not count.
        minus: Values to subtract problem by problem, such as base's: a paired difference. One row serves all seeds.
        seeded: As in :func:`effect`.

    Returns:
        NaN throughout if no problem has a value.
    """
    rows = values if minus is None else values - minus
    rows = rows[:, ~np.isnan(rows).all(axis=0)]
    if not rows.size:
        return Effect(math.nan, math.nan, math.nan, math.nan)
    return effect([_mean(row) for row in rows], rows.shape[1], seed=seed, times=times, seeded=seeded)


def _mean(values: Float[ndarray, " problems"]) -> Statistic:
    """Mean over the resampled problems that have a value."""
    present = ~np.isnan(values)
    filled = np.where(present, values, 0.0)

    def statistic(index: ndarray) -> ndarray:
        with np.errstate(invalid="ignore"):
            return filled[index].sum(axis=1) / present[index].sum(axis=1)

    return statistic


class Draws(NamedTuple):
    """A statistic of one seed: its estimate, and its values ``[times]`` on the resampled problems."""

    estimate: float
    resampled: ndarray


def draws(statistic: Statistic, n: int, *, seed: int = 0, times: int = RESAMPLES) -> Draws:
    """Evaluate a statistic of n problems on all of them and on every resample."""
    return Draws(float(statistic(np.arange(n)[None])[0]), statistic(resamples(n, seed=seed, times=times)))


def combine(seeds: Sequence[Draws], n: int, *, minus: Draws | None = None, seeded: bool = False) -> Effect:
    """Combine the draws of each seed into an effect.

    Args:
        minus: Draws of base on the same resampled problems: the effect is then the paired difference to base.
        seeded: As in :func:`effect`.
    """
    centres = np.array([d.estimate for d in seeds]) - (minus.estimate if minus else 0.0)
    resampled = np.mean([d.resampled for d in seeds], axis=0) - (minus.resampled if minus else 0.0)
    return _combine(centres, resampled, n, seeded)


def _combine(centres: ndarray, resampled: ndarray, n: int, seeded: bool) -> Effect:
    centre, seeds = float(centres.mean()), len(centres)
    if math.isnan(centre):
        return Effect(math.nan, math.nan, math.nan, math.nan)
    by_problem = float(np.nanvar(resampled)) * n / max(n - 1, 1)
    by_seed = float(centres.var(ddof=1)) / seeds if seeds > 1 else 0.0
    few = f"{seeds} seed{'s' * (seeds > 1)}" if (seeded or seeds > 1) and seeds < FEW_SEEDS else ""
    # Equal numbers differ by rounding once they were averaged.
    if math.sqrt(by_problem + by_seed) <= 1e-12 * max(abs(centre), float(np.abs(centres).max())):
        p = max(2.0 ** max(1 - n, -1000), min(1.0, 2 / (len(resampled) + 1))) if centre else 1.0
        return Effect(centre, centre, centre, math.nan if few else p, ", ".join(filter(None, (few, NO_VARIANCE))))
    if seeds == 1:
        low, high = np.nanquantile(resampled, [0.025, 0.975])
    else:
        reach = float(half_width(0.05, by_problem, by_seed, n, seeds))
        low, high = centre - reach, centre + reach
    return Effect(centre, float(low), float(high), math.nan if few else _p(abs(centre), by_problem, by_seed, n, seeds), few)


def half_width(
    alpha: float | ndarray, by_problem: float | ndarray, by_seed: float | ndarray, n: int, seeds: int
) -> float | ndarray:
    """h(alpha) of the module's equations, elementwise; the problems count as two at least, and one seed adds nothing."""
    problems = -special.stdtrit(max(n - 1, 1), np.asarray(alpha) / 2) * np.sqrt(by_problem)
    return np.hypot(problems, -special.stdtrit(seeds - 1, np.asarray(alpha) / 2) * np.sqrt(by_seed)) if seeds > 1 else problems


def _p(size: float, by_problem: float, by_seed: float, n: int, seeds: int) -> float:
    least = 2.0 ** max(1 - n, -1000)
    if not by_seed:
        return max(least, float(2 * scipy_stats.t.sf(size / math.sqrt(by_problem), max(n - 1, 1))))

    def short_of(log_p: float) -> float:
        return size - float(half_width(math.exp(log_p), by_problem, by_seed, n, seeds))

    low = math.log(SMALLEST)
    if short_of(low) >= 0:
        return max(least, SMALLEST)
    return max(least, math.exp(optimize.brentq(short_of, low, 0.0, xtol=1e-10)))
