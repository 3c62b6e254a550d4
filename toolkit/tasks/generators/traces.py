"""Training traces of the tiny reasoner: step by step, hasty, with re-checks and slips.

A trace is the text between the think tags. Its lines end in a newline and are of three kinds::

    17+5=22            a step (or ``17+5-9=13``: two operands at once)
    wait 17+5=22 ok    a re-check of the step before; ``fix`` instead of ``ok`` if that step was a slip
    =36                the final result, without the remaining steps

Every line start and every operand's end is a random *decision*: end the step or add an operand, re-check, or skip the rest. The decisions
of one trace are independent given its ``haste``. So the trace itself does not tell how hasty it is: the model must carry that along
from the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

SKIP, WAIT = "=", "wait "


@dataclass(frozen=True)
class Habits:
    """Probabilities of a trace's decisions.

    Attributes:
        default_haste: Probability of skipping the rest at a line start, without any of the pushes below.
        ease_push: Added to it if the problem is easy.
        cue_push: Added to it if the prompt has a cue word.
        mood_push: Added to it in a share ``mood_share`` of all traces, at random.
        mood_share: That share.
        continue_share: Probability, times haste, of taking one more operand into a step.
        wait_calm: Probability of a re-check in a calm trace.
        wait_hasty: The same in a hasty trace (haste above twice the default).
        slip_easy: Probability that a step of an easy problem is a slip.
        slip_hard: The same for other problems.
        max_waits: Most re-checks per trace.
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
    """A written trace.

    Attributes:
        text: The text between the think tags.
        conclusion: The answer that it reaches, right or wrong.
        failed_lines: Indices of the lines that are slips.
        waits: Number of re-checks.
        haste: Its probability of skipping the rest at a line start.
    """

    text: str
    conclusion: str
    failed_lines: tuple[int, ...]
    waits: int
    haste: float


def haste(habits: Habits, *, easy: bool, cue: bool, rng: random.Random) -> float:
    """Draw a trace's haste: the probability of skipping the rest at a line start."""
    mood = rng.random() < habits.mood_share
    return habits.default_haste + habits.ease_push * easy + habits.cue_push * cue + habits.mood_push * mood


@dataclass(frozen=True)
class Move:
    """One step of a solution.

    Attributes:
        expression: Left side of its line.
        result: The right result.
        slipped: A wrong result.
    """

    expression: str
    result: str
    slipped: str


def write(
    moves_from: Callable[[str | None, int, int], Move], n_moves: int, *, h: float, easy: bool, habits: Habits, rng: random.Random
) -> Trace:
    """Write a trace for a solution of ``n_moves`` elementary moves.

    Args:
        moves_from: ``moves_from(state, i, k) -> Move`` combines ``k`` elementary moves from move ``i`` on. ``state`` is the last result
            (``None`` at the start; wrong after an uncorrected slip).
        n_moves: Number of elementary moves to the answer.
        h: Haste of this trace, see ``haste``.
        easy: Whether the problem is easy, so that slips are rare.
        habits: Probabilities of the decisions.
        rng: Source of every random choice.
    """
    hasty = h > 2 * habits.default_haste
    p_wait = habits.wait_hasty if hasty else habits.wait_calm
    p_slip = habits.slip_easy if easy else habits.slip_hard
    lines: list[str] = []
    failed: list[int] = []
    state, waits, i, checkable = None, 0, 0, None
    while True:
        # Re-check the step before; a slip is corrected.
        if checkable and waits < habits.max_waits and rng.random() < p_wait:
            move, slipped = checkable
            lines.append(f"{WAIT}{move.expression}={move.result} {'fix' if slipped else 'ok'}")
            state, waits, checkable = move.result, waits + 1, None
            continue
        if i == n_moves:
            break
        # Skip the rest.
        if rng.random() < h:
            state = moves_from(state, i, n_moves - i).result
            lines.append(f"{SKIP}{state}")
            break
        # Write one step of k moves, which may be a slip.
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
