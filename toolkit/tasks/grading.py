"""Grading of answers: exact numbers for our own tasks, math-verify for mathematics."""

from __future__ import annotations

import re

from toolkit.types import Problem

_NUMBER = re.compile(r"(?<!\d)-?\d[\d,]*(?:\.\d+)?")  # a minus after a number is no sign: "12-5" ends in 5


def last_number(text: str) -> str | None:
    """The last number of a text without thousands separators, or ``None``."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "").rstrip(".") if found else None


def grade(problem: Problem, answer: str) -> bool:
    """Whether ``answer`` (the text after the think span) gives the problem's gold answer.

    ``meta["grader"]`` chooses: ``"math"`` verifies with math-verify (the ``[tasks]`` extra), anything else compares the
    last number of the text with the gold number.
    """
    if problem.meta.get("grader") == "math":
        return _verified(problem.answer, answer)
    number, gold = last_number(answer), last_number(problem.answer)
    return number is not None and gold is not None and float(number) == float(gold)


def _verified(gold: str, answer: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("Grading mathematics needs math-verify: pip install 'reasoning-length-toolkit[tasks]'.") from error
    # A gold answer such as \frac{1}{2} parses only inside a mathematics environment.
    return bool(verify(parse(f"${gold}$", parsing_timeout=None), parse(answer, parsing_timeout=None), timeout_seconds=None))
