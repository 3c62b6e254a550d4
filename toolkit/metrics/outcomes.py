"""Outcomes of one condition as ``[problems, samples]`` arrays, and functions that compute metrics from them.

A function that computes a metric (type ``How``) takes the outcomes of a condition and of base, the unchanged model. It returns a
``stats.Statistic``: a function from indices of resampled problems, ``[resamples, problems]``, to one value of the metric per resample.
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
"""Weights a, b, c of the accuracy-efficiency score ``aes``.

The weight a multiplies the shortening of thinking, b a gain of accuracy, and c a loss of accuracy. Papers use different weights; these are
our choice.
"""


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Correctness, length and other outcomes of every response of one condition, with one seed of its random or trained part.

    For a comparison, the problems must be in the same order as in the outcomes of base. Every attribute is an array
    ``[problems, samples]``.

    Attributes:
        correct: 1 for a right answer, else 0.
        think_tokens: Length of the think span in tokens, tags excluded.
        response_tokens: Length of the response in tokens, tags and answer included.
        closed: 1 if the think span was closed, else 0.
        looping: 1 if the response reached the token limit and ends in a loop (``stats.looping``), else 0.
        leaking: 1 if the answer goes on thinking (``leaks.leaks``), else 0.
        answers: Integer code of the answer's text: two responses to a problem have the same code if their answers are equal. -1 means no
            answer.
    """

    correct: Float[ndarray, "problems samples"]
    think_tokens: Float[ndarray, "problems samples"]
    response_tokens: Float[ndarray, "problems samples"]
    closed: Float[ndarray, "problems samples"]
    looping: Float[ndarray, "problems samples"]
    leaking: Float[ndarray, "problems samples"]
    answers: Float[ndarray, "problems samples"]

    @staticmethod
    def from_rows(rows: pd.DataFrame, problems: Sequence[str]) -> Outcomes:
        """Return the outcomes in a table of rollouts, as arrays.

        Args:
            rows: One row per rollout, in any order. Columns: ``problem_id, sample, correct, think_tokens, response_tokens, closed,
                looping, leaking``, and optionally ``answer`` (text). Without ``answer``, every answer counts as missing. All problems must
                have the same number of samples.
            problems: Ids of the problems to take, in the order wanted for the arrays' first axis.

        Raises:
            ValueError: two rows have the same problem and sample, or the problems differ in their number of samples.
            KeyError: one of ``problems`` has no row.
        """
        rows = rows.sort_values(["problem_id", "sample"]).set_index("problem_id").loc[list(problems)].reset_index()
        _check_samples(rows)
        samples = len(rows) // max(1, len(problems))
        codes = pd.Series(-1.0, rows.index)
        if "answer" in rows:
            codes = rows.groupby("problem_id", sort=False)["answer"].transform(lambda answers: pd.factorize(answers)[0])
        columns = {name: rows[name] for name in ("correct", "think_tokens", "response_tokens", "closed", "looping", "leaking")}
        return Outcomes(**{k: v.to_numpy(float).reshape(-1, samples) for k, v in {**columns, "answers": codes}.items()})

    @property
    def shape(self) -> tuple[int, int]:
        """``(number of problems, number of samples per problem)``."""
        return self.correct.shape


def _check_samples(rows: pd.DataFrame) -> None:
    """Raise ValueError unless every problem has the same number of rows, each with its own ``sample``."""
    twice = rows[rows.duplicated(["problem_id", "sample"])]
    if len(twice):
        problem, sample = twice.iloc[0][["problem_id", "sample"]]
        raise ValueError(
            f"Two rows of problem {problem!r} have sample {sample}: expected one row per problem and sample. Pass the rows of one condition "
            "and one seed."
        )
    counts = rows["problem_id"].value_counts(sort=False)
    if counts.nunique() > 1:
        least, most = counts.idxmin(), counts.idxmax()
        raise ValueError(
            f"Problem {least!r} has {counts[least]} samples and problem {most!r} has {counts[most]}: expected the same number for every "
            "problem. Sample the missing responses, or leave such problems out."
        )


How = Callable[[Outcomes, Outcomes], Statistic | None]
"""A function that computes a metric: ``(outcomes of a condition, outcomes of base) -> statistic``.

The statistic is a function from indices of resampled problems, one resample per row, to the metric's value on each resample. It is ``None``
if the metric needs more samples per problem than there are.
"""


def mean_of(column: str) -> How:
    """Return a function that computes a metric (see ``How``): the mean of a field of ``Outcomes`` over problems and samples.

    Args:
        column: Name of the field, such as ``"correct"``.
    """
    return lambda outcomes, base: stats.mean_of(getattr(outcomes, column))


