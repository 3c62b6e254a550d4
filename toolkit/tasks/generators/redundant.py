"""Pairs of concise and redundant chains of thought for the same problem, with labels: data for a judge of conciseness.

A concise chain has one line per operation, all right. Its redundant version has more lines, planted at random places, of two kinds::

    wait 17+5=22 ok    a re-check of an earlier line
    17+5=22            a restatement: an earlier line again

The label is the share of planted lines, and ``score`` maps it to the scale of the conciseness reward model (CRM, arXiv:2511.09158), from 0.1
to 1. In the paper a model of 72 billion parameters gives such scores to sampled responses; here they are known (ours).

A judge may learn length instead of conciseness, because a redundant chain is longer. ``equal_lengths`` makes pairs of different problems in
which both chains have the same number of lines.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.tasks.arithmetic import parse
from toolkit.types import Problem

KINDS = ("re-check", "restatement")
LOWEST = 0.1  # score of a chain in which nearly every line is planted


@dataclass(frozen=True)
class Chain:
    """A chain of thought with its labels.

    Attributes:
        problem: The problem that it solves.
        lines: Its lines.
        planted: Index of each planted line -> its kind.
    """

    problem: Problem
    lines: tuple[str, ...]
    planted: dict[int, str]

    @property
    def text(self) -> str:
        """The whole response: thinking between its tags, then the right answer."""
        return "<think>" + "".join(f"{line}\n" for line in self.lines) + f"</think>{self.problem.answer}"

    @property
    def score(self) -> float:
        """Conciseness from 0.1 to 1: ``1 - 0.9 s`` with s the share of planted lines."""
        return 1.0 - (1.0 - LOWEST) * len(self.planted) / len(self.lines)


def concise(problem: Problem) -> Chain:
    """Return the chain with one line per operation of an arithmetic problem.

    Raises:
        ValueError: the problem is of another task.
    """
    if "expression" not in problem.meta:
        raise ValueError(
            f"{problem.id} is of task {problem.meta.get('task')!r} and has no expression: give a problem of arithmetic.load."
        )
    values, signs = parse(problem.meta["expression"])
    lines, total = [], values[0]
    for sign, value in zip(signs, values[1:], strict=True):
        before, total = total, total + (value if sign == "+" else -value)
        lines.append(f"{before}{sign}{value}={total}")
    return Chain(problem, tuple(lines), {})


def redundant(chain: Chain, count: int, rng: random.Random, kinds: Sequence[str] = KINDS) -> Chain:
    """Return a chain with ``count`` planted lines, each a re-check or a restatement of a line of ``chain`` that stands before it.

    Args:
        chain: A concise chain.
        count: Number of planted lines, at least 1.
        rng: Source of every random choice.
        kinds: Kinds to plant. Restatements alone have no word that gives them away.
    """
    # A planted line is written behind a line of the chain, and repeats this line or an earlier one.
    places = sorted(rng.randrange(len(chain.lines)) for _ in range(count))
    lines: list[str] = []
    planted: dict[int, str] = {}
    for i, line in enumerate(chain.lines):
        lines.append(line)
        for _ in range(places.count(i)):
            kind, repeated = rng.choice(kinds), chain.lines[rng.randint(0, i)]
            planted[len(lines)] = kind
            lines.append(f"wait {repeated} ok" if kind == "re-check" else repeated)
    return Chain(chain.problem, tuple(lines), planted)


def pairs(problems: Sequence[Problem], seed: int, most: int = 4) -> list[tuple[Chain, Chain]]:
    """Return for each problem its concise chain and a redundant version with 1 to ``most`` planted lines."""
    rng = random.Random(f"redundant-{seed}")
    plain = [concise(p) for p in problems]
    return [(chain, redundant(chain, rng.randint(1, most), rng)) for chain in plain]


def equal_lengths(problems: Sequence[Problem], seed: int, kinds: Sequence[str] = KINDS) -> list[tuple[Chain, Chain]]:
    """Return pairs of a concise and a redundant chain of different problems, with as many lines; each problem is used once at most.

    A judge that has learned length alone is right in about half of them. The redundant chain is of the shorter problem; training pairs are
    of one problem, so a judge cannot learn this from them.

    Args:
        problems: Arithmetic problems.
        seed: Seed of all random choices.
        kinds: Kinds of planted lines.
    """
    rng, waiting, made = random.Random(f"equal-lengths-{seed}"), list(problems), list[tuple[Chain, Chain]]()
    waiting.sort(key=lambda p: (p.meta["difficulty"], p.id))
    while len(waiting) > 1:
        long, short = concise(waiting.pop()), concise(waiting.pop(0))
        if (more := len(long.lines) - len(short.lines)) >= 1:
            made.append((long, redundant(short, more, rng, kinds)))
    return made
