"""Outcomes of one condition as ``[problems, samples]`` arrays, and every metric that is computed from them.

A metric is a function of a condition's outcomes and base's; it returns a ``stats.Statistic``: problem indices ``[times, n]`` to values
``[times]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from toolkit import stats
from toolkit.methods.optimal_length import majority
from toolkit.stats import Statistic

assumed_aes = (1.0, 3.0, 5.0)
"""Weights of shorter, of more accurate and of less accurate: constants differ between papers, these are stated (ours)."""


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Outcomes of one condition and seed, problems in the order of base's.

    Attributes:
        correct: 1 for a right answer.
        think_tokens: Length of the think span in tokens.
        response_tokens: Length of the response in tokens.
        closed: 1 if the think span was closed.
        looping: 1 if the response ends in a repeated run of tokens.
        answers: Index of each answer among the problem's distinct ones, -1 where none was given.
    """

    correct: Float[ndarray, "problems samples"]
    think_tokens: Float[ndarray, "problems samples"]
    response_tokens: Float[ndarray, "problems samples"]
    closed: Float[ndarray, "problems samples"]
    looping: Float[ndarray, "problems samples"]
    answers: Float[ndarray, "problems samples"]

    @staticmethod
    def of(rows: pd.DataFrame, problems: Sequence[str]) -> Outcomes:
        """Return the outcomes of these problems from one row per rollout, in any order.

        Args:
            rows: Columns of ``evaluate.table``; ``answer`` is optional (without it every answer counts as missing).
        """
        rows = rows.sort_values(["problem_id", "sample"]).set_index("problem_id").loc[list(problems)].reset_index()
        samples = rows["sample"].nunique()
        codes = pd.Series(-1.0, rows.index)
        if "answer" in rows:
            codes = rows.groupby("problem_id", sort=False)["answer"].transform(lambda answers: pd.factorize(answers)[0])
        columns = {name: rows[name] for name in ("correct", "think_tokens", "response_tokens", "closed", "looping")}
        return Outcomes(**{k: v.to_numpy(float).reshape(-1, samples) for k, v in {**columns, "answers": codes}.items()})

    @property
    def shape(self) -> tuple[int, int]:
        """Number of problems and of samples per problem."""
        return self.correct.shape


How = Callable[[Outcomes, Outcomes], Statistic | None]
"""Outcomes of a condition and of base to a statistic, or ``None`` if there are too few samples for it."""


def mean_of(column: str) -> How:
    """Mean of a column over problems and samples."""
    return lambda own, base: stats.mean_of(getattr(own, column))


def quantile_of(column: str, q: float) -> How:
    """The q-quantile of a column over all samples of the resampled problems."""

    def how(own: Outcomes, base: Outcomes) -> Statistic:
        values = getattr(own, column)
        return lambda index: np.quantile(values[index].reshape(len(index), -1), q, axis=1)

    return how


def shortest(share: float) -> How:
    """Accuracy of the condition's own shortest responses, as published (ThinkEdit, arXiv 2503.22048); the set differs between models."""
    return lambda own, base: stats.shortest_accuracy(own.correct, own.think_tokens, share)


def shortest_of_base(share: float) -> How:
    """Accuracy on the problems where *base* thinks least, chosen on other samples than the one judged: the same problems for every
    condition, free of selection."""

    def how(own: Outcomes, base: Outcomes) -> Statistic | None:
        if base.shape[1] < 2:
            return None
        return stats.shortest_accuracy(own.correct, stats.held_out_length(base.think_tokens), share)

    return how


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


def passed(times: int) -> How:
    """Share of problems with a right answer among the responses that fit ``times`` x base's mean response tokens."""
    return lambda own, base: stats.mean_of(budgeted(own, times * base.response_tokens.mean())[0][:, None])


def voted(times: int) -> How:
    """Share of problems whose majority answer is right among the responses that fit ``times`` x base's mean response tokens."""
    return lambda own, base: stats.mean_of(budgeted(own, times * base.response_tokens.mean())[1][:, None])


def budgeted(own: Outcomes, budget: float) -> tuple[Float[ndarray, " problems"], Float[ndarray, " problems"]]:
    """Return per problem whether any, and whether the majority, of the responses that fit a budget of tokens is right.

    Responses are taken in order until the next would exceed ``budget`` response tokens. Both are averaged over where the order begins, so
    that no sample counts more than another. If nothing fits, the problem is wrong. A tied vote goes to the answer given first.
    """
    n, samples = own.shape
    any_right, majority_right = np.zeros(n), np.zeros(n)
    order = np.array([np.roll(np.arange(samples), -first) for first in range(samples)])
    for i in range(n):
        for turn in order:
            fits = turn[np.cumsum(own.response_tokens[i, turn]) <= budget]
            if not len(fits):
                continue
            any_right[i] += own.correct[i, fits].max()
            answers = [None if code < 0 else str(code) for code in own.answers[i, fits]]
            chosen = majority(answers)
            if chosen is not None:
                majority_right[i] += own.correct[i, fits[answers.index(chosen)]]
    return any_right / samples, majority_right / samples
