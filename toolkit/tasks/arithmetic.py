"""Chains of additions and subtractions; difficulty is the number of operands, 2 to 8.

A prompt reads ``17+5-9+23=?``, sometimes with a word such as "quick" or "please" before or after it (``generators/cues.py``). Running
totals stay between 0 and 99. Before a problem is drawn, an upper limit for its operands is drawn: 9, 19 or 49. A problem is *easy*
(``meta["easy"]``) if it has at most three operands and this limit is 9 or 19. In the training data of ``tiny-reasoner``, easy problems
have shorter chains of thought.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from toolkit.tasks import splits
from toolkit.tasks.generators import cues, traces
from toolkit.types import Problem

OPERANDS = (2, 8)  # range of the number of operands
LARGEST = 99  # largest running total


def problem(rng: random.Random, split: str, *, operands: tuple[int, int] = OPERANDS) -> Problem:
    """Draw random problems until one belongs to ``split``, and return it. A hash of the expression, such as ``17+5-9``, decides the split.

    Args:
        rng: Source of every random choice.
        split: ``"train"``, ``"dev"`` or ``"test"``.
        operands: Inclusive range of the number of operands.
    """
    while True:
        n = rng.randint(*operands)
        top = rng.choice((9, 19, 49))  # largest operand of this problem
        values, signs, total = [rng.randint(1, top)], [], 0
        total = values[0]
        for _ in range(n - 1):
            value = rng.randint(1, top)
            # A random sign if both keep the total within 0..LARGEST, else the one that does.
            sign = rng.choice("+-") if total - value >= 0 and total + value <= LARGEST else "+" if total < value else "-"
            total += value if sign == "+" else -value
            values.append(value)
            signs.append(sign)
        expression = str(values[0]) + "".join(s + str(v) for s, v in zip(signs, values[1:], strict=True))
        if splits.split_of(expression) == split:
            break
    content, word = cues.with_word(f"{expression}=?", rng)
    meta = {
        "task": "arithmetic",
        "split": split,
        "difficulty": n,
        "easy": n <= 3 and top <= 19,
        "word": word,
        "cue": word in cues.CUES,
        "expression": expression,
    }
    return Problem(f"arithmetic-{content}", ({"role": "user", "content": content},), str(total), meta)


def load(split: str, n: int = 200, seed: int = 0, *, operands: tuple[int, int] = OPERANDS) -> list[Problem]:
    """Return ``n`` different problems of ``split`` ("train", "dev" or "test"). Equal seeds give equal problems.

    Args:
        operands: Inclusive range of the number of operands.

    Raises:
        ValueError: unknown split, a range outside 2..8, or fewer than ``n`` different problems in that range.
    """
    splits.check_split(split)
    low, high = operands
    if not OPERANDS[0] <= low <= high <= OPERANDS[1]:
        raise ValueError(f"operands={operands}: give an inclusive range within {OPERANDS}.")
    rng = random.Random(f"arithmetic-{split}-{seed}")
    return splits.distinct(lambda: problem(rng, split, operands=operands), n)


def parse(expression: str) -> tuple[list[int], list[str]]:
    """Return the operands of an expression, and the plus and minus signs between them.

    >>> parse("17+5-9")
    ([17, 5, 9], ['+', '-'])
    """
    return [int(v) for v in re.findall(r"\d+", expression)], re.findall(r"[+-]", expression)


def write_trace(p: Problem, rng: random.Random, habits: traces.Habits = traces.Habits()) -> traces.Trace:
    """Return a random chain of thought for the problem ``p``, as training data. Its final result may be wrong.

    Before each step, the chain may skip to the final result. The probability is called *haste*. It is higher if the problem is easy
    (``p.meta["easy"]``), higher if the prompt has a cue word such as "quick", and highest with both. See ``traces.haste``.

    Args:
        p: A problem from ``arithmetic.load`` or ``arithmetic.problem``.
        rng: Source of every random choice.
        habits: Probabilities of the random decisions, such as re-checking a step or writing a wrong result.
    """
    values, signs = parse(p.meta["expression"])

    def moves_from(state: str | None, i: int, k: int) -> traces.Move:
        # One line: the total so far (``state``, possibly wrong), and the k operands from the one with index i + 1 on.
        start = int(state) if state is not None else values[0]
        tail = list(zip(signs[i : i + k], values[i + 1 : i + 1 + k], strict=True))
        result = start + _total(tail)
        slip = abs(result + rng.choice((-10, -2, -1, 1, 2, 10)))  # not negative, as totals never are
        if slip == result:  # for example |5 - 10| = 5
            slip += 1
        return traces.Move(f"{start}" + "".join(f"{s}{v}" for s, v in tail), str(result), str(slip))

    easy = p.meta["easy"]
    h = traces.haste(habits, easy=easy, cue=p.meta["cue"], rng=rng)
    return traces.write(moves_from, len(signs), h=h, easy=easy, habits=habits, rng=rng)


def _total(tail: Sequence[tuple[str, int]]) -> int:
    return sum(v if s == "+" else -v for s, v in tail)
