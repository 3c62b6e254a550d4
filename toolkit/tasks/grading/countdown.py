"""Check countdown answers: does an expression of the given numbers equal the target? Values are computed as exact fractions."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

LONGEST_ANSWER = 400  # characters at the end of an answer that are searched for an expression

_OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def verify(text: str, numbers: Sequence[int], target: int, *, every: bool = False) -> bool:
    """Return True if the last expression in ``text`` equals ``target`` and uses only numbers in ``numbers``, each at most once.

    In ``expression = value``, only the expression counts. An expression may contain only whole numbers, ``+ - * /`` and brackets.

    Args:
        text: The answer. Only its last 400 characters are searched.
        numbers: The given numbers. One that is listed twice may be used twice.
        target: The value that the expression must have.
        every: If True, the expression must use every number.

    >>> verify("So it is (4 * 25) - 7 = 93.", [4, 7, 25, 50], 93)
    True
    """
    end = text[-LONGEST_ANSWER:].replace("×", "*").replace("÷", "/").replace("−", "-")
    # Runs of digits, operators and brackets; of these, the ones that have an operator between two numbers.
    candidates = [e.strip() for e in re.findall(r"[\d(][\d +*/()-]*", end)]
    expressions = [e for e in candidates if re.search(r"\d\s*\)*\s*[+*/-]\s*\(*\s*\d", e)]
    if not expressions:
        return False
    try:
        value, used = _value(ast.parse(expressions[-1], mode="eval").body)
    except (SyntaxError, ZeroDivisionError, ValueError):
        return False
    # <= on Counters: no number is used more often than it is given.
    return value == target and (Counter(used) == Counter(numbers) if every else Counter(used) <= Counter(numbers))


def _value(node: ast.AST) -> tuple[Fraction, list[int]]:
    """Return the value of an expression and the numbers in it. Raise ValueError for anything but numbers and the four operations."""
    match node:
        case ast.Constant(value=int(number)):
            return Fraction(number), [number]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            (a, used), (b, more) = _value(left), _value(right)
            return _OPERATORS[type(op)](a, b), used + more
    raise ValueError(f"{ast.dump(node)} is not a number and not one of + - * /.")