def quantile_of(column: str, q: float) -> How:
    """Return a function that computes a metric (see ``How``): a quantile of a field of ``Outcomes``, over all samples of all problems.

    Args:
        column: Name of the field, such as ``"think_tokens"``.
        q: Which quantile, from 0 to 1; 0.5 is the median.
    """

    def how(outcomes: Outcomes, base: Outcomes) -> Statistic:
        values = getattr(outcomes, column)
        return lambda index: np.quantile(values[index].reshape(len(index), -1), q, axis=1)

    return how


def shortest(share: float) -> How:
    """Return a function that computes a metric (see ``How``): the accuracy of the responses with the shortest thinking.

    This is a metric of ThinkEdit (arXiv:2503.22048). For each sample index k, the responses are those with index k, one per problem. Of
    these, the ones with the shortest thinking are selected and graded. Their accuracy is averaged over k. As in the paper, each condition
    selects its *own* shortest responses, so the selected problems differ between conditions.

    Args:
        share: Share of the responses to select, above 0 and at most 1.
    """
    return lambda outcomes, base: stats.shortest_accuracy(outcomes.correct, outcomes.think_tokens, share)


def shortest_of_base(share: float) -> How:
    """Return a function that computes a metric (see ``How``): the accuracy on the problems on which *base* thinks least.

    For each sample index k, the problems are sorted by the mean think length of base's samples *other than* k. The first ones are selected,
    and the condition's samples k of these problems are graded. Their accuracy is averaged over k. So the selection is the same for every
    condition. Base's own accuracy has no selection bias, since its sample k is not used to select. The metric needs at least two samples of
    base per problem.

    Args:
        share: Share of the problems to select, above 0 and at most 1.
    """

    def how(outcomes: Outcomes, base: Outcomes) -> Statistic | None:
        if base.shape[1] < 2:
            return None
        return stats.shortest_accuracy(outcomes.correct, stats.mean_of_others(base.think_tokens), share)

    return how


def aes(outcomes: Outcomes, base: Outcomes) -> Statistic:
    """Return the accuracy-efficiency score (AES) of a condition as a statistic (a function of resampled problems). Higher is better.

    With L the mean number of think tokens and A the accuracy::

        dL  = (L_base - L) / L_base           relative shortening of thinking
        dA  = (A - A_base) / A_base           relative gain of accuracy
        AES = a dL + b dA  if dA >= 0,  else  a dL - c |dA|

    The weights a, b, c are ``assumed_aes``. The score is NaN if base's L or A is 0.
    """
    a, b, c = assumed_aes
    means = [stats.mean_of(v) for v in (outcomes.think_tokens, base.think_tokens, outcomes.correct, base.correct)]

    def statistic(index: ndarray) -> ndarray:
        length, length0, right, right0 = (mean(index) for mean in means)
        # dA; NaN in place of a divisor 0 makes the score NaN without a warning.
        gain = (right - right0) / np.where(right0 > 0, right0, np.nan)
        return a * (length0 - length) / np.where(length0 > 0, length0, np.nan) + np.where(gain >= 0, b, c) * gain

    return statistic


def ratio_of(numerator: Float[ndarray, "problems samples"], divisor: Float[ndarray, "problems samples"]) -> Statistic:
    """Return a statistic (a function of resampled problems): the sum of one number over the sum of another, over all samples.

    The value is NaN where the divisor's sum is 0.
    """
    above, below = numerator.sum(axis=1), divisor.sum(axis=1)

    def statistic(index: ndarray) -> ndarray:
        divisors = below[index].sum(axis=1)
        return above[index].sum(axis=1) / np.where(divisors > 0, divisors, np.nan)

    return statistic


def think_tokens_of(right: bool) -> How:
    """Return a function that computes a metric (see ``How``): the mean think length of right responses, or of wrong ones, in tokens.

    Args:
        right: True for the right responses.
    """

    def how(outcomes: Outcomes, base: Outcomes) -> Statistic:
        chosen = outcomes.correct if right else 1 - outcomes.correct
        return ratio_of(outcomes.think_tokens * chosen, chosen)

    return how


def tokens_per_right(outcomes: Outcomes, base: Outcomes) -> Statistic:
    """Return the number of response tokens per right answer as a statistic: wrong responses cost tokens, too. Lower is better."""
    return ratio_of(outcomes.response_tokens, outcomes.correct)


