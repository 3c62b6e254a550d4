"""Check countdown answers: does an expression of the given numbers equal the target? Values are computed as exact fractions."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

LONGEST_ANSWER = 400  # characters at the end of an answer that are searched for an expression
_SYMBOLS: Mapping[str, str] = {
    "×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "−": "-", "–": "-", r"\times": "*", r"\cdot": "*", r"\div": "/", r"\left": "",
    r"\right": "", "`": "",
}  # fmt: skip
# ** is a power between two numbers that are equally far from it, as in "2 ** 3" and "2**3". Elsewhere it makes text bold.
_POWER_OR_BOLD = re.compile(r"([\d)](\s*)\*\*\2(?=[\d(]))|\*\*")
_TIMES = re.compile(r"(?<=[\d)])\s*[xX]\s*(?=[\d(])")
_RUN = re.compile(r"[\d(][\d +*/()-]*")  # digits, operators and brackets
_APART = re.compile(r"(?<=[\d)]) +(?=[\d(])")  # blanks between two expressions, as in "1) 4 + 3 (7)"
_OPERATION = re.compile(r"\d\s*\)*\s*[+*/-]\s*\(*\s*\d")  # an operator between two numbers

_OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def verify(text: str, numbers: Sequence[int], target: int, *, every: bool = False) -> bool:
    r"""Return True if the last expression in ``text`` equals ``target`` and uses only numbers in ``numbers``, each at most once.

    In ``expression = value``, only the expression counts. An expression may contain only whole numbers, ``+ - * /`` and brackets. The signs
    ``x``, ``\times`` and ``\cdot`` are read as ``*``. Marks of bold text and of code do not matter, nor does a bracket or a dash after the
    expression, as in ``4 + 3 (so 7)``.

    Args:
        text: The answer. Only its last 400 characters are searched.
        numbers: The given numbers. One that is listed twice may be used twice.
        target: The value that the expression must have.
        every: If True, the expression must use every number.

    >>> verify("So it is (4 * 25) - 7 = 93.", [4, 7, 25, 50], 93)
    True
    """
    expressions = [e for run in _RUN.findall(_unmarked(text[-LONGEST_ANSWER:])) for e in _expressions(run)]
    if not expressions:
        return False
    try:
        value, used = _value(ast.parse(expressions[-1], mode="eval").body)
    except (SyntaxError, ZeroDivisionError, ValueError):
        return False
    # <= on Counters: no number is used more often than it is given.
    return value == target and (Counter(used) == Counter(numbers) if every else Counter(used) <= Counter(numbers))


def _unmarked(text: str) -> str:
    """Return a text with the operators of Python, and without marks of bold text and of code."""
    for symbol, plain in _SYMBOLS.items():
        text = text.replace(symbol, plain)
    return _TIMES.sub(" * ", _POWER_OR_BOLD.sub(lambda mark: mark[1] or "", text))


def _expressions(run: str) -> list[str]:
    """Return the parts of a run of digits, operators and brackets that have an operator between two numbers.

    A bracket without a partner ends a part: it belongs to the words around the expression, as in "(so 4 + 3)". If an operator joins it to
    a part, as in "4 * (3", it stays, and the part is no valid expression.
    """
    parts = []
    for piece in _APART.split(run.rstrip("+-*/( ")):
        opened, alone = [], []  # indices of brackets that are still open, and of those without a partner
        for i, sign in enumerate(piece):
            if sign == "(":
                opened.append(i)
            elif sign == ")":
                alone += [] if opened else [i]
                opened = opened[:-1]
        cuts = [i for i in sorted(alone + opened) if not _joined(piece, i)]
        parts += [piece[a + 1 : b] for a, b in pairwise([-1, *cuts, len(piece)])]
    return [part.strip() for part in parts if _OPERATION.search(part)]


def _joined(piece: str, at: int) -> bool:
    """Return True if an operator stands before the opening bracket, or after the closing bracket, at index ``at``."""
    beside = piece[:at].rstrip()[-1:] if piece[at] == "(" else piece[at + 1 :].lstrip()[:1]
    return beside != "" and beside in "+-*/"


def _value(node: ast.AST) -> tuple[Fraction, list[int]]:
    """Return the value of an expression and the numbers in it. Raise ValueError for anything but numbers and the four operations."""
    match node:
        case ast.Constant(value=int(number)):
            return Fraction(number), [number]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            (a, used), (b, more) = _value(left), _value(right)
            return _OPERATORS[type(op)](a, b), used + more
    raise ValueError(f"{ast.dump(node)} is not a number and not one of + - * /.")
