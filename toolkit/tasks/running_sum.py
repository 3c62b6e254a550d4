"""Running sums over many turns: does a model lose the thread, and when? The Illusion of Diminishing Returns (arXiv 2509.09677).

Two forms:

- *chains* in the tiny reasoner's alphabet, ``17+5-9+...=?``, up to 24 additions and more where it was trained on 7; running totals
  stay within 0..99, and every line of its thinking states one, so each can be checked (:func:`read`);
- *episodes* for language models, the paper's own: a dictionary of words and integers, K keys a turn (``episodes.py``).

How totals are judged, and p^H, is in ``execution.py``.

Deviations: chains are ours. In them the total stated last on a turn counts, so a slip that is found and mended is none. Which
additions a line takes is read off by aligning the operands written with those asked for (least edits), so that one left out or done
twice is one wrong step and does not spoil the steps after it.

Units: a horizon is a number of additions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import accumulate

from toolkit import steps
from toolkit.lm import LM
from toolkit.tasks import arithmetic, splits
from toolkit.tasks.generators.episodes import (
    Episode,
    inject_history_errors,
    play,
    running_sum_episodes,
    with_history_errors,
)
from toolkit.tasks.grading.execution import (
    Execution,
    by_horizon,
    execution_metrics,
    horizon_length,
    judge,
    step_accuracy,
)
from toolkit.types import Problem, Rollout

__all__ = [
    "Episode",
    "Execution",
    "aligned",
    "by_horizon",
    "execution_metrics",
    "horizon_length",
    "inject_history_errors",
    "judge",
    "load",
    "of",
    "play",
    "problem",
    "read",
    "running_sum_episodes",
    "step_accuracy",
    "with_history_errors",
]

HORIZONS = (2, 24)
TRAINED = arithmetic.OPERANDS[1] - 1  # additions in the longest chain the tiny reasoner was trained on

_LINE = re.compile(r"(?P<wait>wait )?-?\d+(?P<taken>(?:[+-]\d+)+)=(?P<result>-?\d+)(?: ok| fix)?")
_REST = re.compile(r"=(?P<result>-?\d+)")


def problem(rng: random.Random, split: str, *, horizons: tuple[int, int] = HORIZONS) -> Problem:
    """Draw one chain of ``split``, without a word around it; ``horizons`` is the inclusive range of additions."""
    h = rng.randint(*horizons)
    expression = arithmetic.problem(rng, split, operands=(h + 1, h + 1)).meta["expression"]
    start, *deltas = _signed(expression)
    meta = {
        "task": "running_sum",
        "split": split,
        "difficulty": h,
        "longer": h > TRAINED,
        "expression": expression,
        "start": start,
        "deltas": tuple(deltas),
    }
    content = f"{expression}=?"
    return Problem(f"running_sum-{content}", ({"role": "user", "content": content},), str(start + sum(deltas)), meta)


def load(split: str = "test", n: int = 200, seed: int = 0, *, horizons: tuple[int, int] = HORIZONS) -> list[Problem]:
    """``n`` distinct chains of ``split``, the same ones for the same seed. Their splits are those of ``tasks.arithmetic``: no chain of
    the test split was trained on, however short.

    Raises:
        ValueError: unknown split, or a range of horizons that does not go up from 1.
    """
    splits.check_split(split)
    low, high = horizons
    if not 1 <= low <= high:
        raise ValueError(f"horizons={horizons}: give an inclusive range of additions from 1 up, such as {HORIZONS}.")
    rng = random.Random(f"running_sum-{split}-{seed}")
    return splits.distinct(lambda: problem(rng, split, horizons=horizons), n)


def totals(p: Problem) -> list[int]:
    """The true running total after each addition."""
    return list(accumulate(p.meta["deltas"], initial=p.meta["start"]))[1:]


# --- reading the tiny reasoner's thinking --------------------------------------------------------------------


def of(lm: LM, rollout: Rollout, p: Problem) -> Execution:
    """The totals that a rollout's thinking states, judged; none stated if it did not think."""
    return read(p, "".join(step.text for step in steps.think_steps(lm, rollout)))


def read(p: Problem, text: str) -> Execution:
    """The totals that thinking states (``22-9=13``, ``wait 22-9=13 fix``, ``=36`` for the rest at once), judged.

    Each is judged against what the model stated before it, whatever it wrote on the left of its line: a total copied wrongly is a
    wrong step. Lines of any other form are passed over.

    Raises:
        ValueError: not a chain of this task.
    """
    if "deltas" not in p.meta or "start" not in p.meta:
        raise ValueError(f"{p.id} is of task {p.meta.get('task')!r} and has no deltas: give a problem of running_sum.load.")
    deltas, lines = list(p.meta["deltas"]), [text[a:b].strip() for a, b in steps.step_ranges(text, steps.lines)]
    found = [m for line in lines if (m := _LINE.fullmatch(line) or _REST.fullmatch(line))]
    # Re-checks repeat operands that were taken before, so they are not aligned.
    taken = [[] if "wait" not in m.re.groupindex or m["wait"] else _signed(m["taken"]) for m in found]
    reached = iter(aligned([v for values in taken for v in values], deltas))
    outputs: list[int | None] = [None] * len(deltas)
    at = 0
    for m, values in zip(found, taken, strict=True):
        for _ in values:
            at = next(reached)
        at = len(deltas) if m.re is _REST else at
        if at:
            outputs[at - 1] = int(m["result"])
    return judge(outputs, deltas, start=p.meta["start"])


def aligned(written: Sequence[int], asked: Sequence[int]) -> list[int]:
    """How many of the operands ``asked`` for are dealt with after each one ``written``, by the least number of edits.

    An edit is an operand misread, left out, or written once too often; what is asked for after the last one written costs nothing, as
    a response may have been cut off. Among equals: misread first; and of two operands alike, the earlier one is the right one.
    """
    n, m = len(written), len(asked)
    cost = [list(range(m + 1))] + [[i + 1] + [0] * m for i in range(n)]
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            same = cost[i - 1][j - 1] + (written[i - 1] != asked[j - 1])
            cost[i][j] = min(same, cost[i - 1][j] + 1, cost[i][j - 1] + 1)
    j = max(range(m + 1), key=lambda j: (-cost[n][j], j))
    found, i = [], n
    while i:
        misread = j and written[i - 1] != asked[j - 1]
        if misread and cost[i][j] == cost[i - 1][j - 1] + 1:
            found.append(j)
            i, j = i - 1, j - 1
        elif cost[i][j] == cost[i - 1][j] + 1:
            found.append(j)
            i -= 1
        elif j and cost[i][j] == cost[i][j - 1] + 1:
            j -= 1
        else:
            found.append(j)
            i, j = i - 1, j - 1
    return found[::-1]


def _signed(expression: str) -> list[int]:
    return [int(v) for v in re.findall(r"[+-]?\d+", expression)]
