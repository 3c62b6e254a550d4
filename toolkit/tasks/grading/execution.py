"""How far a model carries a computation: step, turn and prefix accuracy of running totals, against p^H.

The Illusion of Diminishing Returns (arXiv 2509.09677). A turn t adds ``d_t`` to a running total; the model states ``y_t``.

    step    y_t = y_s + d_{s+1} + ... + d_t     right relative to its *own* output y_s at the last turn s before t that it stated
    turn    y_t = S_t                           right in truth, S_t the true total
    prefix  all turns up to t are right in truth
    H_s(p)  = ln s / ln p                       steps at which p^H, the prefix accuracy of a constant p, falls through s

Deviations: a turn that was jumped over (two operands taken at once) has no step of its own (the paper's format has no such);
:func:`kept` is the paper's rule for an answer that cannot be read. Nothing here runs a model.

Units: turns are additions, accuracies shares from 0 to 1, horizons additions.
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
EDGE = 1e-9  # a horizon this close to a whole number of steps is taken for it: 0.5 is reached, not passed, by p = 0.5 in one step


@dataclass(frozen=True)
class Execution:
    """Running totals as a model stated them, judged turn by turn. Every field has one entry a turn.

    Attributes:
        outputs: The total stated last at each turn, ``None`` where none was.
        step: Whether it follows from the output before it; ``None`` where nothing was stated.
        turn: Whether it is the true total; ``None`` where it was jumped over, ``False`` where the model never got there.
    """

    outputs: tuple[int | None, ...]
    step: tuple[bool | None, ...]
    turn: tuple[bool | None, ...]

    @property
    def prefix(self) -> tuple[bool, ...]:
        """Whether everything stated up to each turn is true; ``False`` from the turn on that the model never got to."""
        return tuple(accumulate((t is not False for t in self.turn), lambda a, b: a and b))

    @property
    def step_accuracy(self) -> float:
        """Share of the stated outputs that follow from the one before; NaN if none was stated."""
        stated = [right for right in self.step if right is not None]
        return sum(stated) / len(stated) if stated else math.nan

    @property
    def stated(self) -> float:
        """Share of the turns that were stated."""
        return sum(y is not None for y in self.outputs) / len(self.outputs)

    @property
    def final(self) -> bool:
        """Whether the last turn is right in truth."""
        return self.turn[-1] is True


def judge(outputs: Sequence[int | None], deltas: Sequence[int], *, start: int = 0) -> Execution:
    """Judge the totals stated at each turn.

    Args:
        outputs: One entry a turn.
        deltas: What each turn adds.
        start: The total before the first turn.

    Raises:
        ValueError: no turn, or not one output a turn.
    """
    if not deltas or len(outputs) != len(deltas):
        raise ValueError(
            f"{len(outputs)} outputs for {len(deltas)} turns: give one a turn (None: not stated), and one turn at least."
        )
    truth = list(accumulate(deltas, initial=start))[1:]
    last = max((t for t, y in enumerate(outputs) if y is not None), default=-1)
    step: list[bool | None] = []
    turn: list[bool | None] = []
    own = start  # what should stand here, if the model had made no mistake since its last output
    for t, (y, delta, true) in enumerate(zip(outputs, deltas, truth, strict=True)):
        own += delta
        step.append(None if y is None else y == own)
        turn.append(y == true if y is not None else None if t < last else False)
        own = own if y is None else y
    return Execution(tuple(outputs), tuple(step), tuple(turn))


def kept(outputs: Sequence[int | None], *, start: int = 0) -> list[int]:
    """Outputs where one that cannot be read keeps the value before it: the paper's rule."""
    return list(accumulate(outputs, lambda before, y: before if y is None else y, initial=start))[1:]  # type: ignore[arg-type, return-value]


