"""A calculator for exact arithmetic with whole numbers and decimals. It reads the expression with ``ast`` and never runs it as code."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

from toolkit.tools.base import ToolError

LONGEST = 200  # characters of an expression
BITS = 256  # largest size of a numerator or denominator, about 77 digits
DIGITS = 12  # significant digits of a result that is not a whole number

OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
"""Node of a binary operation -> its function. Powers are not in it, because their size has to be checked first."""


def calculate(expression: str) -> str:
    """Compute an arithmetic expression.

    It may contain numbers, parentheses and the operators + - * / // % and ** with a whole exponent. The result is exact if it is a whole
    number; otherwise it has 12 significant digits.

    >>> calculate("(12 + 3) * 4"), calculate("1/3"), calculate("0.1 + 0.2")
    ('60', '0.333333333333', '0.3')

    Args:
        expression: The expression, such as (12 + 3) * 4.

    Raises:
        ToolError: the expression cannot be read, has other elements, divides by zero, or a number in it is too large.
    """
    if len(expression) > LONGEST:
        raise ToolError("too large", f"the expression has {len(expression)} characters, at most {LONGEST}")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body, expression.strip())
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ToolError("syntax", "this is not an arithmetic expression") from error
    except ZeroDivisionError as error:
        raise ToolError("division by zero", "a divisor is 0") from error
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.{DIGITS}g}"


def _value(node: ast.expr, source: str) -> Fraction:
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            return _bounded(Fraction(number))
        case ast.Constant(value=float()):
            return _bounded(_decimal(ast.get_source_segment(source, node) or ""))
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, source)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, source)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left, source), _value(right, source))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _bounded(Fraction(OPERATORS[type(op)](_value(left, source), _value(right, source))))
    raise ToolError("not allowed", f"{ast.unparse(node)[:40]!r} is not arithmetic")


def _decimal(literal: str) -> Fraction:
    """Return the value of a decimal as it is written: 0.1 is one tenth, not the nearest binary fraction."""
    number = Decimal(literal.replace("_", ""))
    # Checked first, because a fraction with a denominator such as 10**99999999 takes gigabytes.
    if number and abs(number.adjusted()) > BITS:
        raise ToolError("too large", "a number is too large")
    return Fraction(number) if number else Fraction(0)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ToolError("not allowed", "an exponent must be a whole number")
    size = max(abs(base.numerator), base.denominator).bit_length() - 1
    if size * abs(exponent.numerator) > BITS:
        raise ToolError("too large", "a power is too large")
    return _bounded(base**exponent.numerator)


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator).bit_length() > BITS:
        raise ToolError("too large", "a number is too large")
    return value
