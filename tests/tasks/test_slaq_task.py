"""Facts asked singly and together: prompts that hold the answers, one check for both forms, scores as by hand."""

from __future__ import annotations

import math
import random
import re
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit import tasks
from toolkit.tasks import arithmetic, grading, slaq, splits
from toolkit.tasks.slaq import Fact, alignment_scores, by_position, draw_pairs, judge_answer, short_long_pairs


def oracle(text: str) -> list[str]:
    """The codes asked for, looked up in the prompt."""
    told = dict(re.findall(r"The code of the ([\w ]+) is (\d+)\.", text))
    return [told[owner] for owner in re.findall(r"What is the code of the ([\w ]+)\?", text)]


def numbered(codes: list[str]) -> str:
    return "\n".join(f"{i}. {code}" for i, code in enumerate(codes, 1))


# --- scores --------------------------------------------------------------------------------------------------


def test_alignment_is_the_golden_one():
    found = alignment_scores([True, True, False, False, True], [True, False, False, True, True])
    assert (found.short, found.long, found.aligned, found.both_right, found.both_wrong) == (0.6, 0.6, 0.6, 0.4, 0.2)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_alignment_is_what_one_counts(rows):
    a = alignment_scores([s for s, _ in rows], [x for _, x in rows])
    n = len(rows)
    assert a.short == pytest.approx(sum(s for s, _ in rows) / n) and a.long == pytest.approx(sum(x for _, x in rows) / n)
    assert a.aligned == pytest.approx(sum(s == x for s, x in rows) / n) == pytest.approx(a.both_right + a.both_wrong)
    assert a.both_right == pytest.approx(sum(s and x for s, x in rows) / n)


def test_positions_and_streaks():
    long = [[True, True, False], [True, False, False], [False, True, True], [True, True, True]]
    found = by_position([[True] * 3] * 4, long)
    assert found.position.tolist() == [0, 1, 2] and found.n.tolist() == [4] * 3
    assert found.long.tolist() == [0.75, 0.75, 0.5] == found.aligned.tolist() and found.short.tolist() == [1] * 3
    assert found.after_right.tolist()[1:] == pytest.approx([2 / 3, 2 / 3]) and found.after_wrong.tolist()[1:] == [1, 0]
    assert math.isnan(found.after_right[0])


def test_scores_of_nothing_are_refused():
    with pytest.raises(ValueError, match="0 short and 0 long answers"):
        alignment_scores([], [])
    with pytest.raises(ValueError, match="1 short and 2 long answers: give one of each for every fact"):
        alignment_scores([True], [True, False])
    for short, long in (([], []), ([[True]], [[True, False]]), ([[True]], [[True], [True]])):
        with pytest.raises(ValueError, match="give a row of the same length in both for every pair"):
            by_position(short, long)


# --- prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", splits.SPLITS)
def test_both_forms_can_be_answered_from_their_prompt(split):
    for pair in draw_pairs(split, 12, seed=1, m=4):
        codes = oracle(pair.long.messages[0]["content"])
        assert len(codes) == 4 and pair.long.meta["golds"] == tuple(codes) and "\n".join(codes) == pair.long.answer
        assert judge_answer(pair.long, numbered(codes)) == (True,) * 4 and grading.grade(pair.long, numbered(codes))
        for i, p in enumerate(pair.short):
            assert oracle(p.messages[0]["content"]) == [codes[i]] and grading.grade(p, f"The code is {codes[i]}.")
            assert p.meta["position"] == i and p.meta["pair"] == pair.long.id == pair.long.meta["pair"]
            assert not grading.grade(p, codes[i - 1])
        contexts = {p.messages[0]["content"].split("\n\n")[0] for p in pair.problems}
        assert len(contexts) == 1, "the same facts are told in the same order in both forms"


def test_ranges_of_what_is_needed_hold_the_facts_asked():
    for pair in draw_pairs("test", 6, noise=3):
        for p in pair.problems:
            text = p.messages[0]["content"]
            assert [re.findall(r"\d{4}", text[a:b]) for a, b in p.meta["needed"]] == [[code] for code in oracle(text)]
            assert text[slice(*p.meta["query"])] == text.split("\n\n", 1)[1]


def test_facts_are_told_in_another_order_than_they_are_asked_in():
    rank = [np.argsort([a for a, _ in pair.long.meta["needed"]]).tolist() for pair in draw_pairs("test", 60, noise=0)]
    means = np.argsort(rank, axis=1).mean(axis=0)
    assert means == pytest.approx([2.0] * 5, abs=0.6)