def execution_metrics(found: Sequence[Execution], *, seed: int = 0) -> pd.DataFrame:
    """One row per turn, with 95 % intervals over chains (resampled with ``stats.bootstrap``; the paper takes 1,000 resamples).

    Columns: ``turn`` (from 1), ``n`` (chains that have it), ``stated`` (share that state it), and ``step, turn_right, prefix``, each
    with ``_low`` and ``_high``. ``step`` is over the chains that stated the turn, ``turn_right`` over those that did not jump over it;
    NaN where there are none.

    Raises:
        ValueError: nothing to measure.
    """
    if not found:
        raise ValueError("No executions to measure: give at least one.")
    rows = []
    for t in range(max(len(e.outputs) for e in found)):
        here = [e for e in found if t < len(e.outputs)]
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


def step_accuracy(found: Sequence[Execution], *, seed: int = 0) -> stats.Estimate:
    """Share of all stated outputs that follow from the one before, with a 95 % interval over chains.

    Raises:
        ValueError: no chain states anything.
    """
    right = np.array([sum(s is True for s in e.step) for e in found])
    n = np.array([sum(s is not None for s in e.step) for e in found])
    if not n.sum():
        raise ValueError(
            f"None of the {len(found)} executions states a total: nothing was read, or the model did not work step by step."
        )
    right, n = right[n > 0], n[n > 0]
    return stats.bootstrap(lambda index: right[index].sum(axis=1) / n[index].sum(axis=1), len(n), seed=seed)


def by_horizon(
    found: Sequence[Execution], correct: Sequence[bool] | None = None, *, p: Number | None = None, seed: int = 0
) -> pd.DataFrame:
    """Accuracy at the end of chains of each length, beside p^H.

    Args:
        correct: Whether each answer is right (``rollout.correct``); default: whether the last total stated is.
        p: Step accuracy of the power, such as that of lengths which were trained on; default: of the chains of each length by
            themselves, for it may fall with length.

    Columns: ``horizon, n, stated`` (share of turns), ``step, final, final_low, final_high, expected`` (p^H). A ``final`` above
    ``expected`` is self-correction, or errors that come in bunches; one below it, turns that were never come to.

    Raises:
        ValueError: no execution, not one answer each, or a ``p`` outside 0..1.
    """
    right = [e.final for e in found] if correct is None else list(correct)
    if not found or len(right) != len(found) or not 0 <= (0 if p is None else p) <= 1:
        raise ValueError(
            f"{len(right)} answers for {len(found)} executions, p={p}: give one each, one at least, and p from 0 to 1."
        )
    rows = []
    for horizon in sorted({len(e.outputs) for e in found}):
        here = [(e, r) for e, r in zip(found, right, strict=True) if len(e.outputs) == horizon]
        steps = [s for e, _ in here for s in e.step if s is not None]
        own = sum(steps) / len(steps) if steps else math.nan
        row: dict[str, float] = {
            "horizon": horizon,
            "n": len(here),
            "stated": sum(e.stated for e, _ in here) / len(here),
            "step": own,
        }
        row |= _interval("final", [float(r) for _, r in here], seed)
        rows.append(row | {"expected": (own if p is None else p) ** horizon})
    return pd.DataFrame(rows)


def horizon_length(p: Number, s: Number = 0.5, convention: str = "first_below") -> float:
    """Steps that a constant step accuracy ``p`` carries at success rate ``s``; infinite for p = 1.

    Args:
        convention: ``"first_below"``: the least H with p^H < s, the paper's ceiling of ln s / ln p (one more where that is whole, so
            that p^H = s is not below). ``"last_above"``: the largest H with p^H >= s, one less.

    Raises:
        ValueError: a value out of its range.
    """
    if not 0 <= p <= 1 or not 0 < s <= 1 or convention not in CONVENTIONS:
        raise ValueError(f"p={p}, s={s}, convention={convention!r}: need 0 <= p <= 1, 0 < s <= 1, and {' or '.join(CONVENTIONS)}.")
    if p == 1:
        return math.inf
    above = 0 if p == 0 else math.floor(math.log(s) / math.log(p) + EDGE)
    return float(above + (convention == "first_below"))
