"""Tasks of any length on sequences of numbers, for decoders that are trained from scratch: copy, reverse, sort, add, parity, count.

They follow the algorithmic tasks of arXiv 2305.19466 (and counting of arXiv 2310.16028). An example is a prompt and its answer, both lists
of token ids. The vocabulary is shared: the numbers 0 to 63, then ``BEGIN``, ``THEN`` (after the prompt), ``END``, ``PLUS`` and ``ASK``.

Deviations: ours are tokens, not text. Numbers to be added are written with the lowest digit first. Numbers to be sorted are different.

Units: the length n of an example is the number of elements of its prompt; in ``addition`` the number of digits of each number, in ``count``
the number of elements of the answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

NUMBERS = 64
BEGIN, THEN, END, PLUS, ASK = range(NUMBERS, NUMBERS + 5)
VOCABULARY = NUMBERS + 5
SILENT = -100  # target that no loss counts, as in torch


@dataclass(frozen=True)
class Example:
    """One example of a task.

    Attributes:
        prompt: Token ids that are given.
        answer: Token ids to write after ``THEN``, without ``END``.
        notes: One label per token of the prompt, for a second head of the model; empty if there are none.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    notes: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        """Return all tokens: ``BEGIN``, prompt, ``THEN``, answer, ``END``."""
        return [BEGIN, *self.prompt, THEN, *self.answer, END]


Draw = Callable[[random.Random, int], Example]
"""A function that draws one example of a given length."""


def copy(rng: random.Random, n: int) -> Example:
    """Draw n numbers, to be written again. Few of them are equal."""
    numbers = _numbers(rng, n)
    return Example(numbers, numbers)


def reverse(rng: random.Random, n: int) -> Example:
    """Draw n numbers, to be written backwards. Few of them are equal."""
    numbers = _numbers(rng, n)
    return Example(numbers, numbers[::-1])


def sort(rng: random.Random, n: int) -> Example:
    """Draw n different numbers, to be written in increasing order.

    Raises:
        ValueError: n is more than 64, the number of different numbers.
    """
    numbers = tuple(rng.sample(range(NUMBERS), n))
    return Example(numbers, tuple(sorted(numbers)))


def addition(rng: random.Random, n: int) -> Example:
    """Draw two numbers of n digits, to be added. All numbers have their lowest digit first; the sum has n + 1 digits.

    >>> addition(random.Random(3), 2)  # 93 + 28 = 121
    Example(prompt=(3, 9, 67, 8, 2), answer=(1, 2, 1), notes=())
    """
    first, second = _numbers(rng, n, 10), _numbers(rng, n, 10)
    total, answer = _value(first) + _value(second), []
    for _ in range(n + 1):
        total, digit = divmod(total, 10)
        answer.append(digit)
    return Example((*first, PLUS, *second), tuple(answer))


def parity(rng: random.Random, n: int) -> Example:
    """Draw n bits; the answer is their sum modulo 2."""
    bits = _numbers(rng, n, 2)
    return Example(bits, (sum(bits) % 2,))


def count(rng: random.Random, n: int) -> Example:
    """Draw the first and the last of n consecutive numbers, to be written with all numbers between them.

    Raises:
        ValueError: n is more than 64, the number of numbers.
    """
    first = rng.randrange(NUMBERS - n + 1)
    return Example((first, first + n - 1), tuple(range(first, first + n)))


TASKS: Mapping[str, Draw] = {
    "sort": sort, "addition": addition, "copy": copy, "reverse": reverse, "parity": parity, "count": count,
}  # fmt: skip


def padded(examples: Sequence[Example]) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Return input tokens, targets and notes of a batch, as rows of equal length.

    The target at a position is the token that follows it, if that belongs to the answer (with ``END``). All other targets are ``SILENT``,
    so are the notes of all tokens but those of a prompt. Rows are padded with ``END`` on the right, which a causal model never sees.
    """
    rows = [e.tokens for e in examples]
    width = max(map(len, rows)) - 1
    inputs = [row[:-1] + [END] * (width + 1 - len(row)) for row in rows]
    targets, notes = [], []
    for e, row in zip(examples, rows, strict=True):
        silent = [SILENT] * (width + 1 - len(row))
        targets.append([SILENT] * (1 + len(e.prompt)) + row[2 + len(e.prompt) :] + silent)
        noted = [SILENT, *(e.notes or [SILENT] * len(e.prompt))]
        notes.append(noted + [SILENT] * (width - len(noted)))
    return inputs, targets, notes


def _numbers(rng: random.Random, n: int, below: int = NUMBERS) -> tuple[int, ...]:
    return tuple(rng.randrange(below) for _ in range(n))


def _value(digits: Sequence[int]) -> int:
    """Return the number that digits denote, lowest first."""
    return sum(digit * 10**i for i, digit in enumerate(digits))
