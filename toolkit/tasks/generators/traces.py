"""Synthetic chains of thought (*traces*) that ``tiny-reasoner`` was trained on.

A trace is the text between the think tags. Each of its lines is of one of three kinds::

    17+5=22            a step (or ``17+5-9=13``: two operations at once)
    wait 17+5=22 ok    a re-check of the previous step, with the right result; ``fix`` instead of ``ok`` if that step had a wrong one
    =36                the final result, without the remaining steps

A *slip* is a step with a deliberately wrong result. *Haste* is the probability, before each step, of skipping to the final result without
the remaining steps. A trace's haste is drawn once and does not change.

At the start of every line, a random *decision* is made: re-check the previous step, skip to the final result, or write a step. A further
decision after every operation is whether the same step performs one more. Given the haste, all decisions are independent draws. So the
lines written so far reveal little about the haste, and a model that is trained on traces must infer it from the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

SKIP, WAIT = "=", "wait "


@dataclass(frozen=True)
class Habits:
    """Probabilities of the random decisions in a synthetic chain of thought (a *trace*), such as re-checking a step.

    A trace's *haste* is the probability, before each step, of skipping to the final result. It is ``default_haste`` plus up to three
    increments: ``ease_push``, ``cue_push`` and ``mood_push``.

    Attributes:
        default_haste: Haste without increments.
        ease_push: Increment if the problem is easy.
        cue_push: Increment if the prompt has a cue word, such as "quick".
        mood_push: Increment for randomly chosen traces, so that some are short although nothing in the prompt says so.
        mood_share: Probability that ``mood_push`` is added, 0 to 1.
        continue_share: The probability that a step performs one more operation is this number times the haste.
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
        haste: Probability, before each step, of skipping to the final result without the remaining steps.
    """

    text: str
    conclusion: str
    failed_lines: tuple[int, ...]
    waits: int
    haste: float


def haste(habits: Habits, *, easy: bool, cue: bool, rng: random.Random) -> float:
    """Draw a trace's haste: the probability, before each step, of skipping to the final result without the remaining steps.

    Args:
        habits: The default haste, and the increments that are added to it.
        easy: True if the problem is easy.
        cue: True if the prompt has a cue word, such as "quick".
        rng: Decides whether ``habits.mood_push`` is added, with probability ``habits.mood_share``.
    """
    mood = rng.random() < habits.mood_share
    return habits.default_haste + habits.ease_push * easy + habits.cue_push * cue + habits.mood_push * mood


@dataclass(frozen=True)
class Move:
    """One step of a chain of thought: a line ``expression=result``, which performs one or several operations of the solution.

    Attributes:
        expression: Left side of the line.
        result: The right result of the expression.
        slipped: A wrong result. If the step is chosen to be wrong, this is written in place of ``result``.
    """

    expression: str
    result: str
    slipped: str


def write(
    moves_from: Callable[[str | None, int, int], Move], n_moves: int, *, h: float, easy: bool, habits: Habits, rng: random.Random
) -> Trace:
    """Return a random chain of thought for a problem whose solution is a sequence of operations, such as additions.

    Each line that is a step performs one or several operations.

    Args:
        moves_from: Function that returns the next line (a Move), called as ``moves_from(state, i, k)``. The line performs ``k`` operations;
            the first of them has index ``i``, from 0. ``state`` is the result written last, which may be wrong; ``None`` at the start.
        n_moves: Number of operations in the whole solution.
        h: Haste: the probability, before each step, of skipping to the final result.
        easy: True if the problem is easy. Wrong results are then rarer.
        habits: Probabilities of the other random decisions.
        rng: Source of every random choice.
    """
    hasty = h > 2 * habits.default_haste
    p_wait = habits.wait_hasty if hasty else habits.wait_calm
    p_slip = habits.slip_easy if easy else habits.slip_hard
    lines: list[str] = []
    failed: list[int] = []
    # state: result so far; i: operations done; checkable: (previous step, True if it is a slip), or None if there is nothing to re-check.
    state, waits, i, checkable = None, 0, 0, None
    while True:
        # Re-check the previous step; a slip is corrected.
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
        # Write one step of k operations, which may be a slip.
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
