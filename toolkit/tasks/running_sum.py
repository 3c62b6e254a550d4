"""Running sums over many turns: after how many turns does a model fail?

After "The Illusion of Diminishing Returns" (arXiv 2509.09677). The task has two forms:

- *chains*, such as ``17+5-9+...=?``, for ``tiny-reasoner``. Each added or subtracted operand is one turn. By default a chain has 2 to 24
  turns; the model was trained on at most 7. Running totals stay between 0 and 99. ``execution_of`` reads the totals that the model writes in
  its thinking.
- *episodes*, for any language model, as in the paper. They are conversations: the user first gives a dictionary from words to integers,
  and then, in each turn, K words whose values are to be added (``generators/episodes.py``).

Both forms can be given a history with wrong totals: ``planted`` and ``with_history_errors``.

``grading/execution.py`` checks the totals that the model writes. It compares accuracy with p^H: the accuracy expected after H steps if
each step is right with probability p.

Deviations: chains are ours. If the model writes several totals for one turn of a chain, the last one counts, so an error that it corrects
is no error. The operands that the model writes are aligned with those of the problem by minimum edit distance. So leaving out or repeating
an operand makes one step wrong, but not the steps after it.

Units: a horizon is a number of turns. In a chain, each addition or subtraction is one turn.
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
from toolkit.tasks.generators.planted import History, explained, planted
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
    "History",
    "align",
    "by_horizon",
    "execution_metrics",
    "execution_of",
    "explained",
    "horizon_length",
    "inject_history_errors",
    "judge",
    "load",
    "planted",
    "play",
    "problem",
    "read_rollout",
    "running_sum_episodes",
    "step_accuracy",
    "with_history_errors",
]

HORIZONS = (2, 24)  # range of the number of additions (or subtractions)
TRAINED = arithmetic.OPERANDS[1] - 1  # additions in the longest chain that tiny-reasoner was trained on

# _LINE: a step or a re-check, such as "22-9=13" or "wait 22-9=13 fix". "taken" holds the operands added in this line: "-9".
# _REST: the final total, such as "=36", after which the thinking ends.
_LINE = re.compile(r"(?P<wait>wait )?-?\d+(?P<taken>(?:[+-]\d+)+)=(?P<result>-?\d+)(?: ok| fix)?")
_REST = re.compile(r"=(?P<result>-?\d+)")


def problem(rng: random.Random, split: str, *, horizons: tuple[int, int] = HORIZONS) -> Problem:
    """Draw one random problem of ``split``: a chain of additions and subtractions, such as ``17+5-9=?``.

    Unlike in ``tasks.arithmetic``, no cue word such as "quick" is added to the prompt.

    Args:
        rng: Source of every random choice.
        split: ``"train"``, ``"dev"`` or ``"test"``.
        horizons: Fewest and most additions and subtractions (together) in the chain.
    """
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
    """Return ``n`` different problems of ``split`` ("train", "dev" or "test"): chains of additions and subtractions, such as ``17+5-9=?``.

    Equal seeds give equal problems. As in ``tasks.arithmetic``, a hash of the chain decides its split. ``tiny-reasoner`` was trained on
    chains of the train split only. So it has seen no chain of the dev and test splits, however short.

    Args:
        horizons: Fewest and most additions and subtractions (together) in a chain.

    Raises:
        ValueError: unknown split, a range that is empty or begins below 1, or fewer than ``n`` different chains in that range.
    """
    splits.check_split(split)
    low, high = horizons
    if not 1 <= low <= high:
        raise ValueError(f"horizons={horizons}: give an inclusive range of additions from 1 up, such as {HORIZONS}.")
    rng = random.Random(f"running_sum-{split}-{seed}")
    return splits.distinct(lambda: problem(rng, split, horizons=horizons), n)


def totals(p: Problem) -> list[int]:
    """Return the true running totals of the problem ``p``, one per addition or subtraction: for ``17+5-9=?``, ``[22, 13]``."""
    return list(accumulate(p.meta["deltas"], initial=p.meta["start"]))[1:]


# --- reading the thinking of tiny-reasoner -------------------------------------------------------------------


def read_rollout(lm: LM, rollout: Rollout, p: Problem) -> Execution:
    """Read the running totals that a rollout's thinking gives for the problem ``p``, and check them against the true ones.

    Return an Execution: the totals, and whether each is right. ``execution_of`` explains how totals are read.
    """
    return execution_of(p, "".join(step.text for step in steps.think_steps(lm, rollout)))


def execution_of(p: Problem, text: str) -> Execution:
    """Read the running totals that a chain of thought gives for the problem ``p``, and check them against the true ones.

    Return an Execution: the totals, and whether each is right.

    Three kinds of line give a total: a step such as ``22-9=13``, a re-check such as ``wait 22-9=13 fix``, and the final total such as
    ``=36``, written after skipping the remaining steps. Other lines are ignored.

    A step is right if its total equals the total written before it plus the step's operands in the problem. If the total before was 22, the
    line ``21-9=12`` is a wrong step, although the equation is true.

    Args:
        p: A problem of ``load``.
        text: The thinking of ``tiny-reasoner``.

    Raises:
        ValueError: ``p`` is not a problem of ``running_sum.load``.
    """
    if "deltas" not in p.meta or "start" not in p.meta:
        raise ValueError(f"{p.id} is of task {p.meta.get('task')!r} and has no deltas: give a problem of running_sum.load.")
    deltas, lines = list(p.meta["deltas"]), [text[a:b].strip() for a, b in steps.step_ranges(text, steps.lines)]
    stated = [m for line in lines if (m := _LINE.fullmatch(line) or _REST.fullmatch(line))]
    # Operands per line. Re-checks repeat those of the line before, so theirs are not aligned. A final total (_REST) has none.
    taken = [[] if "wait" not in m.re.groupindex or m["wait"] else _signed(m["taken"]) for m in stated]
    turns = iter(align([v for values in taken for v in values], deltas))
    outputs: list[int | None] = [None] * len(deltas)
    at = 0  # number of turns done; a re-check replaces the total of turn ``at``
    for m, values in zip(stated, taken, strict=True):
        for _ in values:
            at = next(turns)
        at = len(deltas) if m.re is _REST else at
        if at:
            outputs[at - 1] = int(m["result"])
    return judge(outputs, deltas, start=p.meta["start"])


def align(written: Sequence[int], operands: Sequence[int]) -> list[int]:
    """Align the operands that a response wrote with the problem's operands, by minimum edit distance.

    Return one number per written operand: the position, from 1, of the problem's operand that it is aligned with. In the example, the
    response left out -9, so its second operand is aligned with the problem's third. A surplus operand gets the number of the operand
    written before it, or 0 if there is none.

    An edit is an operand that is misread, left out, or surplus. Operands of the problem that are missing at the end are not edits, since
    the response may have been cut off.

    Several alignments may have the fewest edits. Then an operand is counted as misread rather than as left out or surplus. If an operand is
    written twice in a row, the second one is surplus.

    >>> align([5, 23], [5, -9, 23])
    [1, 3]
    """
    # cost[i][j]: fewest edits between the first i operands written and the first j of the problem.
    n, m = len(written), len(operands)
    cost = [list(range(m + 1))] + [[i + 1] + [0] * m for i in range(n)]
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            same = cost[i - 1][j - 1] + (written[i - 1] != operands[j - 1])
            cost[i][j] = min(same, cost[i - 1][j] + 1, cost[i][j - 1] + 1)
    # Go back along the cheapest path. It ends at the j with the fewest edits; of equal ones, at the largest j.
    j = max(range(m + 1), key=lambda j: (-cost[n][j], j))
    done, i = [], n
    while i:
        # In order of preference: misread, surplus, left out, equal.
        misread = j and written[i - 1] != operands[j - 1]
        if misread and cost[i][j] == cost[i - 1][j - 1] + 1:
            done.append(j)
            i, j = i - 1, j - 1
        elif cost[i][j] == cost[i - 1][j] + 1:
            done.append(j)
            i -= 1
        elif j and cost[i][j] == cost[i][j - 1] + 1:
            j -= 1
        else:
            done.append(j)
            i, j = i - 1, j - 1
    return done[::-1]


def _signed(expression: str) -> list[int]:
    return [int(v) for v in re.findall(r"[+-]?\d+", expression)]
