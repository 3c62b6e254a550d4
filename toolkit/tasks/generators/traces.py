"""Synthetic chains of thought (*traces*) that ``tiny-reasoner`` was trained on.

A trace is the text between the think tags. Each of its lines is of one of three kinds::

    17+5=22            a step (or ``17+5-9=13``: two operands at once)
    wait 17+5=22 ok    a re-check of the step before; ``fix`` instead of ``ok`` if the result of that step was wrong
    =36                the final result, without the remaining steps

A *slip* is a step with a deliberately wrong result. *Haste* is the probability, at the start of each line, of skipping to the final result
without the remaining steps.

At the start of every line, a random *decision* is made: re-check the step before, skip to the final result, or write a step. After every
operand, another one decides whether the step takes one more operand. Given the trace's haste, all decisions are independent. So the lines
written so far say little about the haste, and the model must infer it from the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

SKIP, WAIT = "=", "wait "


@dataclass(frozen=True)
class Habits:
    """Probabilities of a trace's random decisions.

    Attributes:
        default_haste: Haste without any of the additions below: the probability, at each line start, of skipping to the final result.
        ease_push: Added to the haste if the problem is easy.
        cue_push: Added to the haste if the prompt has a cue word.
        mood_push: Added to the haste of randomly chosen traces, so that some are short although nothing in the prompt says so.
        mood_share: Share of these randomly chosen traces, 0 to 1.
        continue_share: The probability of taking one more operand into a step is ``continue_share`` times the haste.
        wait_calm: Probability of a re-check after a step, in a trace whose haste is at most twice ``default_haste``.
        wait_hasty: Probability of a re-check after a step, in a trace with more haste.
        slip_easy: Probability that a step of an easy problem gets a wrong result.
        slip_hard: Probability that a step of any other problem gets a wrong result.
        max_waits: Largest number of re-checks per trace.
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
    """A synthetic chain of thought, with the random choices that made it.

    Attributes:
        text: The text between the think tags.
        conclusion: The text after the think tags: the answer that the trace leads to.
        failed_lines: Indices, from 0, of the lines with a deliberately wrong result.
        waits: Number of re-checks.
        haste: Probability, at the start of each line, of skipping to the final result without the remaining steps.
    """

    text: str
    conclusion: str
    failed_lines: tuple[int, ...]
    waits: int
    haste: float


def haste(habits: Habits, *, easy: bool, cue: bool, rng: random.Random) -> float:
    """Draw a trace's haste: the probability, at the start of each line, of skipping to the final result without the remaining steps.

    Args:
        easy: Whether the problem is easy.
        cue: Whether the prompt has a cue word, such as "quick".
    """
    mood = rng.random() < habits.mood_share
    return habits.default_haste + habits.ease_push * easy + habits.cue_push * cue + habits.mood_push * mood


@dataclass(frozen=True)
class Move:
    """One step of a solution: a line ``expression=result``.

    Attributes:
        expression: Left side of the line.
        result: The right result.
        slipped: A wrong result, which is written instead if the step is a slip.
    """

    expression: str
    result: str
    slipped: str


def write(
    moves_from: Callable[[str | None, int, int], Move], n_moves: int, *, h: float, easy: bool, habits: Habits, rng: random.Random
) -> Trace:
    """Write a random trace for a problem whose solution has ``n_moves`` elementary moves, such as adding one operand.

    Args:
        moves_from: Function ``moves_from(state, i, k) -> Move``. It combines ``k`` elementary moves, from the one with index ``i`` on, into
            one step. ``state`` is the result so far: ``None`` at the start, wrong after a slip that was not corrected.
        n_moves: Number of elementary moves from the start to the answer.
        h: Haste of this trace: the probability, at the start of each line, of skipping to the final result.
        easy: Whether the problem is easy; slips are then rarer.
        habits: Probabilities of the other decisions.
        rng: Source of every random choice.
    """
    hasty = h > 2 * habits.default_haste
    p_wait = habits.wait_hasty if hasty else habits.wait_calm
    p_slip = habits.slip_easy if easy else habits.slip_hard
    lines: list[str] = []
    failed: list[int] = []
    # state: result so far; i: moves done; checkable: the step before and whether it is a slip, or None if there is nothing to re-check.
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
