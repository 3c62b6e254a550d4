"""Chains of thought (*traces*) for sums, with a given number of operations per line: short chains of large steps, or long ones of small steps.

After "When more is less: understanding chain-of-thought length" (arXiv 2502.07266), whose synthetic arithmetic varies the size t of a step. A
problem with T operations has about T / t lines. Example with t = 2 for ``3+4+8+1``::

    3+4+8=5
    5+1=6

The sums are of digits, modulo 10, so that a small model can learn them in a minute: a line with t operations is one of 10^(t + 1) facts.

Deviations: how the paper's sums look, we could not read; sums of digits modulo 10 are ours. The last line has the operations that are left.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from toolkit.tasks import splits
from toolkit.types import Problem

MODULUS = 10


def problem(rng: random.Random, split: str, operations: int) -> Problem:
    """Draw random sums of digits until one belongs to ``split``, and return it. A hash of the sum decides the split.

    ``meta["difficulty"]`` is the number of operations, ``meta["digits"]`` the digits.

    Args:
        rng: Source of every random choice.
        split: ``"train"``, ``"dev"`` or ``"test"``.
        operations: Number of additions, T; one less than the number of digits.
    """
    splits.check_split(split)
    while True:
        digits = [rng.randrange(MODULUS) for _ in range(operations + 1)]
        expression = "+".join(map(str, digits))
        if splits.split_of(expression) == split:
            break
    meta = {"task": "digit_sums", "split": split, "difficulty": operations, "digits": digits}
    return Problem(f"digit_sums-{expression}", ({"role": "user", "content": f"{expression}=?"},), str(sum(digits) % MODULUS), meta)


def lines(digits: Sequence[int], size: int) -> list[str]:
    """Return the lines of the chain of thought of a sum, each with ``size`` additions; the last line has those that are left.

    >>> lines([3, 4, 8, 1], 2)
    ['3+4+8=5', '5+1=6']

    Args:
        digits: The digits to add, at least two.
        size: Additions per line, t; at least 1.

    Raises:
        ValueError: fewer than two digits, or a size below 1.
    """
    if len(digits) < 2 or size < 1:
        raise ValueError(f"{len(digits)} digits, size={size}: need at least two digits and one addition per line.")
    total, written = digits[0], []
    for at in range(1, len(digits), size):
        added = digits[at : at + size]
        expression = "+".join(map(str, [total, *added]))
        total = (total + sum(added)) % MODULUS
        written.append(f"{expression}={total}")
    return written


def response(p: Problem, size: int, *, tags: tuple[str, str] = ("<think>", "</think>")) -> str:
    """Return the text of a response to a sum: its chain of thought with ``size`` additions per line, between tags, and the answer.

    Args:
        p: A problem from ``problem``.
        size: Additions per line.
        tags: Opening and closing think tag.
    """
    text = "\n".join(lines(p.meta["digits"], size))
    return f"{tags[0]}{text}\n{tags[1]}{p.answer}"
