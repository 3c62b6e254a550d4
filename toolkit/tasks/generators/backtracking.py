"""Chains of thought (*traces*) that solve countdown problems with exactly k dead ends.

After "How Much Backtracking is Enough?" (arXiv 2505.24273). A trace writes the steps of the solution. In between, it tries other steps (a
*dead end*) and goes back, k times in all. Example for k = 1, with the numbers 3, 4, 7, 25 and the target 110::

    Step 1: 4 * 25 = 100.
    Step 2: 100 - 7 = 93.
    Step 3: 93 + 3 = 96.
    That ends at 96, not at 110. Back to step 1.
    Step 2: 100 + 7 = 107.
    Step 3: 107 + 3 = 110.

Every step is correct arithmetic, and it is known which steps belong to dead ends. So traces have three uses:

- they test estimates of the share of failed steps, such as ``methods/failed_steps``, against the true share;
- they give short and long chains of thought for the same problem and answer;
- they are data for fine-tuning.

Deviations: with two dead ends or more, the paper's code repeats the same one; here all k differ. No step of a dead end results in the
target. Both are our choice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from toolkit.tasks.countdown import Operation, expression, random_chain, solution
from toolkit.types import Problem

T = TypeVar("T")
TRIES = 2000  # draws before a problem is said to have no more dead ends: our choice


@dataclass(frozen=True)
class TraceStep:
    """One step of a chain of thought that solves a countdown problem.

    A *dead end* is a sequence of steps that does not reach the target. After it, the chain of thought returns to the step before the
    dead end ("Back to step 1").

    Attributes:
        number: The step's number in the text, from 1. After "Back to step 1", the next step has number 2 again.
        move: The operation.
        dead_end: Index, from 0, of the dead end that the step belongs to; ``None`` for a step of the solution.
    """

    number: int
    move: Operation
    dead_end: int | None

    def __str__(self) -> str:
        return f"Step {self.number}: {self.move}."


@dataclass(frozen=True)
class Trace:
    """A chain of thought that solves a countdown problem, with its dead ends marked.

    A *dead end* is a sequence of steps that does not reach the target. After it, the chain of thought returns to the step before the
    dead end ("Back to step 1").

    Attributes:
        text: The text between the think tags.
        steps: All steps, including those in dead ends, in the order in which they are written.
        answer: The solution as an expression.
    """

    text: str
    steps: tuple[TraceStep, ...]
    answer: str

    @property
    def failed(self) -> tuple[int, ...]:
        """Indices in ``steps`` of the steps that belong to dead ends, and so not to the solution."""
        return tuple(i for i, step in enumerate(self.steps) if step.dead_end is not None)

    @property
    def dead_ends(self) -> int:
        """Number of dead ends in the chain of thought."""
        return len({step.dead_end for step in self.steps} - {None})


class NoDeadEndError(ValueError):
    """Fewer different dead ends than requested were found for a countdown problem. A *dead end* is a sequence of steps that fails."""


def trace(p: Problem, dead_ends: int, *, seed: int = 0) -> Trace:
    """Return a chain of thought that solves the countdown problem ``p`` and contains ``dead_ends`` different dead ends.

    In a *dead end*, it tries a sequence of steps that does not reach the target, and then goes back. Equal seeds give equal results.

    Raises:
        NoDeadEndError: 2000 random tries found fewer than ``dead_ends`` different dead ends.
        ValueError: the problem is not of ``tasks.countdown``.
    """
    operations, rng = solution(p), random.Random(f"{p.id}-{dead_ends}-{seed}")
    ends: list[tuple[int, tuple[Operation, ...]]] = []
    for _ in range(TRIES):
        if len(ends) == dead_ends:
            break
        start = rng.randrange(len(operations))
        wrong = _dead_end(rng, p, operations, start)
        if wrong is not None and (start, wrong) not in ends:
            ends.append((start, wrong))
    else:
        raise NoDeadEndError(
            f"Problem {p.id!r} has {len(ends)} different dead ends in {TRIES} tries, not {dead_ends}: ask for fewer."
        )
    return _written(p, operations, sorted(ends, key=lambda end: end[0]))


def _dead_end(rng: random.Random, p: Problem, operations: Sequence[Operation], start: int) -> tuple[Operation, ...] | None:
    """Return a random dead end that branches off the solution before its operation with index ``start``, or ``None``.

    The dead end consists of operations that use up the numbers still unused at that point. Return ``None`` if the operations drawn are
    invalid, begin with the solution's next operation, or reach the target.
    """
    # Numbers still unused. At start 0 these are all, and the first operation may begin with any of them; later it begins with the total.
    left = [operations[0].left, *(o.right for o in operations)] if start == 0 else [o.right for o in operations[start:]]
    rng.shuffle(left)
    chain = random_chain(rng, left if start == 0 else [operations[start].left, *left])
    if chain is None or chain[0] == operations[start] or any(o.result == p.meta["target"] for o in chain):
        return None
    return tuple(chain)


def _written(p: Problem, operations: Sequence[Operation], ends: Sequence[tuple[int, tuple[Operation, ...]]]) -> Trace:
    steps: list[TraceStep] = []
    lines: list[str] = []

    def write(step: TraceStep) -> None:
        steps.append(step)
        lines.append(str(step))

    done = 0  # operations of the solution written so far
    for k, (start, wrong) in enumerate(ends):
        for i in range(done, start):
            write(TraceStep(i + 1, operations[i], None))
        done = start
        for i, o in enumerate(wrong, start):
            write(TraceStep(i + 1, o, k))
        lines.append(f"That ends at {wrong[-1].result}, not at {p.meta['target']}. Back to step {start}.")
    for i in range(done, len(operations)):
        write(TraceStep(i + 1, operations[i], None))
    return Trace("\n".join(lines) + "\n", tuple(steps), expression(operations))


def mismatched(traces: Sequence[T], *, seed: int = 0) -> list[T]:
    """Return the same traces in another order, such that no problem keeps its own: the control with the structure but the wrong content.

    How the paper shuffles, we could not read; here each problem gets the trace, with its answer, of another problem. Equal seeds give
    equal orders.

    Args:
        traces: One trace per problem, at least two.
        seed: Seed of the order.

    Raises:
        ValueError: fewer than two traces.
    """
    if len(traces) < 2:
        raise ValueError(f"{len(traces)} traces: at least two are needed, so that each problem can get the trace of another.")
    order = random.Random(f"mismatched-{seed}").sample(range(len(traces)), len(traces))
    # Each problem gets the trace of the next one in a random circle.
    following = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [traces[following[i]] for i in range(len(traces))]


def examples(
    problems: Sequence[Problem], dead_ends: int, *, seed: int = 0, tags: tuple[str, str] = ("<think>", "</think>")
) -> list[dict]:
    """Return one conversation per countdown problem, for fine-tuning: ``{"messages": [...]}`` with the question and a reply.

    The reply is a chain of thought between think tags, and then the answer.

    Args:
        dead_ends: Number of dead ends (failed sequences of steps) in each chain of thought; see ``trace``.
        tags: Opening and closing think tag.

    Raises:
        NoDeadEndError: for some problem, fewer different dead ends were found.
    """
    rows = []
    for p in problems:
        written = trace(p, dead_ends, seed=seed)
        reply = {"role": "assistant", "content": f"{tags[0]}\n{written.text}{tags[1]}\n{written.answer}"}
        rows.append({"messages": [*map(dict, p.messages), reply]})
    return rows
