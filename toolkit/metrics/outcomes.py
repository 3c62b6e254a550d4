"""Outcomes of one condition as ``[problems, samples]`` arrays, and the metrics computed from them.

A metric is a function of the outcomes of a condition and of base (the unchanged model). It returns a ``stats.Statistic``: a function
from indices of resampled problems, ``[resamples, problems]``, to one value per resample.
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
"""Weights a, b, c of the accuracy-efficiency score ``aes``: for shorter thinking, for a gain and for a loss of accuracy.

Papers use different weights; these are ours.
"""


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Outcomes of every response of one condition with one seed, with problems in the same order as in the outcomes of base.

    Attributes:
        correct: 1 for a right answer, else 0.
        think_tokens: Length of the think span in tokens, tags excluded.
        response_tokens: Length of the response in tokens, tags and answer included.
        closed: 1 if the think span was closed, else 0.
        looping: 1 if the response ends in a repeated run of tokens, else 0.
        answers: Number that stands for the text of the answer: within a problem, equal answers have equal numbers. -1 means no answer.
    """

    correct: Float[ndarray, "problems samples"]
    think_tokens: Float[ndarray, "problems samples"]
    response_tokens: Float[ndarray, "problems samples"]
    closed: Float[ndarray, "problems samples"]
    looping: Float[ndarray, "problems samples"]
    answers: Float[ndarray, "problems samples"]

    @staticmethod
    def from_rows(rows: pd.DataFrame, problems: Sequence[str]) -> Outcomes:
        """Return the outcomes of the given problems.

        Args:
            rows: One row per rollout, in any order, with the columns ``problem_id, sample, correct, think_tokens, response_tokens,
                closed, looping`` and optionally ``answer`` (text). Without ``answer``, every answer counts as missing.
            problems: Problem ids, in the order of the arrays' first axis.
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
        """``(number of problems, number of samples per problem)``."""
        return self.correct.shape


How = Callable[[Outcomes, Outcomes], Statistic | None]
"""A metric: ``(a condition's outcomes, base's outcomes) -> statistic``, or ``None`` if there are too few samples per problem for it."""


def mean_of(column: str) -> How:
    """Return a metric: the mean of a field of ``Outcomes``, such as ``"correct"``, over problems and samples."""
    return lambda outcomes, base: stats.mean_of(getattr(outcomes, column))


def quantile_of(column: str, q: float) -> How:
    """Return a metric: the quantile ``q`` (0 to 1) of a field of ``Outcomes`` over all samples of all problems."""

    def how(outcomes: Outcomes, base: Outcomes) -> Statistic:
        values = getattr(outcomes, column)
        return lambda index: np.quantile(values[index].reshape(len(index), -1), q, axis=1)

    return how


def shortest(share: float) -> How:
    """Return a metric: accuracy of the responses with the shortest thinking (ThinkEdit, arXiv 2503.22048).

    Among the first responses to all problems, the ``share`` with the shortest thinking is judged; likewise among the second responses, and
    so on; the result is the mean. As published, a condition is judged on its *own* shortest responses, so the problems differ between
    conditions.

    Args:
        share: Share of the responses that are judged, 0 to 1.
    """
    return lambda outcomes, base: stats.shortest_accuracy(outcomes.correct, outcomes.think_tokens, share)


def shortest_of_base(share: float) -> How:
    """Return a metric: accuracy of the responses to the problems on which *base* thinks least.

    Like ``shortest``, but sample k of a problem is ranked by the mean think length of base's *other* samples of that problem. So the choice
    is the same for every condition, and base itself is judged without selection bias. Needs at least two samples per problem.

    Args:
        share: Share of the responses that are judged, 0 to 1.
    """

    def how(outcomes: Outcomes, base: Outcomes) -> Statistic | None:
        if base.shape[1] < 2:
            return None
        return stats.shortest_accuracy(outcomes.correct, stats.held_out_length(base.think_tokens), share)

    return how


def aes(outcomes: Outcomes, base: Outcomes) -> Statistic:
    """Return a statistic, the accuracy-efficiency score: ``a dL + b dA`` if accuracy rose, ``a dL - c |dA|`` if it fell. Higher is better.

    ``dL = (L_base - L) / L_base`` is the relative shortening of thinking, and ``dA = (A - A_base) / A_base`` is the relative gain of
    accuracy, where L is the mean number of think tokens and A the accuracy. The weights a, b, c are ``assumed_aes``.
    """
    a, b, c = assumed_aes
    means = [stats.mean_of(v) for v in (outcomes.think_tokens, base.think_tokens, outcomes.correct, base.correct)]

    def statistic(index: ndarray) -> ndarray:
        length, length0, right, right0 = (mean(index) for mean in means)
        gain = (right - right0) / np.where(right0 > 0, right0, np.nan)
        return a * (length0 - length) / np.where(length0 > 0, length0, np.nan) + np.where(gain >= 0, b, c) * gain

    return statistic


def passed(times: int) -> How:
    """Return a metric: share of problems with at least one right answer among the responses within a token budget (see ``budgeted``).

    Args:
        times: Budget per problem, as a multiple of base's mean response length.
    """
    return lambda outcomes, base: stats.mean_of(budgeted(outcomes, times * base.response_tokens.mean())[0][:, None])


def voted(times: int) -> How:
    """Return a metric: share of problems whose majority answer among the responses within a token budget is right (see ``budgeted``).

    Args:
        times: Budget per problem, as a multiple of base's mean response length.
    """
    return lambda outcomes, base: stats.mean_of(budgeted(outcomes, times * base.response_tokens.mean())[1][:, None])


def budgeted(outcomes: Outcomes, budget: float) -> tuple[Float[ndarray, " problems"], Float[ndarray, " problems"]]:
    """Return two numbers per problem, from 0 to 1, for the responses that fit a token budget: pass rate and vote rate.

    The samples of a problem are taken in order until the next would exceed the budget. The pass rate counts whether at least one of the
    taken responses is right, the vote rate whether their majority answer is right. Both are means over all cyclic orders of the samples
    (one begins at each sample), so that every sample counts equally. If no response fits, both are 0 for this order. A tied vote goes to
    the answer given first.

    Args:
        outcomes: Outcomes of one condition.
        budget: Budget per problem, in response tokens.
    """
    n, samples = outcomes.shape
    any_right, majority_right = np.zeros(n), np.zeros(n)
    order = np.array([np.roll(np.arange(samples), -first) for first in range(samples)])
    for i in range(n):
        for turn in order:
            fits = turn[np.cumsum(outcomes.response_tokens[i, turn]) <= budget]
            if not len(fits):
                continue
            any_right[i] += outcomes.correct[i, fits].max()
            answers = [None if code < 0 else str(code) for code in outcomes.answers[i, fits]]
            chosen = majority(answers)
            if chosen is not None:
                majority_right[i] += outcomes.correct[i, fits[answers.index(chosen)]]
    return any_right / samples, majority_right / samples
