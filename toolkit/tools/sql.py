"""An SQLite database in memory, which a model may query and cannot change."""

from __future__ import annotations

import re
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from toolkit.tools.base import ToolError
from toolkit.tools.expanding import expansions

LARGEST = 2_000  # bytes of a value or a row; some functions take time proportional to its square
CHECK_EVERY = 20  # SQLite's instructions between two checks of the limits
LONGEST = 2_000  # characters of a query
EXPANSIONS = 1_000  # SQLite copies a common table expression for each reference to it, before it counts any instruction
SECONDS = 10.0  # a last resort: a query whose single instructions are slow ends after this time
EXPLAIN = re.compile(r"(?:[\s;\ufeff]|--[^\n]*\n|/\*(?:[^*]|\*(?!/))*\*/)*explain\b", re.IGNORECASE)  # after spaces and comments
FUNCTIONS = frozenset((
    "abs", "avg", "char", "coalesce", "count", "glob", "group_concat", "ifnull", "iif", "instr", "length", "like", "lower", "ltrim", "max",
    "min", "nullif", "replace", "round", "rtrim", "sign", "substr", "substring", "sum", "total", "trim", "typeof", "unicode", "upper",
    "row_number", "rank", "dense_rank", "lag", "lead", "first_value", "last_value",
))  # fmt: skip
"""Functions that a query may use. All are deterministic: random numbers and the current time are not among them."""


@dataclass(frozen=True)
class Database:
    """A database in memory that is made from a script. The method ``sql`` is the tool: ``Tool(database.sql)``.

    Every query runs on a fresh copy, so that no query can affect another. Limits on work are counted in instructions of SQLite's virtual
    machine. So a query is cut at the same point on every machine with the same version of SQLite, unless it takes more than ``SECONDS``.

    >>> towns = Database("create table towns (name, people); insert into towns values ('Ao', 3), ('Bei', 5);")
    >>> print(towns.sql("select name from towns where people > 4"))
    name
    Bei

    Attributes:
        script: SQL statements that create the tables and fill them.
        rows: Largest number of rows in a result. If there are more, a last line says so.
        steps: Largest number of instructions of SQLite's virtual machine per query.
    """

    script: str
    rows: int = 20
    steps: int = 1_000_000

    def __post_init__(self) -> None:
        if self.rows < 1 or self.steps < CHECK_EVERY:
            raise ValueError(f"rows={self.rows}, steps={self.steps}: need at least 1 row and {CHECK_EVERY} steps.")
        _ = self._image  # an error in the script is raised now, not at the first query

    @cached_property
    def _image(self) -> bytes:
        with closing(sqlite3.connect(":memory:")) as connection:
            try:
                connection.executescript(self.script)
                connection.commit()
                return connection.serialize()  # fails for a database without a table
            except sqlite3.Error as error:
                raise ValueError(
                    f"The script of the database fails: {error}. It begins with {self.script[:60]!r}. Give statements that make a table."
                ) from error

    def sql(self, query: str) -> str:
        """Run one SELECT query on the database and return the rows, one per line, after a line with the names of the columns.

        Args:
            query: The query in SQLite's dialect.

        Raises:
            ToolError: the query is wrong, would do something else than read, or takes too many steps.
        """
        names, rows = self._fetch(query, self.rows + 1)
        lines = [" | ".join(names), *(" | ".join(map(_text, row)) for row in rows[: self.rows])]
        more = [f"(more than {self.rows} rows)"] if len(rows) > self.rows else [] if rows else ["(no rows)"]
        return "\n".join([*lines, *more])

    def read(self, query: str, *, most: int = 10_000) -> list[tuple[Any, ...]]:
        """Run one SELECT query on the database and return all its rows as values.

        Args:
            query: The query in SQLite's dialect.
            most: Largest number of rows.

        Raises:
            ToolError: the query is wrong, would do something else than read, takes too many steps, or has more rows.
        """
        rows = self._fetch(query, most + 1)[1]
        if len(rows) > most:
            raise ToolError("too large", f"the query has more than {most:,} rows")
        return rows

    def _fetch(self, query: str, most: int) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Return the names of the columns and the first rows of a query."""
        if len(query) > LONGEST:
            raise ToolError("too large", f"the query has {len(query):,} characters, at most {LONGEST:,}")
        if EXPLAIN.match(query):  # SQLite's authorizer does not tell it from a SELECT
            raise ToolError("not allowed", "only a SELECT query")
        if (copies := expansions(query)) > EXPANSIONS:
            raise ToolError("too large", f"the query copies its WITH tables {copies:.3g} times, at most {EXPANSIONS:,}")
        with closing(sqlite3.connect(":memory:")) as connection:
            connection.deserialize(self._image)
            self._restrict(connection)
            try:
                cursor = connection.execute(query)
                rows = cursor.fetchmany(most)
            except (sqlite3.Error, sqlite3.Warning) as error:
                raise self._refusal(error) from error
            names = [column[0] for column in cursor.description or ()]
        if not names:
            raise ToolError("not allowed", "only a SELECT query")
        return names, rows

    def _restrict(self, connection: sqlite3.Connection) -> None:
        # SQLite reads the schema at the first query, and the limits below would refuse a long CREATE TABLE as a value that is too large.
        connection.execute("select 1 from sqlite_schema").fetchall()
        connection.execute("pragma query_only = on")
        connection.execute("pragma temp_store = memory")  # a large sort must not write to the disk
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 100)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.set_authorizer(_authorize)
        left, end = [self.steps // CHECK_EVERY], time.monotonic() + SECONDS

        def count() -> int:
            left[0] -= 1
            return int(left[0] < 0 or time.monotonic() > end)  # anything but 0 interrupts the query

        connection.set_progress_handler(count, CHECK_EVERY)

    def _refusal(self, error: Exception) -> ToolError:
        message = str(error)
        if "interrupted" in message:
            return ToolError("step limit", f"the query took more than {self.steps:,} steps, or {SECONDS:g} s")
        if "not authorized" in message or "prohibited" in message:
            return ToolError("not allowed", "only a SELECT query with deterministic functions")
        if "too big" in message:
            return ToolError("too large", f"a value has more than {LARGEST:,} bytes")
        return ToolError("sql", message)


def _authorize(action: int, first: str | None, second: str | None, database: str | None, source: str | None) -> int:
    """Return SQLite's answer to a request of a query: allow reading and the functions in ``FUNCTIONS``, deny anything else."""
    if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE):
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FUNCTIONS:
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def _text(value: object) -> str:
    if value is None:
        return "NULL"
    return value.hex() if isinstance(value, bytes) else str(value)
