"""Outcomes of one condition as ``[problems, samples]`` arrays, and the metrics computed from them.

A metric is a function of two outcomes, a condition's and base's. It returns a ``stats.Statistic``: a function from problem indices
``[times, n]`` to values ``[times]``.
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
"""Weights a, b, c of ``aes``: shorter, more accurate, less accurate. Papers use different constants; these are ours."""


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Outcomes of one condition and seed, with problems in base's order.

    Attributes:
        correct: 1 for a right answer.
        think_tokens: Length of the think span in tokens.
        response_tokens: Length of the response in tokens.
        closed: 1 if the think span was closed.
        looping: 1 if the response ends in a repeated run of tokens.
        answers: Index of each answer among the problem's distinct answers, -1 if none was given.
    """

    correct: Float[ndarray, "problems samples"]
    think_tokens: Float[ndarray, "problems samples"]
    response_tokens: Float[ndarray, "problems samples"]
    closed: Float[ndarray, "problems samples"]
    looping: Float[ndarray, "problems samples"]
    answers: Float[ndarray, "problems samples"]

    @staticmethod
    def from_rows(rows: pd.DataFrame, problems: Sequence[str]) -> Outcomes:
        """Return the outcomes of some problems.

        Args:
            rows: One row per rollout, in any order, with the columns of ``evaluate.rollout_table``. Without the optional column
                ``answer`` every answer counts as missing.
            problems: Ids of the problems, in the order of the arrays.
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
        """Number of problems, and of samples per problem."""
        return self.correct.shape


How = Callable[[Outcomes, Outcomes], Statistic | None]
"""``(a condition's outcomes, base's outcomes) -> statistic``, or ``None`` if there are too few samples for it."""


def mean_of(column: str) -> How:
    """Return the metric: mean of a column over problems and samples."""
    return lambda outcomes, base: stats.mean_of(getattr(outcomes, column))


def quantile_of(column: str, q: float) -> How:
    """Return the metric: q-quantile of a column over all samples of the resampled problems."""

    def how(outcomes: Outcomes, base: Outcomes) -> Statistic:
        values = getattr(outcomes, column)
        return lambda index: np.quantile(values[index].reshape(len(index), -1), q, axis=1)

    return how


def shortest(share: float) -> How:
    """Return the metric: accuracy of the condition's own shortest ``share`` of responses (ThinkEdit, arXiv 2503.22048).

    As published, so the set of responses differs between models.
    """
    return lambda outcomes, base: stats.shortest_accuracy(outcomes.correct, outcomes.think_tokens, share)


def shortest_of_base(share: float) -> How:
    """Return the metric: accuracy on the ``share`` of problems where *base* thinks least.

    Problems are chosen by other samples of base than the one judged. So they are the same for every condition, without selection bias.
    """

    def how(outcomes: Outcomes, base: Outcomes) -> Statistic | None:
        if base.shape[1] < 2:
            return None
        return stats.shortest_accuracy(outcomes.correct, stats.held_out_length(base.think_tokens), share)

    return how


def aes(outcomes: Outcomes, base: Outcomes) -> Statistic:
    """Return the accuracy-efficiency score: ``a dL + b dA`` if accuracy rose, ``a dL - c |dA|`` if it fell.

    ``dL = (L_base - L) / L_base`` is the relative change of think tokens, ``dA = (A - A_base) / A_base`` that of accuracy; a, b, c are
    ``assumed_aes``. + is better.
    """
    a, b, c = assumed_aes
    means = [stats.mean_of(v) for v in (outcomes.think_tokens, base.think_tokens, outcomes.correct, base.correct)]

    def statistic(index: ndarray) -> ndarray:
        length, length0, right, right0 = (mean(index) for mean in means)
        gain = (right - right0) / np.where(right0 > 0, right0, np.nan)
        return a * (length0 - length) / np.where(length0 > 0, length0, np.nan) + np.where(gain >= 0, b, c) * gain

    return statistic


def passed(times: int) -> How:
    """Return the metric: share of problems with a right answer among the responses that fit ``times`` x base's mean response tokens."""
    return lambda outcomes, base: stats.mean_of(budgeted(outcomes, times * base.response_tokens.mean())[0][:, None])


def voted(times: int) -> How:
    """Return the metric: share of problems whose majority answer is right among the responses that fit ``times`` x base's mean tokens."""
    return lambda outcomes, base: stats.mean_of(budgeted(outcomes, times * base.response_tokens.mean())[1][:, None])


def budgeted(outcomes: Outcomes, budget: float) -> tuple[Float[ndarray, " problems"], Float[ndarray, " problems"]]:
    """Return per problem how often any response within a token budget is right, and how often their majority is (0 to 1).

    Responses are taken in order until the next would exceed ``budget`` response tokens. Both numbers are means over all samples that
    the order may begin with, so every sample counts equally. If no response fits, the problem is wrong. A tied vote goes to the answer
    given first.
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
