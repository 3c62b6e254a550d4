"""Effect of a condition, averaged over problems and seeds, with its 95 % interval and p-value.

The whole toolkit computes effects by the rule below. A condition has S results on the same n problems. A condition with a random or
trained part has one result per seed; a deterministic condition has a single one. A statistic is a function of resampled problems, such as
the mean over problems; f_s is its value for seed s::

    estimate   mean of f_s over seeds
    B_p        variance over problems: variance of the estimate over bootstrap resamples of the problems, times n / (n - 1)
    B_s        variance over seeds: sample variance of f_s over seeds, divided by S
    h(a)       sqrt(t(1 - a/2; n - 1)^2 B_p  +  t(1 - a/2; S - 1)^2 B_s)        without the second term if S = 1
    interval   if S = 1: 2.5 and 97.5 % percentiles over the resamples; if S > 1: estimate +- h(0.05)
    p          the value of a that solves h(a) = |estimate|

t(q; d) is the quantile q of Student's t distribution with d degrees of freedom. h(a) is the half width of the interval of confidence
level 1 - a. A bootstrap of n problems gives a variance that is too small by the factor (n - 1) / n; B_p corrects this.

The variance over seeds is included because a conclusion about a *method* must hold for another seed. In h(a), each variance has its own
degrees of freedom (Banerjee, 1960, Sankhya 22). The coverage is then at least nominal. This holds for any ratio of the two variances and at
any level, including the small a that Holm's correction uses.

Satterthwaite's approximation is not used. It pools both variances, with estimated degrees of freedom. Its p-values can be too small. In our
simulation of three seeds that differ far more than the problems do (``tests/simulate_seeds.py``), its small p-values were too small by a
factor of 7.

A comparison with a random control tests the *mean* over its seeds, each a random draw. The spread of single draws enters only through
B_s, their variance divided by S, so the interval becomes narrower with more draws. An effect beyond random is thus beyond the average
draw, not beyond every draw. With many draws, an intervention that is itself one more random draw is often told apart from their mean: in
our simulation, in which draws differ as much as problems do, in 14 % of the cases with 3 draws and in 43 % with 10.

A random or trained condition with fewer than ``FEW_SEEDS`` (3) seeds has the p-value NaN. It still has an interval, and ``Effect.note``
gives the number of seeds. With one seed, the interval covers only the variation over problems.

A p-value is never 0. It is at least 2^(1 - n), the smallest p-value of an exact sign-flip test on n problems. If the results do not vary
at all, it is also at least 2 / (number of resamples + 1).
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

from toolkit.stats.estimates import NO_VARIANCE, RESAMPLES, Bounds, Estimate, Statistic, mean_where, resamples

# Smallest number of seeds for a p-value. With two seeds, the 95 % interval of their standard deviation reaches up to 32 times its estimate.
FEW_SEEDS = 3
SMALLEST = 1e-300  # lower end of the search for a p-value; close to the smallest float


@dataclass(frozen=True)
class Effect(Estimate):
    """An estimate with its 95 % interval and its two-sided p-value for the hypothesis that the true value is 0.

    Attributes:
        p: The p-value; NaN if there are too few seeds, or if the estimate is NaN.
        note: Remark on the interval or the p-value, or "". ``"1 seed"`` and ``"2 seeds"`` mean too few seeds for a p-value.
            ``"no variance"`` means that the results vary neither over problems nor over seeds, so the interval has width 0. Two remarks are
            joined by a comma.
    """

    p: float
    note: str = ""

    def within(self, bounds: Bounds) -> Effect:
        """Return a copy whose interval is clipped to the possible values of the estimated quantity, such as 0 to 1 for a share.

        Args:
            bounds: Smallest and largest possible value.
        """
        low, high = (min(max(end, bounds[0]), bounds[1]) if end == end else end for end in (self.low, self.high))  # NaN stays
        return replace(self, low=low, high=high)


def effect(seeds: Sequence[Statistic], n: int, *, seed: int = 0, times: int = RESAMPLES, seeded: bool = False) -> Effect:
    """Return the mean of a statistic over the seeds of a condition, with its 95 % interval and its p-value.

    The p-value tests whether the true value is 0. This makes sense if the statistic is a difference, such as condition minus base.
    Interval and p-value cover the variation over problems and over seeds. The module docstring of ``toolkit.stats.seeds`` has the
    equations.

    Args:
        seeds: One statistic per seed of the condition. A statistic is a function of resampled problems, such as ``mean_of(correct)``. For
            the paired difference "condition minus base", pass ``difference(f, base)`` for each seed: f is the statistic of the condition
            with this seed, ``base`` that of the base model.
        n: Number of problems.
        seed: Random seed for the resamples of problems; not a seed of the condition.
        times: Number of resamples.
        seeded: True if the condition has a random or trained part; several seeds imply it. The p-value is then NaN if there are fewer than
            ``FEW_SEEDS`` (3) seeds.

    Raises:
        ValueError: there is no statistic in ``seeds``, or n is 0.
    """
    if not seeds or n < 1:
        raise ValueError(f"{len(seeds)} seeds, {n} problems: nothing to estimate from.")
    return combine([draws(f, n, seed=seed, times=times) for f in seeds], n, seeded=seeded)


def mean_effect(
    values: Float[ndarray, "seeds problems"], minus: Float[ndarray, "one_or_seeds problems"] | None = None, *, seed: int = 0,
    times: int = RESAMPLES, seeded: bool = False,
) -> Effect:  # fmt: skip
    """Return the mean of values over problems and seeds, with its 95 % interval and its p-value for the hypothesis that it is 0.

    Interval and p-value cover the variation over problems and over seeds. The module docstring of ``toolkit.stats.seeds`` has the
    equations. If every value is NaN, so are all numbers of the effect.

    Args:
        values: One value per seed and problem, or NaN where a value is missing. A problem that is NaN for all seeds is left out.
        minus: Values to subtract, such as those of the base model; the effect is then the mean paired difference. It has one row per seed
            of ``values``, or a single row that is subtracted from all seeds. ``None`` subtracts nothing.
        seed: Random seed for the resamples of problems; not a seed of the condition.
        times: Number of resamples.
        seeded: True if the condition has a random or trained part; several seeds imply it. The p-value is then NaN if there are fewer than
            ``FEW_SEEDS`` (3) seeds.

    >>> change = mean_effect(np.array([[-20.0, -35.0, -5.0, -28.0, -12.0]]))  # tokens, 5 problems, 1 seed
    >>> print(change, f"p = {change.p:.3f}")
    -20 [-29, -10.8] p = 0.062
    """
    rows = values if minus is None else values - minus
    rows = rows[:, ~np.isnan(rows).all(axis=0)]
    if not rows.size:
        return Effect(math.nan, math.nan, math.nan, math.nan)
    return effect(
        [mean_where(row[:, None], ~np.isnan(row)[:, None]) for row in rows], rows.shape[1], seed=seed, times=times, seeded=seeded
    )


class Draws(NamedTuple):
    """Values of a statistic (such as the accuracy) for one seed of a condition: on all problems, and on each bootstrap resample of them.

    Attributes:
        estimate: Value on all problems.
        resampled: Value on each resample, ``[times]``, where ``times`` is the number of resamples.
    """

    estimate: float
    resampled: ndarray


def draws(statistic: Statistic, n: int, *, seed: int = 0, times: int = RESAMPLES) -> Draws:
    """Return the values of a statistic (such as the accuracy) on all n problems and on each bootstrap resample of them.

    Args:
        statistic: Function from problem indices ``[times, n]``, one resample per row, to values ``[times]``.
        n: Number of problems.
        seed: Random seed for the resamples.
        times: Number of resamples.
    """
    return Draws(float(statistic(np.arange(n)[None])[0]), statistic(resamples(n, seed=seed, times=times)))


def combine(seeds: Sequence[Draws], n: int, *, minus: Draws | None = None, seeded: bool = False) -> Effect:
    """Return the mean of a statistic over the seeds of a condition, with its 95 % interval and its p-value for the hypothesis that it is 0.

    The result equals that of ``effect``, which takes statistics. Here the function ``draws`` has already evaluated them on all resamples.
    So several comparisons can share these values.

    Args:
        seeds: Values of the statistic, one ``Draws`` per seed of the condition.
        n: Number of problems.
        minus: Values of the base model on the same resamples, which are subtracted from those of every seed. The effect is then the paired
            difference, condition minus base. ``None`` subtracts nothing.
        seeded: True if the condition has a random or trained part; several seeds imply it. The p-value is then NaN if there are fewer than
            ``FEW_SEEDS`` (3) seeds.
    """
    centres = np.array([d.estimate for d in seeds]) - (minus.estimate if minus else 0.0)
    resampled = np.mean([d.resampled for d in seeds], axis=0) - (minus.resampled if minus else 0.0)
    return _combine(centres, resampled, n, seeded)


def _combine(centres: ndarray, resampled: ndarray, n: int, seeded: bool) -> Effect:
    centre, seeds = float(centres.mean()), len(centres)
    if math.isnan(centre):
        return Effect(math.nan, math.nan, math.nan, math.nan)
    by_problem = float(np.nanvar(resampled)) * n / max(n - 1, 1)  # B_p and B_s of the module docstring
    by_seed = float(centres.var(ddof=1)) / seeds if seeds > 1 else 0.0
    few = f"{seeds} seed{'s' * (seeds > 1)}" if (seeded or seeds > 1) and seeds < FEW_SEEDS else ""
    # No variance, up to rounding (averages of equal numbers may differ in the last digits). An effect of exactly 0 gets p = 1. Any other
    # gets the larger of the two lower limits on p; -1000 keeps the power of 2 above 0.
    if math.sqrt(by_problem + by_seed) <= 1e-12 * max(abs(centre), float(np.abs(centres).max())):
        p = max(2.0 ** max(1 - n, -1000), min(1.0, 2 / (len(resampled) + 1))) if centre else 1.0
        return Effect(centre, centre, centre, math.nan if few else p, ", ".join(filter(None, (few, NO_VARIANCE))))
    if seeds == 1:
        low, high = np.nanquantile(resampled, [0.025, 0.975])
    else:
        half = float(half_width(0.05, by_problem, by_seed, n, seeds))
        low, high = centre - half, centre + half
    return Effect(centre, float(low), float(high), math.nan if few else _p(abs(centre), by_problem, by_seed, n, seeds), few)


def half_width(
    alpha: float | ndarray, by_problem: float | ndarray, by_seed: float | ndarray, n: int, seeds: int
) -> float | ndarray:
    """Return the half width h(alpha) of the confidence interval of level 1 - alpha. Arrays are treated elementwise.

    With t(q; d) the quantile q of Student's t distribution with d degrees of freedom::

        h(alpha)^2 = t(1 - alpha/2; n - 1)^2 by_problem + t(1 - alpha/2; seeds - 1)^2 by_seed

    Args:
        alpha: 1 minus the confidence level: 0.05 for a 95 % interval.
        by_problem: Variance of the estimate over problems.
        by_seed: Variance of the estimate over seeds. With a single seed the second term is 0, whatever this value.
        n: Number of problems. If it is 1, the first term has 1 degree of freedom.
        seeds: Number of seeds.
    """
    problems = _times_quantile(by_problem, alpha, max(n - 1, 1))
    return np.hypot(problems, _times_quantile(by_seed, alpha, seeds - 1)) if seeds > 1 else problems


def _times_quantile(variance: float | ndarray, alpha: float | ndarray, freedom: int) -> ndarray:
    """Return t(1 - alpha/2; freedom) times the square root of a variance; 0 where the variance is 0, NaN where it is NaN."""
    # stdtrit(d, q) is the quantile q of Student's t with d degrees of freedom. The size of the lower one is exact for tiny alpha too. For
    # some d and the tiniest alpha it is infinite, of either sign, and infinity times 0 is NaN.
    with np.errstate(invalid="ignore"):
        size = np.abs(special.stdtrit(freedom, np.asarray(alpha) / 2)) * np.sqrt(variance)
    return np.where(np.asarray(variance) == 0, 0.0, size)


def _p(size: float, by_problem: float, by_seed: float, n: int, seeds: int) -> float:
    """Return the p-value: the value of alpha at which the half width h(alpha) of the interval equals ``size``, the absolute estimate.

    The p-value is at least 2^(1 - n), the smallest p-value of a sign-flip test on n problems. ``half_width`` defines h and the other
    arguments.
    """
    least = 2.0 ** max(1 - n, -1000)  # smallest p-value of a sign-flip test on n problems; -1000 keeps it above 0
    if not by_seed:
        return max(least, float(2 * scipy_stats.t.sf(size / math.sqrt(by_problem), max(n - 1, 1))))

    def short_of(log_p: float) -> float:
        return size - float(half_width(math.exp(log_p), by_problem, by_seed, n, seeds))

    # The half width falls from infinity to 0 as alpha rises to 1. Search for the root on the log scale, since p can be tiny. The search
    # begins at the smallest p-value: below it, quantiles can be NaN, as when PyTorch flushes denormal numbers to 0.
    smallest = max(least, SMALLEST)
    low = math.log(smallest)
    if short_of(low) >= 0:
        return smallest
    return max(least, math.exp(optimize.brentq(short_of, low, 0.0, xtol=1e-10)))
