"""Measure how accurately a model keeps a running total over many turns.

After "The Illusion of Diminishing Returns" (arXiv 2509.09677). Turn t adds ``d_t`` to a running total. The model gives the total ``y_t``,
and the true total is ``S_t``. There are three ways to be right, and a formula for the horizon:

    step    y_t = y_r + d_{r+1} + ... + d_t     the sum is right, given y_r, the last total that the model gave before (turn r < t)
    turn    y_t = S_t                           the total is true
    prefix                                      the totals of all turns up to and including t are true
    H_s(p)  = ln s / ln p                       number of steps H at which p^H falls below the threshold s

p^H is the accuracy expected after H steps (the *horizon*) if each step is right with probability p, independently, and no error is
corrected.

Deviations: in the paper's format every turn has a total. In a chain of ``tasks.running_sum``, such as ``17+5-9=?``, each operand after the
first is a turn. The model may add two operands at once, and so give no total for the first of them. A turn without a total does not count
in the step accuracy.

Nothing here runs a model. Units: horizons are in turns (in a chain, one addition or subtraction is one turn); accuracies are shares from 0
to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pandas as pd

from toolkit import stats
from toolkit.stats import Number

CONVENTIONS = ("first_below", "last_above")
EDGE = 1e-9  # a horizon this close to a whole number of steps is rounded to it


@dataclass(frozen=True)
class Execution:
    """The running totals that a model gave in one response, and whether they are right. Every field has one entry per turn.

    In this module, a whole conversation (``episodes.play``) is one response.

    Attributes:
        outputs: The total that the model gave for the turn (the last one, if it gave several); ``None`` if it gave none.
        step: True if this total follows from the total that the model gave before, right or wrong: their difference is the sum of the
            numbers that the turns in between and this turn add. The model's first total must follow from the start value. ``None`` if the
            model gave no total for the turn.
        turn: True if this total is the true one. If the model gave none: ``None`` if it gave one for a later turn, ``False`` if it had
            stopped.
    """

    outputs: tuple[int | None, ...]
    step: tuple[bool | None, ...]
    turn: tuple[bool | None, ...]

    @property
    def prefix(self) -> tuple[bool, ...]:
        """One flag per turn: True if all totals that the model gave up to and including this turn are true.

        ``False`` for all turns after the model stopped.
        """
        return tuple(accumulate((t is not False for t in self.turn), lambda a, b: a and b))

    @property
    def step_accuracy(self) -> float:
        """Share (0 to 1) of the model's running totals that follow from its previous total, right or wrong. NaN if it gave no total."""
        stated = [right for right in self.step if right is not None]
        return sum(stated) / len(stated) if stated else math.nan

    @property
    def stated(self) -> float:
        """Share of the turns for which the model gave a total."""
        return sum(y is not None for y in self.outputs) / len(self.outputs)

    @property
    def final(self) -> bool:
        """True if the model gave a total for the last turn and this total is true."""
        return self.turn[-1] is True


def judge(outputs: Sequence[int | None], deltas: Sequence[int], *, start: int = 0) -> Execution:
    """Check the totals that a model gave in one response, and return the results as an Execution.

    A total may be right as a step although it is not the true total: in the example, 11 follows from the wrong total 9. See ``Execution``.

    Args:
        outputs: The total that the model gave for each turn; ``None`` if it gave none.
        deltas: The number that each turn adds.
        start: The total before the first turn.

    Raises:
        ValueError: there are no turns, or ``outputs`` and ``deltas`` differ in length.

    >>> judge([5, 9, 11], [5, 3, 2]).step
    (True, False, True)
    """
    if not deltas or len(outputs) != len(deltas):
        raise ValueError(
            f"{len(outputs)} outputs for {len(deltas)} turns: give one per turn (None: not stated), and at least one turn."
        )
    truth = list(accumulate(deltas, initial=start))[1:]
    last = max((t for t, y in enumerate(outputs) if y is not None), default=-1)
    step: list[bool | None] = []
    turn: list[bool | None] = []
    expected = start  # the right total given the model's last output
    for t, (y, delta, true) in enumerate(zip(outputs, deltas, truth, strict=True)):
        expected += delta
        step.append(None if y is None else y == expected)
        # No output: None if the model only skipped the turn, False if it had stopped.
        turn.append(y == true if y is not None else None if t < last else False)
        expected = expected if y is None else y
    return Execution(tuple(outputs), tuple(step), tuple(turn))