def ock_score(outcomes: Outcomes, base: Outcomes) -> Statistic:
    """Return the OckScore (arXiv:2511.05722, released code) of a condition as a statistic. Higher is better; it can be negative.

    With A the accuracy in percent and N the mean number of response tokens::

        A - 10 ln( N / 10000 + 1 )

    Deviation: the released code counts the tokens of the prompt, too. They depend on the tokenizer, and are nearly the same for all
    conditions.
    """
    right, tokens = stats.mean_of(outcomes.correct), stats.mean_of(outcomes.response_tokens)
    return lambda index: 100 * right(index) - 10 * np.log1p(tokens(index) / 10000)


def right_within(times: float) -> Callable[[Outcomes, Outcomes], Statistic]:
    """Return a function that computes a metric (see ``How``): the share of responses that are right and at most as long as a budget.

    Responses are not shortened: a longer one counts as wrong. That is the mode "cut" of accuracy at token budgets.

    Args:
        times: Budget per response, as a multiple of base's mean response length over all problems.
    """
    return lambda outcomes, base: stats.mean_of(
        outcomes.correct * (outcomes.response_tokens <= times * base.response_tokens.mean())
    )


def area_right_within(times: float) -> How:
    """Return a function that computes a metric (see ``How``): the mean of ``right_within`` over all budgets from 0 to ``times``.

    This is the area under accuracy against the token budget, divided by the largest budget (arXiv:2508.13141, overthinking-adjusted
    accuracy, per response). With n the response's tokens and T the largest budget, a right response counts max(0, 1 - n / T).

    Deviations: the paper counts the tokens of thinking, and T is 1,000 for every model. Here n has the tokens of the answer too, as in
    ``right_within``, and T follows base's length.

    Args:
        times: Largest budget per response, as a multiple of base's mean response length over all problems.
    """

    def how(outcomes: Outcomes, base: Outcomes) -> Statistic:
        most = times * base.response_tokens.mean()
        return stats.mean_of(outcomes.correct * np.maximum(0.0, 1 - outcomes.response_tokens / most))

    return how


def passed(times: int) -> How:
    """Return a function that computes a metric (see ``How``): the pass rate within a token budget.

    The responses to a problem are taken until the budget is used up. The pass rate is the share of problems to which at least one of the
    taken responses is right. ``budgeted`` has the details.

    Args:
        times: Token budget per problem, as a multiple of base's mean response length over all problems.
    """
    return lambda outcomes, base: stats.mean_of(budgeted(outcomes, times * base.response_tokens.mean())[0][:, None])


def voted(times: int) -> How:
    """Return a function that computes a metric (see ``How``): the vote rate within a token budget.

    The responses to a problem are taken until the budget is used up. The vote rate is the share of problems for which the most frequent
    answer of the taken responses is right. ``budgeted`` has the details.

    Args:
        times: Token budget per problem, as a multiple of base's mean response length over all problems.
    """
    return lambda outcomes, base: stats.mean_of(budgeted(outcomes, times * base.response_tokens.mean())[1][:, None])


def budgeted(outcomes: Outcomes, budget: float) -> tuple[Float[ndarray, " problems"], Float[ndarray, " problems"]]:
    """Return ``(pass rates, vote rates)`` of a condition within a token budget: two arrays with one number from 0 to 1 per problem.

    The responses to a problem are taken in order, until the next one would exceed the budget: the total length of those taken is at most
    ``budget``. The pass rate is 1 if at least one of them is right, else 0. The vote rate is 1 if their most frequent answer is right, else
    0. A tie goes to the answer given first. A response without an answer counts towards the budget but not in the vote. If the first
    response already exceeds the budget, both rates are 0.

    The responses taken depend on the order. So both rates are averaged over all cyclic orders: one begins at sample 0, one at sample 1, and
    so on. This gives every sample equal weight.

    Args:
        outcomes: Outcomes of one condition.
        budget: Budget per problem, in response tokens.
    """
    n, samples = outcomes.shape
    any_right, majority_right = np.zeros(n), np.zeros(n)
    # One cyclic order of the samples per row.
    order = np.array([np.roll(np.arange(samples), -first) for first in range(samples)])
    for i in range(n):
        for turn in order:
            fits = turn[np.cumsum(outcomes.response_tokens[i, turn]) <= budget]
            if not len(fits):
                continue
            any_right[i] += outcomes.correct[i, fits].max()
            # Responses with equal answers are equally right, so grade the vote by the first response with the majority answer.
            answers = [None if code < 0 else str(code) for code in outcomes.answers[i, fits]]
            chosen = majority(answers)
            if chosen is not None:
                majority_right[i] += outcomes.correct[i, fits[answers.index(chosen)]]
    return any_right / samples, majority_right / samples
