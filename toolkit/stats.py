"""Statistics: paired bootstrap over problems, correlations, scores of predictions, lengths against targets.

Arrays of outcomes are ``[problems, samples]``; intervals are percentile intervals over resampled *problems* (the unit that
repeats), with every sample of a problem kept together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import stats as scipy_stats

RESAMPLES = 2000
BLOCK = 2**20  # numbers held at a time while correlations are resampled: 8 MB an array


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval (95 % unless said otherwise)."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def resamples(n: int, *, seed: int = 0, times: int = RESAMPLES) -> ndarray:
    """Indices ``[times, n]`` of problems drawn with replacement; the same for the same seed, so that pairs stay pairs."""
    return np.random.default_rng(seed).integers(0, n, (times, n))


def bootstrap(
    statistic: Callable[[ndarray], ndarray], n: int, *, seed: int = 0, times: int = RESAMPLES, level: float = 0.95
) -> Estimate:
    """Percentile interval of ``statistic`` under resampling of n problems.

    Args:
        statistic: ``[rows, n]`` problem indices -> ``[rows]`` values.
    """
    if n == 0:
        raise ValueError("No problems to estimate from.")
    centre = float(statistic(np.arange(n)[None])[0])
    low, high = np.quantile(statistic(resamples(n, seed=seed, times=times)), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(centre, float(low), float(high))


def mean_of(values: Float[ndarray, "problems samples"]) -> Callable[[ndarray], ndarray]:
    """Statistic: the mean over resampled problems of the per-problem mean."""
    per_problem = np.asarray(values, dtype=float).mean(axis=1)
    return lambda index: per_problem[index].mean(axis=1)


def over_problems(values: Sequence[float] | ndarray, problems: Sequence[str] | ndarray, *, seed: int = 0) -> Estimate:
    """Mean over problems of each problem's mean, from one value and one problem a row. ValueError without rows."""
    names, which = np.unique(np.asarray(problems, dtype=str), return_inverse=True)
    per_problem = np.bincount(which, np.asarray(values, dtype=float)) / np.bincount(which)
    return bootstrap(mean_of(per_problem[:, None]), len(names), seed=seed)


def difference(a: Callable[[ndarray], ndarray], b: Callable[[ndarray], ndarray]) -> Callable[[ndarray], ndarray]:
    """Statistic: a minus b on the same resampled problems (paired)."""
    return lambda index: a(index) - b(index)


def shortest_accuracy(
    correct: Float[ndarray, "problems samples"], ranking: Float[ndarray, "problems samples"], share: float
) -> Callable[[ndarray], ndarray]:
    """Statistic: accuracy of the shortest ``share`` of responses (ThinkEdit, arXiv 2503.22048).

    For each sample index separately the problems are sorted by ``ranking`` (tokens), the first ``floor(share * n)``
    are kept, and accuracy over them is averaged over the sample indices. At least one response is kept.

    ``ranking`` is the model's own think length as published; for the selection-free form see :func:`held_out_length`.
    """

    def statistic(index: ndarray) -> ndarray:
        keep = max(1, int(share * index.shape[1]))
        columns = []
        for s in range(correct.shape[1]):
            order = np.argsort(ranking[index, s], axis=1, kind="stable")[:, :keep]
            columns.append(np.take_along_axis(correct[index, s], order, axis=1).mean(axis=1))
        return np.mean(columns, axis=0)

    return statistic


def held_out_length(lengths: Float[ndarray, "problems samples"]) -> Float[ndarray, "problems samples"]:
    """For sample s, the problem's mean length over its *other* samples.

    Ranking by it picks the problems a model tends to think briefly about, without looking at the sample that is then
    judged; ranking every model by the base model's picks the same problems for all.
    """
    lengths = np.asarray(lengths, dtype=float)
    samples = lengths.shape[1]
    if samples < 2:
        raise ValueError("The selection-free shortest accuracy needs at least 2 samples a problem.")
    return (lengths.sum(axis=1, keepdims=True) - lengths) / (samples - 1)


def spearman(x: Sequence[float] | ndarray, y: Sequence[float] | ndarray) -> float:
    """Spearman's rank correlation; NaN (undefined) if either side is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(scipy_stats.spearmanr(x, y).statistic)


def auc(truth: ndarray, score: ndarray) -> float:
    """Chance that a true case scores above a false one, ties counting half; NaN (undefined) if one kind is missing."""
    truth = np.asarray(truth, bool)
    pos, neg = truth.sum(), (~truth).sum()
    if not pos or not neg:
        return math.nan
    ranks = scipy_stats.rankdata(score)
    return float((ranks[truth].sum() - pos * (pos + 1) / 2) / (pos * neg))


def balanced_accuracy(truth: ndarray, predicted: ndarray) -> float:
    """Mean of the shares of true and of false cases told right: chance is 0.5 whatever the balance. NaN if one is missing."""
    truth, predicted = np.asarray(truth, bool), np.asarray(predicted, bool)
    if truth.all() or not truth.any():
        return math.nan
    return float((predicted[truth].mean() + (~predicted[~truth]).mean()) / 2)


def r_squared(truth: ndarray, predicted: ndarray) -> float:
    """Share of variance explained, 1 - SSE / SST; negative where the mean would do better, NaN if the truth is constant."""
    spread = np.square(truth - np.mean(truth)).sum()
    return float(1 - np.square(truth - predicted).sum() / spread) if spread > 0 else math.nan


def holm(p: Float[ndarray, " tests"]) -> Float[ndarray, " tests"]:
    """Holm's correction: p-values that keep the chance of any false alarm over all the tests below the level they are read at."""
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))))
    return corrected