def carry_forward(outputs: Sequence[int | None], *, start: int = 0) -> list[int]:
    """Return running totals in which each missing one (``None``) is replaced by the total before it, or by ``start`` at the beginning.

    arXiv 2509.09677 treats unreadable answers in this way.

    Args:
        outputs: The total that the model gave for each turn; ``None`` if it gave none.

    >>> carry_forward([3, None, 4])
    [3, 3, 4]
    """
    return list(accumulate(outputs, lambda before, y: before if y is None else y, initial=start))[1:]  # type: ignore[arg-type, return-value]


def execution_metrics(executions: Sequence[Execution], *, seed: int = 0) -> pd.DataFrame:
    """Return a table of the accuracies at each turn, one row per turn.

    | column | meaning |
    |---|---|
    | ``turn`` | number of the turn, from 1 |
    | ``n`` | number of responses to problems that have this turn |
    | ``stated`` | share of the ``n`` responses that give a total for the turn |
    | ``step`` | share of totals that follow from the total given before, right or wrong; among the responses that give one for the turn |
    | ``turn_right`` | share of true totals, among the responses that do not skip the turn (give none for it, but one for a later turn) |
    | ``prefix`` | share of the ``n`` responses whose totals up to this turn are all true |

    The last three have 95 % bootstrap intervals over responses, with columns such as ``step_low, step_high``. They are NaN if no response
    counts for them. A response that stopped before the turn counts as wrong in ``turn_right`` and ``prefix``.

    Args:
        executions: One per response.
        seed: Seed of the bootstrap. The intervals are from 2,000 resamples (in arXiv 2509.09677: 1,000).

    Raises:
        ValueError: no executions.
    """
    if not executions:
        raise ValueError("No executions to measure: give at least one.")
    rows = []
    for t in range(max(len(e.outputs) for e in executions)):
        here = [e for e in executions if t < len(e.outputs)]
        row: dict[str, float] = {"turn": t + 1, "n": len(here), "stated": sum(e.outputs[t] is not None for e in here) / len(here)}
        columns: dict[str, Sequence[bool | None]] = {
            "step": [e.step[t] for e in here],
            "turn_right": [e.turn[t] for e in here],
            "prefix": [e.prefix[t] for e in here],
        }
        for name, values in columns.items():
            row |= _interval(name, [float(v) for v in values if v is not None], seed)
        rows.append(row)
    return pd.DataFrame(rows)


def _interval(name: str, values: Sequence[float], seed: int) -> dict[str, float]:
    keys = (name, f"{name}_low", f"{name}_high")
    if not values:
        return dict.fromkeys(keys, math.nan)
    e = stats.bootstrap(stats.mean_of(np.array(values)[:, None]), len(values), seed=seed)
    return dict(zip(keys, (e.mean, e.low, e.high), strict=True))


def step_accuracy(executions: Sequence[Execution], *, seed: int = 0) -> stats.Estimate:
    """Return the share of right steps among all steps of all responses, with a 95 % bootstrap interval over responses.

    A step is right if its total follows from the total before it, even if that one is wrong.

    Args:
        executions: One per response. Responses without any total are ignored.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: no response gives a total.
    """
    right = np.array([sum(s is True for s in e.step) for e in executions])
    n = np.array([sum(s is not None for s in e.step) for e in executions])
    if not n.sum():
        raise ValueError(
            f"None of the {len(executions)} executions states a total: nothing was read, or the model did not work step by step."
        )
    right, n = right[n > 0], n[n > 0]
    return stats.bootstrap(lambda index: right[index].sum(axis=1) / n[index].sum(axis=1), len(n), seed=seed)


