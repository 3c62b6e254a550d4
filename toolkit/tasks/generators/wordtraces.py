"""Synthetic chains of thought (*traces*) that ``smol-reasoner`` was trained on: English sentences with equations, one line per step.

The random decisions are those of ``traces.py``: skip to the final result, combine several steps in one line, or re-check the previous step.
One thing differs: every wrong result (*slip*) is corrected in the next line, so that all later lines are right. Steps, re-checks and final
results may begin with the same words, so that the first word of a line does not reveal its kind.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.tasks.generators import traces
from toolkit.tasks.generators.traces import Trace
from toolkit.tasks.wordproblems import Step
from toolkit.types import Problem

HABITS = traces.Habits(
    default_haste=0.02,
    ease_push=0.2,
    cue_push=0.38,
    mood_push=0.38,
    mood_share=0.08,
    continue_share=0.5,
    wait_calm=0.12,
    wait_hasty=0.02,
    slip_easy=0.01,
    slip_hard=0.03,
    max_waits=2,
)
BEGIN_SHARE = 0.6  # share of the story traces with little haste that state the story's first number in their first line

_STEP = {
    "+": ("{e} = {c}.", "Adding {b} gives {e} = {c}.", "{b} more makes {e} = {c}.", "Then there are {e} = {c}{t}.", "Now it is {e} = {c}."),
    "-": ("{e} = {c}.", "Taking away {b} gives {e} = {c}.", "{b} fewer makes {e} = {c}.", "Then there are {e} = {c}{t}.", "Now it is {e} = {c}."),
    "*": ("{e} = {c}.", "{b} times as many makes {e} = {c}.", "That is {e} = {c}.", "Now it is {e} = {c}."),
    "/": ("{e} = {c}.", "Divided by {b} it is {e} = {c}.", "That is {e} = {c}.", "Now it is {e} = {c}."),
}  # fmt: skip
_APART = ("{a} times {b} is {e} = {c}{t}.", "{e} = {c}{t}.", "That is {e} = {c}{t} together.", "{a} groups of {b} are {e} = {c}.")
_SEVERAL = ("{e} = {c}.", "That makes {e} = {c}.", "Then there are {e} = {c}{t}.", "Together it is {e} = {c}.")
_BEGIN = ("First there are {a}{t}.", "It starts with {a}{t}.", "We have {a}{t}.", "There are {a}{t} at first.")
_SKIP = ("That makes {c} in the end.", "Then there are {c}{t}.", "Together it is {c}.", "So it comes to {c}.", "Now it is {c}{t}.")
_CHECK = ("Let me check: {e} = {c}, right.", "{e} is {c}, yes.", "Again, {e} = {c}, that is right.", "Is it {c}? Yes, {e} = {c}.")
_MEND = (
    "Let me check: {e} = {c}, not {s}.", "No, {e} is {c}, not {s}.", "Again, {e} = {c}, so {s} was wrong.", "Is it {s}? No, {e} = {c}.",
    "Wait, {e} = {c}.",
)  # fmt: skip
_ANSWER = ("The answer is {c}.", "The answer is {c}{t}.", "{c}{t}.", "So it is {c}.", "It is {c}{t}.")


@dataclass(frozen=True)
class _Pen:
    """Writer of lines with random wordings.

    Attributes:
        rng: Source of the random choices.
        things: The things that the story counts; ``""`` for plain arithmetic.
    """

    rng: random.Random
    things: str

    def line(self, wordings: Sequence[str], **numbers: object) -> str:
        return self.rng.choice(wordings).format(t=f" {self.things}" if self.things else "", **numbers)


def expression(steps: Sequence[Step]) -> str:
    """Return consecutive steps as one expression, such as ``(12 + 5) * 2`` or ``20 - 3 * 4``."""
    text, last = f"{steps[0].left} {steps[0].op} {steps[0].right}", steps[0]
    for step in steps[1:]:
        if last.apart:  # its product replaces the right operand: "20 - 3 * 4"
            text = f"{step.left} {step.op} {last}" if last is steps[0] else f"{text} {step.op} {last}"
        elif not step.apart:
            # A product or quotient of a sum needs brackets.
            tight = step.op in "*/" and any(op in text for op in "+-")
            text = f"({text}) {step.op} {step.right}" if tight else f"{text} {step.op} {step.right}"
        last = step
    return text


def write(p: Problem, rng: random.Random, habits: traces.Habits = HABITS) -> Trace:
    """Return a random chain of thought for a word problem, as training data. Its final answer is always right.

    Before each step, the chain may skip to the final result. The probability is called *haste*. It is higher if the problem is easy
    (``p.meta["easy"]``), higher if the prompt has a phrase such as "Be brief.", and highest with both. See ``traces.haste``.

    Args:
        p: A problem of ``tasks.wordproblems``.
        rng: Source of every random choice.
        habits: Probabilities of the random decisions, such as re-checking a step or writing a wrong result, which the next line corrects.
    """
    easy, steps, pen = p.meta["easy"], p.meta["steps"], _Pen(rng, p.meta["things"])
    h = traces.haste(habits, easy=easy, cue=p.meta["cue"], rng=rng)
    calm = h <= 2 * habits.default_haste
    p_wait, p_slip = (habits.wait_calm if calm else habits.wait_hasty), (habits.slip_easy if easy else habits.slip_hard)
    lines: list[str] = []
    failed: list[int] = []
    i, waits = 0, 0
    if calm and pen.things and rng.random() < BEGIN_SHARE:
        # The story's first number. A side computation does not begin with it, so then it is on the left of the next step.
        lines.append(pen.line(_BEGIN, a=steps[1 if steps[0].apart else 0].left))
    while i < len(steps):
        if rng.random() < h:
            lines.append(pen.line(_SKIP, c=steps[-1].result))
            break
        stop = i + 1
        while stop < len(steps) and rng.random() < habits.continue_share * h:
            stop += 1
        stop += steps[stop - 1].apart and stop > i + 1  # combined steps do not end with a side computation
        taken, i = steps[i:stop], stop
        before, after = expression(taken), taken[-1].result
        slip = _slip(rng, after) if rng.random() < p_slip else None
        failed += [len(lines)] if slip is not None else []
        lines.append(_step(pen, taken, before, after if slip is None else slip))
        if slip is not None:
            lines.append(pen.line(_MEND, e=before, c=after, s=slip))
            waits += 1
        elif waits < habits.max_waits and rng.random() < p_wait:
            lines.append(pen.line(_CHECK, e=before, c=after))
            waits += 1
    conclusion = pen.line(_ANSWER, c=p.answer)
    return Trace("\n".join(lines), conclusion, tuple(failed), waits, h)


def _step(pen: _Pen, taken: Sequence[Step], before: str, after: int) -> str:
    """Return a line with the equation ``before = after``, in random wording.

    Args:
        taken: The steps that the equation combines, one or several.
        before: Left side of the equation, such as ``"20 - 3 * 4"``.
        after: Right side: the result, right or deliberately wrong.
    """
    if len(taken) > 1:
        return pen.line(_SEVERAL, e=before, c=after)
    (step,) = taken
    return pen.line(_APART if step.apart else _STEP[step.op], e=before, a=step.left, b=step.right, c=after)


def _slip(rng: random.Random, result: int) -> int:
    """Return a plausible wrong result: off by 1, 2 or 10."""
    # Not negative, hence abs. For 1 and 5, abs could give the right result again (|1 - 2| = 1, |5 - 10| = 5): only larger ones are drawn.
    return abs(result + rng.choice((-10, -2, -1, 1, 2, 10))) if result not in (1, 5) else result + rng.choice((1, 2, 10))


def response(trace: Trace) -> str:
    """Return the text of a whole response: the chain of thought ``trace`` between think tags, then its answer."""
    return f"<think>\n{trace.text}\n</think>\n{trace.conclusion}"