def looping(tokens: Sequence[int], *, longest_period: int = 64, repeats: int = 4) -> bool:
    """Whether a response ends in the same run of tokens at least ``repeats`` times (ours; at least 16 tokens in all)."""
    n = len(tokens)
    for period in range(1, min(longest_period, n // repeats) + 1):
        span = max(period * repeats, 16)
        if span <= n and all(tokens[i] == tokens[i - period] for i in range(n - span + period, n)):
            return True
    return False


# --- lengths against targets (Ruler, arXiv:2409.18943) -------------------------------------------------------

Number = float | int
Ranges = Mapping[Number, tuple[Number, Number]]
"""Target length -> ``(low, high)``: a length hits it iff ``low < length <= high``. An infinite ``high`` is "more than"."""

# The published tables, in words; 800 stands for ">800".
RULER_PRECISE: Ranges = {
    10: (0, 20), 30: (20, 40), 50: (40, 60), 80: (70, 90), 150: (130, 170),
    300: (280, 320), 500: (450, 550), 700: (630, 770), 800: (800, math.inf),
}  # fmt: skip
RULER_FLEXIBLE: Ranges = {
    10: (0, 20), 30: (20, 40), 50: (40, 60), 80: (60, 100), 150: (100, 200),
    300: (200, 400), 500: (400, 600), 700: (600, 800), 800: (800, math.inf),
}  # fmt: skip
RULER_LEVELS: Mapping[str, tuple[Number, ...]] = {"level 0": (10, 30, 50, 80), "level 1": (150, 300, 500), "level 2": (700, 800)}
assumed_precise, assumed_flexible = 0.1, 0.2  # +- share of a target of one's own: ours (as published at 500 words)


def words(text: str) -> int:
    """Length in words as Ruler counts them: runs of letters, digits and underscores."""
    return len(re.findall(r"\w+", text))


def ranges_around(targets: Sequence[Number], share: float) -> Ranges:
    """Ranges ``(T - share T, T + share T]`` for targets of one's own, in any unit (ours; Ruler has fixed tables)."""
    if not 0 < share <= 1 or any(t <= 0 for t in targets):
        raise ValueError(f"share={share}, targets={list(targets)}: need 0 < share <= 1 and positive targets.")
    return {t: (t - share * t, t + share * t) for t in targets}


def hits(lengths: Sequence[Number] | ndarray, targets: Sequence[Number] | ndarray, ranges: Ranges) -> ndarray:
    """Whether each length hits its own target: ``low < length <= high``; same units as ``ranges``.

    Raises:
        KeyError: a target without a range.
    """
    if missing := sorted({float(t) for t in targets} - {float(t) for t in ranges}):
        known = ", ".join(f"{t:g}" for t in ranges)
        raise KeyError(f"No range for the targets {missing}: there are {known}. Make your own with ranges_around(targets, share).")
    low, high = np.array([ranges[t] for t in np.asarray(targets, float).tolist()], float).reshape(-1, 2).T
    return (low < np.asarray(lengths, float)) & (np.asarray(lengths, float) <= high)


@dataclass(frozen=True)
class LengthMatch:
    """How well lengths match their targets: percentages of ``n`` responses, and the root mean square error.

    ``precise`` and ``flexible`` are Ruler's PM and FM. ``exact`` and ``rmse`` leave open targets (">800") out, and are NaN where
    nothing else is left.
    """

    n: int
    precise: float
    flexible: float
    exact: float
    rmse: float


def length_match(
    lengths: Sequence[Number] | ndarray,
    targets: Sequence[Number] | ndarray,
    *,
    precise: Ranges = RULER_PRECISE,
    flexible: Ranges = RULER_FLEXIBLE,
    levels: Mapping[str, Sequence[Number]] = RULER_LEVELS,
) -> dict[str, LengthMatch]:
    """Ruler's report: hit rates per target (``"10"``, ``">800"``), per level, and over ``"all"`` responses.

    Published in words with the published tables. In tokens or with targets of one's own (ours): pass ``precise`` and ``flexible``
    from :func:`ranges_around`, with ``assumed_precise`` and ``assumed_flexible``, and levels of your own or ``{}``.
    """
    n, t = np.asarray(lengths, float), np.asarray(targets, float)
    if not len(n) or n.shape != t.shape:
        raise ValueError(f"{len(n)} lengths and {len(t)} targets: need one target for each of at least one length.")
    pm, fm = hits(n, t, precise), hits(n, t, flexible)
    is_open = np.isinf([precise[x][1] for x in t.tolist()])

    def over(rows: ndarray) -> LengthMatch:
        error = (n - t)[rows & ~is_open]
        exact, rmse = (100 * (error == 0).mean(), np.sqrt(np.square(error).mean())) if len(error) else (math.nan, math.nan)
        return LengthMatch(int(rows.sum()), 100 * float(pm[rows].mean()), 100 * float(fm[rows].mean()), float(exact), float(rmse))

    groups = {f">{x:g}" if math.isinf(precise[x][1]) else f"{x:g}": t == x for x in sorted(set(t.tolist()))}
    groups |= {name: np.isin(t, list(members)) for name, members in levels.items()}
    return {name: over(rows) for name, rows in (groups | {"all": np.ones(len(t), bool)}).items() if rows.any()}


# --- correlation of rows that repeat within problems ---------------------------------------------------------


def correlation(
    x: Sequence[float] | ndarray,
    y: Sequence[float] | ndarray,
    groups: Sequence[str] | ndarray,
    *,
    kind: str = "pearson",
    within: bool = False,
    times: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Correlation of two columns of rows, with a 95 % interval over problems: a resampled problem brings all its rows.

    Args:
        groups: Problem of each row.
        kind: ``"pearson"`` or ``"spearman"`` (Pearson's of mid-ranks).
        within: Subtract each problem's means first, so that how hard a problem is drops out; problems with one row do too.

    NaN (undefined) if either side is constant; resamples for which it is are left out of the interval.

    Raises:
        ValueError: an unknown kind, columns of different length, or no problem with two rows to compare within.
    """
    if kind not in ("pearson", "spearman"):
        raise ValueError(f"kind={kind!r}: choose pearson or spearman.")
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    names, which = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if not len(a) == len(b) == len(which):
        raise ValueError(f"{len(a)} x, {len(b)} y and {len(which)} groups: need one of each a row.")
    if within:
        repeated = np.bincount(which)[which] > 1
        if not repeated.any():
            raise ValueError(f"None of the {len(names)} problems has two rows to compare within: sample more than once a problem.")
        names, which = np.unique(which[repeated], return_inverse=True)
        a, b = (_centred(values[repeated], which) for values in (a, b))
    if not len(names):
        raise ValueError("No rows to correlate.")
    columns = [_weighted_ranks(v) if kind == "spearman" else lambda weights, v=v: v[None] for v in (a, b)]

    def over(index: ndarray) -> ndarray:
        weights = np.array([np.bincount(row, minlength=len(names)) for row in index], dtype=float)[:, which]
        x_of, y_of = columns
        return _weighted_pearson(x_of(weights), y_of(weights), weights)

    index, block = resamples(len(names), seed=seed, times=times), max(1, BLOCK // len(a))
    centre = float(over(np.arange(len(names))[None])[0])
    draws = np.concatenate([over(index[i : i + block]) for i in range(0, times, block)])
    if math.isnan(centre) or np.isnan(draws).all():
        return Estimate(centre, math.nan, math.nan)
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return Estimate(centre, float(low), float(high))


def _centred(values: ndarray, which: ndarray) -> ndarray:
    """Values minus their group's mean, rounded so that equal ones stay equal: ranks and constants depend on it."""
    residual = values - (np.bincount(which, values) / np.bincount(which))[which]
    scale = np.abs(values).max()
    return np.round(residual / scale, 12) if scale > 0 else residual


def _weighted_ranks(values: ndarray) -> Callable[[ndarray], ndarray]:
    """Mid-ranks ``[times, rows]`` of rows that each count ``weights`` (``[times, rows]``) times, sorted once for all weights."""
    _, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))

    def ranks(weights: ndarray) -> ndarray:
        count = np.add.reduceat(weights[:, order], starts, axis=1)
        return (count.cumsum(axis=1) - (count - 1) / 2)[:, place]

    return ranks


def _weighted_pearson(a: ndarray, b: ndarray, weights: ndarray) -> ndarray:
    """One coefficient for each of the ``weights`` (``[times, rows]``); NaN where the rows that count are constant."""
    used, total = weights > 0, weights.sum(axis=1, keepdims=True)
    varies = [np.where(used, v, -np.inf).max(axis=1) > np.where(used, v, np.inf).min(axis=1) for v in (a, b)]
    da, db = (v - (weights * v).sum(axis=1, keepdims=True) / total for v in (a, b))
    spread = np.sqrt((weights * da * da).sum(axis=1) * (weights * db * db).sum(axis=1))
    return np.divide((weights * da * db).sum(axis=1), spread, out=np.full(len(weights), np.nan), where=varies[0] & varies[1])
