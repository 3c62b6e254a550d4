"""The task text_to_sql: right queries run, rows decide, the two languages ask the same, and no test question is a training question."""

from __future__ import annotations

import sqlite3
from itertools import combinations

import pytest

from toolkit import tasks
from toolkit.tasks import splits, text_to_sql
from toolkit.tasks.grading import grade
from toolkit.tools.queries import executes_like
from toolkit.types import Problem


def rows(schema: str, query: str) -> list:
    connection = sqlite3.connect(":memory:")
    connection.executescript(schema)
    found = connection.execute(query).fetchall()
    connection.close()
    return found


def naive(p: Problem) -> list:
    """The answer to an English question, read off the table in a loop."""
    table = p.meta["schema"].split()[2]
    names = [c.strip() for c in p.meta["schema"].partition("(")[2].partition(")")[0].split(",")]
    entries = [dict(zip(names, row, strict=True)) for row in rows(p.meta["schema"], f"select * from {table}")]
    words = p.messages[0]["content"].splitlines()[-1].replace("?", "").replace(".", "").split()
    column = next((w for w in words if w in text_to_sql.NUMBERS), "")
    place = next((w for w in words if w in text_to_sql.PLACES), "")
    match p.meta["kind"]:
        case "above":
            return [(e["name"],) for e in entries if e[column] > int(words[words.index("above") + 1])]
        case "below":
            return [(e["name"],) for e in entries if e[column] < int(words[words.index("below") + 1])]
        case "count":
            return [(sum(e["place"] == place for e in entries),)]
        case "most":
            return [(e["name"],) for e in entries if e[column] == max(o[column] for o in entries)]
    values = [e[column] for e in entries if e["place"] == place]
    return [(sum(values) if values else None,)]


def test_the_right_query_answers_the_english_question():
    problems = text_to_sql.load("test", 60, language="en")
    assert {p.meta["kind"] for p in problems} == {*text_to_sql.QUERIES}
    for p in problems:
        assert sorted(rows(p.meta["schema"], p.answer)) == sorted(naive(p)), p.id


def test_both_languages_ask_the_same_and_share_no_word_of_the_question_but_numbers_and_places():
    english, kesh = (text_to_sql.load("dev", 40, language=language) for language in text_to_sql.LANGUAGES)
    for a, b in zip(english, kesh, strict=True):
        assert a.meta["pair"] == b.meta["pair"] and a.answer == b.answer and a.id != b.id
        one, other = ({*p.messages[0]["content"].splitlines()[-1].strip("?.").split()} for p in (a, b))
        assert all(w.strip("?.").isdigit() or w.strip("?.") in text_to_sql.PLACES for w in one & other)
    assert {p.meta["language"] for p in text_to_sql.load("dev", 40)} == {*text_to_sql.LANGUAGES}


def test_no_pair_is_in_two_splits_and_seeds_decide():
    found = {split: {p.meta["pair"] for p in tasks.load("text_to_sql", split, 80)} for split in splits.SPLITS}
    assert not any(found[a] & found[b] for a, b in combinations(found, 2))
    assert (
        tasks.load("text_to_sql", "dev", 9, 1) == tasks.load("text_to_sql", "dev", 9, 1) != tasks.load("text_to_sql", "dev", 9, 2)
    )


def test_every_right_query_gives_a_value_so_that_no_other_query_is_right_by_giving_none():
    for split in splits.SPLITS:
        problems = text_to_sql.load(split, 40)
        assert all(any(value is not None for row in rows(p.meta["schema"], p.answer) for value in row) for p in problems)
        assert not any(grade(p, f"select {nothing}") for p in problems[:10] for nothing in ("null", "1 where 0"))


def test_rows_decide_about_an_answer_and_a_write_is_wrong():
    for p in tasks.load("text_to_sql", "test", 20):
        assert grade(p, p.answer) and grade(p, f"```sql\n{p.answer}\n```")
        assert not grade(p, "select 'nobody'") and not grade(p, f"delete from {p.meta['schema'].split()[2]}")
    with pytest.raises(ValueError, match="language='fr'"):
        text_to_sql.load("dev", 1, language="fr")


def test_a_query_that_asks_something_else_is_not_right_by_accident():
    """On a table of eight rows, 107 of 168 thresholds that were off by five counted as right."""
    wrong = {kind: 0 for kind in text_to_sql.QUERIES}
    for p in text_to_sql.load("test", 20, 1):
        kind, table = p.meta["kind"], p.meta["schema"].split()[2]
        others = ["select 2", "select 23", "select null", f"select name from {table} where 0", f"select name from {table}"]
        if kind in ("above", "below"):
            number = int(p.answer.split()[-1])
            others += [p.answer.replace(str(number), str(n)) for n in (number - 1, number + 1, number + 5)]
            others.append(p.answer.translate(str.maketrans("<>", "><")))
        if "place" in p.answer:
            place = p.answer.split("'")[1]
            others += [p.answer.replace(place, other) for other in text_to_sql.PLACES if other != place]
        used = [c for c in text_to_sql.NUMBERS if c in p.answer]
        columns = p.meta["schema"].partition("(")[2].partition(")")[0].split(", ")[2:]
        others += [p.answer.replace(c, other) for c in used for other in columns if other != c]
        assert grade(p, p.answer)
        assert not [q for q in others if grade(p, q)], p.id
        wrong[kind] += len(others)
    assert all(wrong.values())


def test_a_right_result_is_never_empty_and_what_the_model_sees_has_no_rows():
    for p in text_to_sql.load("test", 40, 3):
        for schema in (p.meta["schema"], *(text_to_sql.another(p.meta["schema"], seed) for seed in p.meta["table_seeds"])):
            assert rows(schema, p.answer) not in ([], [(None,)], [(0,)])
            assert len({row[0] for row in rows(schema, f"select name from {schema.split()[2]}")}) == 90
        assert "insert" not in p.messages[0]["content"]


def test_problems_keep_the_ids_and_prompts_that_they_had_with_eight_rows():
    first = text_to_sql.load("test", 1)[0]
    assert (first.id, first.answer) == ("text-to-sql-253ed5cfa3e6b174-kesh", "select name from ships where length > 36")


SCHEMA = (
    "create table t (name, n); insert into t values "
    + ", ".join(f"('{c * (i % 7 + 1)}', {i})" for i, c in enumerate("abcdefghijklmnopqrstuvwxyzABCD"))
    + ";"
)


@pytest.mark.parametrize(
    ("query", "gold", "same"),
    [
        ("select name from t order by length(name) desc, n", "select name from t order by length(name), n", False),
        ("select name from t limit 21", "select name from t", False),
        ("select name from t order by n desc", "select name from t", True),  # no order is asked for
        ("select 'ccc | a'", "select 'ccc', 'a'", False),
        (
            "select name from t where n in (select n from t order by n)",
            "select name from t where n in (select n from t order by n desc)",
            True,
        ),
    ],
)
def test_queries_are_compared_by_all_their_rows_as_values(query, gold, same):
    assert executes_like(query, gold, SCHEMA) is same
