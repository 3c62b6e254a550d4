"""Compare an SQL query with the right one by the rows that they return."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache

from toolkit.tools.base import ToolError
from toolkit.tools.sql import Database

_ORDERED = re.compile(r"\border\s+by\b[^()]*$", re.IGNORECASE)
_INNERMOST = re.compile(r"\([^()]*\)")  # parentheses without others inside
_FENCE = re.compile(r"```(?:sql)?\s*(.*?)```", re.IGNORECASE | re.DOTALL)


def query_of(answer: str) -> str:
    """Return the query in an answer: the last block between ``` marks if there is one, else the whole answer.

    >>> query_of("Here: ```sql select 1 ```")
    'select 1'
    """
    blocks = _FENCE.findall(answer)
    return (blocks[-1] if blocks else answer).strip()


@lru_cache(maxsize=1024)  # a few hundred problems, with several databases each
def _database(schema: str) -> Database:
    return Database(schema)


def executes_like(query: str, gold: str, schema: str) -> bool:
    """Return True if a query gives the rows of the right one. A query that is refused, fails or takes too long gives False.

    Names of columns do not matter, and the order of rows matters only if the right query ends with ORDER BY. A query that asks something
    else can give the same rows by accident, above all in a small table or if the right result is empty. So judge it on several databases.

    >>> executes_like("select b from t where a = 1", "select b from t where a < 2", "create table t (a, b); insert into t values (1, 7);")
    True

    Args:
        query: The query to judge.
        gold: The right query.
        schema: SQL script that makes the tables.

    Raises:
        ToolError: the right query fails.
    """
    database = _database(schema)
    right = database.read(gold)
    try:
        rows = database.read(query)
    except ToolError:
        return False
    return rows == right if _ordered(gold) else Counter(rows) == Counter(right)


def _ordered(query: str) -> bool:
    """Return True if a query ends with ORDER BY outside of parentheses."""
    while (shorter := _INNERMOST.sub(" ", query)) != query:
        query = shorter
    return bool(_ORDERED.search(query))
