"""A bound of the work that SQLite does to compile a query, before it runs the first instruction."""

from __future__ import annotations

import math
import re
from collections import Counter

_TOKEN = re.compile(
    r"--[^\n]*|/\*.*?(?:\*/|$)|'(?P<single>(?:[^']|'')*)'|\"(?P<double>(?:[^\"]|\"\")*)\"|\[(?P<square>[^\]]*)\]|`(?P<back>[^`]*)`|(?P<word>\w+)|(?P<mark>[()])",
    re.DOTALL,
)


def expansions(query: str) -> float:
    """Return an upper bound of the number of copies of common table expressions (WITH) that SQLite makes to compile a query.

    The number of copies can grow exponentially with the length of a query, and the limit on instructions does not apply while SQLite compiles.
    The bound counts each occurrence of such a table's name as a reference. A name that is defined twice gives infinity, because scopes are
    not followed.

    >>> expansions("with a as (select 1), b as (select 1 from a, a), c as (select 1 from b, b) select 1 from c")
    26.0

    Args:
        query: The query.
    """
    tokens = [
        token for match in _TOKEN.finditer(query) if (token := next((t for t in match.groups() if t is not None), "").lower())
    ]
    bodies: dict[str, Counter[str]] = {}
    for at, token in enumerate(tokens):
        if token == "as" and (start := _body(tokens, at)):
            name = _defined(tokens, at)
            if name in bodies:
                return math.inf
            bodies[name] = Counter(tokens[start : _closing(tokens, start)])
    sizes: dict[str, float] = {}

    def size(name: str, above: tuple[str, ...] = ()) -> float:
        if name not in sizes:
            others = {other: n for other, n in bodies[name].items() if other in bodies and other not in (*above, name)}
            sizes[name] = 1.0 + sum(n * size(other, (*above, name)) for other, n in others.items())
        return sizes[name]

    return float(sum(n * size(name) for name, n in Counter(tokens).items() if name in bodies))


def _body(tokens: list[str], at: int) -> int:
    """Return the index of the first token in the parentheses that follow ``as`` at index ``at``; 0 if none follow."""
    at += 1
    while tokens[at : at + 1] in (["not"], ["materialized"]):
        at += 1
    return at + 1 if tokens[at : at + 1] == ["("] else 0


def _defined(tokens: list[str], at: int) -> str:
    """Return the name that stands before ``as`` at index ``at``, and before a list of columns in parentheses if there is one."""
    at -= 1
    if at >= 0 and tokens[at] == ")":
        depth = 0
        while at >= 0:
            depth += (tokens[at] == ")") - (tokens[at] == "(")
            at -= 1
            if not depth:
                break
    return tokens[at] if at >= 0 else ""


def _closing(tokens: list[str], start: int) -> int:
    """Return the index of the parenthesis that closes the one before ``start``, or the number of tokens."""
    depth = 1
    for at in range(start, len(tokens)):
        depth += (tokens[at] == "(") - (tokens[at] == ")")
        if not depth:
            return at
    return len(tokens)
