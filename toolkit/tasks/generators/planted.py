"""Plant wrong totals in the thinking about a chain of additions: does a model err more often after its own errors (*self-conditioning*)?

After "The Illusion of Diminishing Returns" (arXiv 2509.09677), which replaces past answers of a conversation by wrong ones. Here the
answers are lines of thinking about a chain of ``tasks.running_sum``, such as ``17+5-9=?``, and the model writes the next line.

Deviations: an error changes a total by 1 to 10, as in the paper, but is never 0, and later lines follow from the wrong total. The control
is ours: ``explained`` changes the problem so that the same totals are right. The model then reads equal totals, without an error.

Units: a turn is one addition or subtraction.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from toolkit.tasks.arithmetic import LARGEST
from toolkit.tasks.generators.episodes import ERROR_RATE, NOISE
from toolkit.types import Problem

LARGEST_OPERAND = 49  # of tasks.arithmetic


@dataclass(frozen=True)
class History:
    """A chain of additions, and the lines of thinking so far, some of them wrong.

    Attributes:
        problem: The chain. Its gold answer follows the history: it is the last total of the history plus the remaining operands.
        totals: The totals in the history, one per turn so far.
        wrong: One flag per total: True if it does not follow from the total before it.
    """

    problem: Problem
    totals: tuple[int, ...]
    wrong: tuple[bool, ...]

    @property
    def text(self) -> str:
        """The lines of thinking so far, such as ``17+5=22``, each with a line break at its end."""
        before = [self.problem.meta["start"], *self.totals]
        deltas = self.problem.meta["deltas"][: len(self.totals)]
        return "".join(f"{a}{delta:+d}={b}\n" for (a, b), delta in zip(pairwise(before), deltas, strict=True))


def planted(p: Problem, turns: int, rate: float = ERROR_RATE, seed: int = 0, *, noise: int = NOISE) -> History:
    """Return a history of ``turns`` lines for the chain ``p``, in which each total is made wrong with probability ``rate``.

    A total stays right if no error is possible. An error must keep all later totals within 0 to 99. It must also be one that ``explained``
    can explain by an operand from 1 to 49 with either sign. For equal seeds, the turns that are drawn at a low rate are a subset of those
    drawn at a higher rate.

    Args:
        p: A problem of ``running_sum.load``.
        turns: Number of lines, at least 1 and less than the number of turns of ``p``.
        rate: Probability of an error per turn, 0 to 1.
        seed: Seed of the errors. Problems get different errors.
        noise: Largest error: a wrong total is 1 to ``noise`` too high or too low.

    Raises:
        ValueError: ``p`` is not a chain of ``running_sum``, or an argument is out of its range.
    """
    if "deltas" not in p.meta or "start" not in p.meta:
        raise ValueError(f"{p.id} is of task {p.meta.get('task')!r} and has no deltas: give a problem of running_sum.load.")
    deltas: Sequence[int] = p.meta["deltas"]
    if not 1 <= turns < len(deltas) or not 0 <= rate <= 1 or noise < 1:
        raise ValueError(
            f"turns={turns}, rate={rate}, noise={noise}: need 1 to {len(deltas) - 1} turns for {p.id}, a rate from 0 to 1, and noise of at "
            "least 1."
        )
    truth = list(accumulate(deltas, initial=p.meta["start"]))[1:]
    rng, shift = random.Random(f"planted-{seed}-{p.id}"), 0  # shift: how much all later totals are too high
    totals, wrong = [], []
    for t, delta in enumerate(deltas[:turns]):
        hit, draw = rng.random() < rate, rng.random()  # both are drawn in any case, so that rates are nested
        low, high = -shift - min(truth[t:]), LARGEST - shift - max(truth[t:])
        possible = [off for off in range(max(low, -noise), min(high, noise) + 1) if off and 0 < abs(delta + off) <= LARGEST_OPERAND]
        wrong.append(hit and bool(possible))
        shift += possible[int(draw * len(possible))] if wrong[-1] else 0
        totals.append(truth[t] + shift)
    meta = {**p.meta, "error_rate": rate, "turns": turns}
    about = replace(p, id=f"{p.id}-planted{turns}-{rate:g}-{seed}", answer=str(truth[-1] + shift), meta=meta)
    return History(about, tuple(totals), tuple(wrong))


def explained(history: History) -> History:
    """Return a history with the same totals and without errors: the problem's operands are changed so that every total is right.

    The operands after the history stay, and so do the next line and the gold answer.
    """
    p, turns = history.problem, len(history.totals)
    start = p.meta["start"]
    deltas = (*(b - a for a, b in pairwise([start, *history.totals])), *p.meta["deltas"][turns:])
    expression = f"{start}" + "".join(f"{delta:+d}" for delta in deltas)
    meta = {**p.meta, "expression": expression, "deltas": deltas}
    messages = ({"role": "user", "content": f"{expression}=?"},)
    return History(replace(p, id=f"{p.id}-explained", messages=messages, meta=meta), history.totals, (False,) * turns)
