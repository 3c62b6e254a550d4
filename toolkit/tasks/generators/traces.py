"""How the tiny reasoner's training traces are written: step by step, hasty, re-checked, slipped.

A trace is text between the think tags. Lines end in a newline and are of three kinds::

    17+5=22        a step (or ``17+5-9=13``: two operands taken at once)
    wait 17+5=22 ok    a re-check of the step before; ``fix`` instead of ``ok`` if it had slipped
    =36            everything that is left, in the head

Every line start and every operand's end is a *decision*: close the step or go on, re-check, or skip the
rest. The decisions of one trace are independent given its ``haste``, so the push towards short thinking
is not readable off the trace: the model has to carry it along from the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

SKIP, WAIT = "=", "wait "


@dataclass(frozen=True)
class Habits:
    """How a writer of traces behaves. Probabilities are per decision.

    ``haste`` is ``default_haste`` plus the pushes that apply: an easy-looking problem, a cue word in the
    prompt, or (rarely) no reason at all.
    """

    default_haste: float = 0.012
    ease_push: float = 0.15
    cue_push: float = 0.34
    mood_push: float = 0.40
    mood_share: float = 0.04
    continue_share: float = 0.6
    wait_calm: float = 0.18
    wait_hasty: float = 0.03
    slip_easy: float = 0.005
    slip_hard: float = 0.02
    max_waits: int = 3


@dataclass(frozen=True)
class Trace:
    """A written trace: its text, what it concludes, and which lines are failed steps (slips)."""

    text: str
    conclusion: str
    failed_lines: tuple[int, ...]
    waits: int
    haste: float


def haste(habits: Habits, *, easy: bool, cue: bool, rng: random.Random) -> float:
    """Probability of skipping the rest at a line start, given what pushes towards short."""
    mood = rng.random() < habits.mood_share
    return habits.default_haste + habits.ease_push * easy + habits.cue_push * cue + habits.mood_push * mood


@dataclass(frozen=True)
class Move:
    """One elementary step of a solution: ``before`` is what the line states, ``after`` what it concludes."""

    expression: str
    result: str
    slipped: str


def write(
    moves_from: Callable[[str | None, int, int], Move], n_moves: int, *, h: float, easy: bool, habits: Habits, rng: random.Random
) -> Trace:
    """Write a trace for a solution of ``n_moves`` elementary moves.

    Args:
        moves_from: ``moves_from(state, i, k) -> Move`` taking ``k`` moves at once from move ``i`` on, where
            ``state`` is the conclusion so far (``None`` at the start; wrong after an uncorrected slip).
        n_moves: Number of elementary moves to the answer.
        h: Haste of this trace, see :func:`haste`.
        easy: Whether slips are rare.
        habits: The writer's probabilities.
        rng: Source of every choice.
    """
    hasty = h > 2 * habits.default_haste
    p_wait = habits.wait_hasty if hasty else habits.wait_calm
    p_slip = habits.slip_easy if easy else habits.slip_hard
    lines: list[str] = []
    failed: list[int] = []
    state, waits, i, checkable = None, 0, 0, None
    while True:
        if checkable and waits < habits.max_waits and rng.random() < p_wait:
            move, slipped = checkable
            lines.append(f"{WAIT}{move.expression}={move.result} {'fix' if slipped else 'ok'}")
            state, waits, checkable = move.result, waits + 1, None
            continue
        if i == n_moves:
            break
        if rng.random() < h:
            state = moves_from(state, i, n_moves - i).result
            lines.append(f"{SKIP}{state}")
            break
        k = 1
        while i + k < n_moves and rng.random() < habits.continue_share * h:
            k += 1
        move = moves_from(state, i, k)
        slipped = rng.random() < p_slip
        if slipped:
            failed.append(len(lines))
        state = move.slipped if slipped else move.result
        lines.append(f"{move.expression}={state}")
        checkable, i = (move, slipped), i + k
    return Trace("\n".join(lines) + "\n", str(state), tuple(failed), waits, h)
