"""The board's metrics as statistics of resampled problems, Holm's correction over the board, and its Pareto front.

Estimates, intervals and p-values over problems and seeds are those of ``toolkit.stats.seeds``. Paired differences resample the same
problems for both; base has one result. Holm's correction is over all conditions: for the two headline metrics together, for every other
metric by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy import ndarray

from toolkit import evaluate, stats
from toolkit.methods.optimal_length import majority
from toolkit.stats import Effect, Statistic, combined, effect

__all__ = ["HEADLINE", "Effect", "Outcomes", "aes", "budgeted", "combined", "effect", "holm_corrected", "on_front", "statistics"]

HEADLINE = ("accuracy", "think_tokens")
BUDGETS = (2, 4)  # budgets of a problem, in mean responses of the base
assumed_aes = (
    1.0,
    3.0,
    5.0,
)  # weights of shorter, of more accurate and of less accurate: constants differ between papers, these are stated


# --- metrics -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcomes:
    """The main rollouts of one condition and seed as ``[problems, samples]`` arrays, problems in the base's order.

    ``answers``: index of each answer among a problem's distinct ones, -1 where none was given.
    """

    correct: ndarray
    think_tokens: ndarray
    response_tokens: ndarray
    answers: ndarray

    @staticmethod
    def of(rows: pd.DataFrame, problems: Sequence[str]) -> Outcomes:
        """From ``measure.Result.rows``, in any order of rows."""
        rows = rows.sort_values(["problem_id", "sample"]).set_index("problem_id").loc[list(problems)].reset_index()
        samples = rows["sample"].nunique()
        codes = rows.groupby("problem_id", sort=False)["answer"].transform(lambda said: pd.factorize(said)[0])
        columns = (rows["correct"], rows["think_tokens"], rows["response_tokens"], codes)
        return Outcomes(*(c.to_numpy(float).reshape(-1, samples) for c in columns))

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Problems and samples."""
        return self.correct.shape


def aes(own: Outcomes, base: Outcomes) -> Statistic:
    """Accuracy-efficiency score: ``a dL + b dA`` if accuracy rose, ``a dL - c |dA|`` if it fell, with the relative changes
    ``dL = (L_base - L) / L_base`` of think tokens and ``dA = (A - A_base) / A_base``; a, b, c are ``assumed_aes``."""
    a, b, c = assumed_aes
    means = [stats.mean_of(v) for v in (own.think_tokens, base.think_tokens, own.correct, base.correct)]

    def statistic(index: ndarray) -> ndarray:
        length, length0, right, right0 = (mean(index) for mean in means)
        gain = (right - right0) / np.where(right0 > 0, right0, np.nan)
        return a * (length0 - length) / np.where(length0 > 0, length0, np.nan) + np.where(gain >= 0, b, c) * gain

    return statistic


def quantile_of(values: ndarray, q: float) -> Statistic:
    """The q-quantile of all samples of the resampled problems."""
    return lambda index: np.quantile(values[index].reshape(len(index), -1), q, axis=1)


def budgeted(own: Outcomes, budget: float) -> tuple[ndarray, ndarray]:
    """Per problem: whether any, and whether the majority, of the responses that fit a budget of tokens is right.

    Responses are taken in order until the next would exceed ``budget`` response tokens; averaged over where the order begins, so that no
    sample counts more than another. Nothing that fits is wrong. Ties of the vote go to the answer said first,
    which that average does not leave to the numbering of samples.
    """
    n, samples = own.shape
    passed, voted = np.zeros(n), np.zeros(n)
    order = np.array([np.roll(np.arange(samples), -first) for first in range(samples)])
    for i in range(n):
        for turn in order:
            fits = turn[np.cumsum(own.response_tokens[i, turn]) <= budget]
            if not len(fits):
                continue
            passed[i] += own.correct[i, fits].max()
            said = [None if code < 0 else str(code) for code in own.answers[i, fits]]
            chosen = majority(said)
            if chosen is not None:
                voted[i] += own.correct[i, fits[said.index(chosen)]]
    return passed / samples, voted / samples


def statistics(own: Outcomes, base: Outcomes) -> dict[str, Statistic]:
    """Every metric of the main problems that is not a plain mean of a column, by name."""
    found: dict[str, Statistic] = {f"think_tokens_q{100 * q:.0f}": quantile_of(own.think_tokens, q) for q in (0.1, 0.5, 0.9)}
    for share in evaluate.SHORTEST:
        found[f"shortest_{share * 100:.0f}"] = stats.shortest_accuracy(own.correct, own.think_tokens, share)
        if base.shape[1] > 1:
            elsewhere = stats.held_out_length(base.think_tokens)
            found[f"shortest_{share * 100:.0f}_same"] = stats.shortest_accuracy(own.correct, elsewhere, share)
    for times in BUDGETS:
        passed, voted = budgeted(own, times * base.response_tokens.mean())
        found[f"pass_at_{times}x"] = stats.mean_of(passed[:, None])
        found[f"vote_at_{times}x"] = stats.mean_of(voted[:, None])
    return found


# --- the whole board ---------------------------------------------------------------------------------------------


def holm_corrected(paired: Mapping[str, Mapping[str, Effect]]) -> dict[str, dict[str, float]]:
    """Holm's correction of every p-value over all conditions; the headline metrics are one family, any other metric is its own."""
    corrected: dict[str, dict[str, float]] = {name: {} for name in paired}
    metrics = {metric for own in paired.values() for metric in own}
    families = [[m for m in HEADLINE if m in metrics], *([m] for m in sorted(metrics - set(HEADLINE)))]
    for family in families:
        where = [(name, m) for name, own in paired.items() for m in family if m in own and not math.isnan(own[m].p)]
        if not where:
            continue
        values = stats.holm(np.array([paired[name][m].p for name, m in where]))
        for (name, m), p in zip(where, values, strict=True):
            corrected[name][m] = float(p)
    return corrected


def on_front(
    accuracy: Mapping[str, ndarray], tokens: Mapping[str, ndarray], *, seed: int = 0, times: int = 1000
) -> dict[str, float]:
    """How often each condition is on the Pareto front (nobody at least as accurate and as short, and better in one) when problems and
    seeds are resampled.

    Args:
        accuracy: Condition -> ``[seeds, problems]``.
        tokens: The same of think tokens.
    """
    names = list(accuracy)
    n = next(iter(accuracy.values())).shape[1]
    weights = np.stack([np.bincount(row, minlength=n) for row in stats.resamples(n, seed=seed, times=times)]) / n
    drawn = []
    for table in (accuracy, tokens):
        rng = np.random.default_rng(seed)
        own = []
        for name in names:
            seeds = len(table[name])
            chosen = np.stack([np.bincount(row, minlength=seeds) for row in rng.integers(0, seeds, (times, seeds))]) / seeds
            own.append(np.einsum("ts,sn,tn->t", chosen, table[name], weights, optimize=True))
        drawn.append(np.stack(own))
    right, long = drawn
    front = {}
    for i, name in enumerate(names):
        as_good = (right >= right[i]) & (long <= long[i])
        beaten = as_good & ((right > right[i]) | (long < long[i]))
        front[name] = float(1 - np.any(beaten, axis=0).mean())
    return front