def test_no_owner_is_asked_about_in_two_splits_and_seeds_repeat():
    asked = {
        s: {re.search(r"the code of the ([\w ]+)\?", p.messages[0]["content"])[1] for q in draw_pairs(s, 60) for p in q.short}
        for s in splits.SPLITS
    }
    assert not any(asked[a] & asked[b] for a, b in combinations(asked, 2))
    assert draw_pairs("dev", 3, 5) == draw_pairs("dev", 3, 5) != draw_pairs("dev", 3, 6)
    found = tasks.load("slaq", "dev", 13, 5)
    assert found == [p for pair in draw_pairs("dev", 3, 5) for p in pair.problems][:13]
    assert len({p.id for p in tasks.load("slaq", "test", 120)}) == 120


def test_facts_of_ones_own_are_dealt_out_once_and_need_no_telling():
    facts = [Fact(f"What is the capital of land {i}?", f"City {chr(65 + i)}") for i in range(11)]
    found = short_long_pairs(facts, 5, seed=2)
    assert len(found) == 2
    golds = [gold for pair in found for gold in pair.long.meta["golds"]]
    assert len(set(golds)) == 10 and set(golds) <= {fact.answer for fact in facts}
    assert found[0].long.messages[0]["content"].startswith("Answer all 5 questions") and found[0].long.meta["needed"] == ()
    assert judge_answer(found[0].short[0], f"that would be {golds[0].lower()}") == (True,)


def test_invented_codes_are_all_different():
    facts = slaq.invented(random.Random(0), slaq.OWNERS)
    assert len({f.answer for f in facts}) == len(facts) == len(set(slaq.OWNERS)) == 336


# --- one check for both forms --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1. 1111\n2. 2222\n3. 3333", (True, True, True)),
        ("1) the code is 1111\n2) 9999\n3) 3333", (True, False, True)),
        ("3. 3333\n1. 1111\n2. 2222", (True, True, True)),
        ("1. 1111\n3. 3333", (True, False, True)),
        ("1. 1111\n\n**2.** 2222", (True, True, False)),
        ("1111\n2222\n3333", (True, True, True)),
        ("1111\n\n3333", (True, False, False)),
        ("1. 2222\n2. 1111\n3. 3333", (False, False, True)),
        ("1. 1111 or 2222\n2. 2222\n3. 33333", (False, True, False)),
        ("1. 1111\n1. 9999\n2. 2222", (True, True, False)),
        ("Here you are:\n- 1: 1111\n- 2: 2222\n- 3: 3333", (True, True, True)),
        ("", (False, False, False)),
        ("1111 2222 3333", (False, False, False)),
    ],
)
def test_parts_of_a_long_answer(text, expected):
    golds = ("1111", "2222", "3333")
    assert grading.facts_right(golds, golds, text) == expected


def test_an_answer_that_ends_with_a_full_stop_is_no_number_of_a_part():
    golds = ("1111", "2222", "3333")
    for text in (
        "1111.\n2222.\n3333.",
        "1111:\n2222:\n3333:\n",
        "1.\n1111.\n2.\n2222.\n3.\n3333.\n",
        "- 1111. \n- 2222. \n- 3333. ",
    ):
        assert grading.facts_right(golds, golds, text) == (True, True, True), text
    assert grading.facts_right(golds, golds, "2222.\n1111.\n3333.") == (False, False, True)


def test_a_list_of_everything_is_no_answer():
    (pair,) = draw_pairs("test", 1)
    assert not any(judge_answer(p, p.messages[0]["content"])[0] for p in pair.short)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="2 facts, m=3: a pair needs m facts"):
        short_long_pairs([Fact("a?", "b"), Fact("c?", "d")], 3)
    with pytest.raises(ValueError, match="m=1"):
        short_long_pairs([Fact("a?", "b"), Fact("c?", "d")], 1)
    with pytest.raises(ValueError, match=re.escape("'a?' has two answers, 'b' and 'c'")):
        short_long_pairs([Fact("a?", "b"), Fact("a?", "c")], 2)
    with pytest.raises(ValueError, match=r"m=1, noise=10: need m from 2"):
        slaq.load("test", 3, m=1)
    with pytest.raises(ValueError, match=r"m=5, noise=-1"):
        draw_pairs("test", 3, noise=-1)
    with pytest.raises(ValueError, match="noise from 0 to 331"):
        draw_pairs("test", 3, noise=400)
    with pytest.raises(ValueError, match="Unknown split 'x'"):
        draw_pairs("x")
    with pytest.raises(ValueError, match="2 owners, 1 different: give 1 to 9000, each once"):
        slaq.invented(random.Random(0), ["mill", "mill"])
    with pytest.raises(ValueError, match="is of task 'arithmetic'"):
        judge_answer(arithmetic.load("test", 1)[0], "1")
