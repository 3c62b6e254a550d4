"""The part of a response's thinking after the first right answer, which DECS charges for length (arXiv:2509.25827)."""

from __future__ import annotations

import re

import numpy as np

from toolkit.lm import LM
from toolkit.steps import think_steps
from toolkit.types import Problem, Rollout, Span

NUMBER = re.compile(r"-?\d+")
CHECK = re.compile(r"\s*wait\b", re.IGNORECASE)  # lines of our generators that repeat the step before


def redundant_span(lm: LM, rollout: Rollout, problem: Problem) -> Span | None:
    """Return the tokens of the thinking after the first line that holds the right answer, as positions in the response; ``None`` if none.

    A line holds the right answer if its last number is ``problem.answer``. Lines that begin with "wait" repeat a step and do not count.
    In the task ``arithmetic``, an intermediate result may equal the final one by chance. The problem's expression says how often, and so
    many lines are skipped. So the position is exact if the response calculates from left to right. In other tasks the first line counts.

    Args:
        lm: Model whose tokenizer decodes the rollout.
        rollout: The rollout; it need not be right.
        problem: Its problem.
    """
    chance = intermediate_results(str(problem.meta.get("expression", ""))).count(problem.answer)
    for step in think_steps(lm, rollout):
        numbers = NUMBER.findall(step.text)
        if CHECK.match(step.text) or not numbers or numbers[-1] != problem.answer:
            continue
        if chance:
            chance -= 1
            continue
        assert rollout.think is not None  # it has steps
        start, stop = (position - rollout.prompt_len for position in (step.span.stop, rollout.think.stop))
        return Span(start, stop) if start < stop else None
    return None


def intermediate_results(expression: str) -> list[str]:
    """Return the results of an expression with + and -, from left to right, without the last; ``[]`` for any other text.

    >>> intermediate_results("5+10+6-9")
    ['15', '21']
    """
    if not re.fullmatch(r"\d+([+-]\d+)+", expression):
        return []
    results = np.cumsum([int(term) for term in re.findall(r"[+-]?\d+", expression)])
    return [str(value) for value in results[1:-1]]
