"""Text-to-SQL: questions about a generated table, in two languages, to be answered with an SQL query.

Each table has a name and five columns: a name, a place and three numbers from 10 to 99. A *language* is a set of templates and words for the columns. The
language ``en`` is plain English and uses the names of the columns; ``kesh`` is made up, and its words share nothing with the query. Every
question exists in both languages, with the same query. A hash of table and query decides the split, so both are in one split. Every right
query gives a value: of two queries without rows, no grader could tell which one is right.

The prompt states the ``create table`` statement, then the question. The rows are hidden. An answer is graded by the rows that its query
gives, as ``tools.queries.executes_like`` describes. It must give the right rows in several databases, so that a wrong query is not right by
accident: in that of the script ``meta["schema"]``, and in one per seed in ``meta["table_seeds"]`` (see ``another``). In each, a column of
numbers has every value once, and no two places have equally many rows, so that no other threshold or place gives the same result.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from toolkit.tasks import splits
from toolkit.types import Problem

LANGUAGES = ("en", "kesh")
TABLES = ("towns", "rivers", "hills", "lakes", "ships", "farms")
NUMBERS = ("people", "height", "age", "price", "length", "depth")
PLACES = ("north", "south", "east", "west")
SYLLABLES = ("ao", "bei", "cy", "dun", "el", "fra", "gor", "hin", "iva", "jo")
SMALLEST, LARGEST = 10, 99  # range of the numbers in a table; each value occurs once per column
TABLE_SEEDS = (1, 2)  # seeds of the databases on which an answer is judged beside that of ``meta["schema"]``
_DRAWN = 8  # rows that tell problems with the same columns and query apart; a hash of them and the query decides the split
KESH: Mapping[str, str] = {
    "towns": "mirak", "rivers": "sulom", "hills": "tobar", "lakes": "velni", "ships": "garuk", "farms": "podil", "name": "enu",
    "place": "zaro", "people": "kinda", "height": "ulpo", "age": "yemi", "price": "raku", "length": "osti", "depth": "wafe",
}  # fmt: skip
"""English word of a table or column -> its word in the made-up language."""
TEMPLATES: Mapping[str, Mapping[str, str]] = {
    "above": {
        "en": "Which {table} have a {column} above {number}? Give the name.",
        "kesh": "sha {column} eb {number} lo {table} ta? enu vo.",
    },
    "below": {
        "en": "Which {table} have a {column} below {number}? Give the name.",
        "kesh": "sha {column} un {number} lo {table} ta? enu vo.",
    },
    "count": {"en": "How many {table} have the place {place}?", "kesh": "quo {table} zaro {place} lo?"},
    "most": {
        "en": "Which of the {table} has the highest {column}? Give the name.",
        "kesh": "sha {table} {column} eb-eb lo? enu vo.",
    },
    "sum": {
        "en": "What is the total {column} of the {table} with the place {place}?",
        "kesh": "om {column} {table} zaro {place} ka?",
    },
}
"""Kind of question -> language -> template."""
QUERIES: Mapping[str, str] = {
    "above": "select name from {table} where {column} > {number}",
    "below": "select name from {table} where {column} < {number}",
    "count": "select count(*) from {table} where place = '{place}'",
    "most": "select name from {table} where {column} = (select max({column}) from {table})",
    "sum": "select sum({column}) from {table} where place = '{place}'",
}
"""Kind of question -> the right query."""


def problem(rng: random.Random, split: str, language: str | None = None) -> Problem:
    """Draw random problems until one belongs to ``split``, and return it.

    Args:
        rng: Source of every random choice.
        split: ``"train"``, ``"dev"`` or ``"test"``.
        language: One of ``LANGUAGES``; ``None`` to draw one.
    """
    while True:
        table, kind = rng.choice(TABLES), rng.choice([*QUERIES])
        columns = rng.sample(NUMBERS, 3)
        words = {"table": table, "column": rng.choice(columns), "number": rng.randint(20, 80), "place": rng.choice(PLACES)}
        schema, query = _schema(rng, table, columns), QUERIES[kind].format(**words)
        if splits.split_of(f"{schema} {query}") == split:
            break
    spoken = rng.choice(LANGUAGES)  # drawn even if it is given, so that both languages get the same questions
    spoken = language or spoken
    said = {k: KESH.get(str(w), w) if spoken == "kesh" else w for k, w in words.items()}
    question = TEMPLATES[kind][spoken].format(**said)
    pair = splits.digest(f"{schema} {query}")
    meta = {
        "task": "text_to_sql",
        "split": split,
        "difficulty": [*QUERIES].index(kind),
        "grader": "sql",
        "language": spoken,
        "kind": kind,
        "pair": pair,
        "schema": another(schema, 0),
        "table_seeds": TABLE_SEEDS,
        "gold_sql": query,
    }
    content = f"{schema.partition(';')[0]};\n{question}"
    return Problem(f"text-to-sql-{pair}-{spoken}", ({"role": "user", "content": content},), query, meta)


def _schema(rng: random.Random, table: str, columns: list[str]) -> str:
    names = sorted({f"{rng.choice(SYLLABLES)}{rng.choice(SYLLABLES)}" for _ in range(2 * _DRAWN)})
    rng.shuffle(names)
    rows = [
        f"('{name}', '{rng.choice(PLACES)}', {', '.join(str(rng.randint(SMALLEST, LARGEST)) for _ in columns)})"
        for name in names[:_DRAWN]
    ]
    return f"create table {table} (name, place, {', '.join(columns)}); insert into {table} values {', '.join(rows)};"


def another(schema: str, seed: int) -> str:
    """Return a script that makes the table of another script with other rows. Equal scripts and seeds give equal rows.

    The table has 90 rows. Names differ, each column of numbers has every whole number from 10 to 99 once, in random order, and no two
    places have equally many rows.

    Args:
        schema: Script of a problem of this task. Its first statement is kept.
        seed: Seed of the rows.
    """
    rng = random.Random(f"{schema} {seed}")
    create = schema.partition(";")[0]
    values = range(SMALLEST, LARGEST + 1)
    columns = [rng.sample(values, len(values)) for _ in create.split(",")[2:]]  # after name and place
    names = rng.sample([a + b for a in SYLLABLES for b in SYLLABLES], len(values))
    places = rng.choices(PLACES, k=len(values))
    while len({places.count(place) for place in PLACES}) < len(PLACES):
        places = rng.choices(PLACES, k=len(values))
    entries = zip(names, places, *columns, strict=True)
    rows = [f"('{name}', '{place}', {', '.join(map(str, numbers))})" for name, place, *numbers in entries]
    return f"{create}; insert into {create.split()[2]} values {', '.join(rows)};"


def load(split: str, n: int = 200, seed: int = 0, *, language: str | None = None) -> list[Problem]:
    """Return ``n`` different problems of ``split`` ("train", "dev" or "test"). Equal seeds give equal problems.

    Args:
        language: One of ``LANGUAGES``; ``None`` for both, each drawn with probability 1/2. The problems of the two languages with one seed
            have the same tables and queries.

    Raises:
        ValueError: unknown split or language.
    """
    splits.check_split(split)
    if language not in (None, *LANGUAGES):
        raise ValueError(f"language={language!r}: choose one of {', '.join(LANGUAGES)}, or None for both.")
    rng = random.Random(f"text-to-sql-{split}-{seed}")
    return splits.distinct(lambda: problem(rng, split, language), n)