def by_horizon(
    executions: Sequence[Execution], correct: Sequence[bool] | None = None, *, p: Number | None = None, seed: int = 0
) -> pd.DataFrame:
    """Return the share of right final answers to problems with H turns, compared with p^H, for each H.

    p^H is the share expected if each step is right with probability p and no error is corrected. H is called the horizon.

    Args:
        executions: One per response.
        correct: One flag per response: True if its answer is right (``rollout.correct``). Default: True if the response gives a total for
            the last turn and this total is true.
        p: Probability that a step is right, 0 to 1; for example the step accuracy measured at the horizons that the model was trained on.
            Default: each row uses the step accuracy at its own horizon, since step accuracy may fall with the horizon.
        seed: Seed of the bootstrap.

    Returns:
        One row per horizon, with these columns. ``horizon``: number of turns. ``n``: number of responses. ``stated``: share of turns with a
        total. ``step``: step accuracy, the share of totals that follow from the total given before. ``final``: share of right final
        answers. ``final_low, final_high``: its 95 % bootstrap interval over responses. ``expected``: p^H.

        If ``final`` is above ``expected``, the model corrects errors, or errors cluster in few responses. If it is below, some responses
        stopped early, or their steps are less accurate than p.

    Raises:
        ValueError: no executions, ``correct`` has another length than ``executions``, or ``p`` is outside 0..1.
    """
    right = [e.final for e in executions] if correct is None else list(correct)
    if not executions or len(right) != len(executions) or not 0 <= (0 if p is None else p) <= 1:
        raise ValueError(
            f"{len(right)} answers for {len(executions)} executions, p={p}: give one each, at least one, and p from 0 to 1."
        )
    rows = []
    for horizon in sorted({len(e.outputs) for e in executions}):
        here = [(e, r) for e, r in zip(executions, right, strict=True) if len(e.outputs) == horizon]
        steps = [s for e, _ in here for s in e.step if s is not None]
        accuracy = sum(steps) / len(steps) if steps else math.nan
        row: dict[str, float] = {
            "horizon": horizon,
            "n": len(here),
            "stated": sum(e.stated for e, _ in here) / len(here),
            "step": accuracy,
        }
        row |= _interval("final", [float(r) for _, r in here], seed)
        rows.append(row | {"expected": (accuracy if p is None else p) ** horizon})
    return pd.DataFrame(rows)


def horizon_length(p: Number, s: Number = 0.5, convention: str = "first_below") -> float:
    """Return the number of steps H at which p^H, the expected accuracy after H steps, falls below ``s``. It is infinite for p = 1.

    Args:
        p: Accuracy of a single step, 0 to 1.
        s: Threshold of the expected accuracy, above 0 and at most 1.
        convention: ``"first_below"``: the smallest H with p^H < s. This is ln s / ln p rounded up, as in arXiv 2509.09677; if ln s / ln p
            is a whole number, it is one more. ``"last_above"``: the largest H with p^H >= s, one less than with ``"first_below"``.

    Raises:
        ValueError: an argument is out of its range.

    >>> horizon_length(0.9), horizon_length(0.9, convention="last_above")
    (7.0, 6.0)
    """
    if not 0 <= p <= 1 or not 0 < s <= 1 or convention not in CONVENTIONS:
        raise ValueError(f"p={p}, s={s}, convention={convention!r}: need 0 <= p <= 1, 0 < s <= 1, and {' or '.join(CONVENTIONS)}.")
    if p == 1:
        return math.inf
    # The largest H with p^H >= s. EDGE: rounding errors must not push a whole number such as ln 0.25 / ln 0.5 = 2 below itself.
    above = 0 if p == 0 else math.floor(math.log(s) / math.log(p) + EDGE)
    return float(above + (convention == "first_below"))
