"""Questions on the characters of a word: python counts along, tokens are those of the question, NaN where nothing varies."""

from __future__ import annotations

import math
import random
import re
from itertools import combinations

import numpy as np
import pytest
from bpe import lm_of
from hypothesis import given
from hypothesis import strategies as st

from toolkit import tasks
from toolkit.tasks import arithmetic, characters, grading, splits
from toolkit.tasks.characters import KINDS, char_tasks, feature_correlations, problem
from toolkit.tasks.haystack import NoOffsetsError


def by_hand(word: str, kind: str, character: str | None) -> int:
    at = [i for i, c in enumerate(word) if c == character]
    return {"count": len(at), "distinct": len(dict.fromkeys(word)), "first": (at or [-1])[0], "last": (at or [-1])[-1]}[kind]


@pytest.mark.parametrize(("kind", "gold"), [("count", 4), ("distinct", 4), ("first", 1), ("last", 10)])
def test_the_four_questions_on_mississippi(kind, gold):
    p = problem("mississippi", kind, None if kind == "distinct" else "i")
    assert p.answer == str(gold) and p.meta["difficulty"] == 11
    assert grading.grade(p, f"It is {gold}.") and not grading.grade(p, str(gold + 1))


def test_case_counts_and_indices_start_at_zero():
    assert problem("Aha", "count", "a").answer == "1" and problem("Aha", "first", "A").answer == "0"
    assert problem("Aha", "distinct").answer == "3"


@given(st.text("abcAB", min_size=1, max_size=12), st.sampled_from(KINDS), st.integers(0, 11))
def test_gold_numbers_are_those_counted_by_hand(word, kind, at):
    character = None if kind == "distinct" else word[at % len(word)]
    assert int(problem(word, kind, character).answer) == by_hand(word, kind, character)


@pytest.mark.parametrize("split", splits.SPLITS)
def test_loaded_questions_ask_what_they_say(split):
    found = characters.load(split, 80, seed=1)
    assert [p.meta["kind"] for p in found[:8]] == [*KINDS, *KINDS] and len({p.id for p in found}) == 80
    for p in found:
        (word,) = re.findall(r'word "(\w+)"', p.messages[0]["content"])
        asked = re.findall(r'character "(\w)"', p.messages[0]["content"])
        assert int(p.answer) == by_hand(word, p.meta["kind"], asked[0] if asked else None)
        assert p.meta["split"] == split == splits.split_of(word) and 4 <= len(word) <= 10
        assert bool(asked) == (p.meta["kind"] != "distinct") and int(p.answer) >= (p.meta["kind"] in ("count", "distinct"))
    assert found == tasks.load("characters", split, 80, 1) != characters.load(split, 80, seed=2)


def test_no_word_is_in_two_splits():
    found = {s: {p.meta["word"] for seed in (0, 1) for p in characters.load(s, 150, seed, lengths=(2, 6))} for s in splits.SPLITS}
    assert not any(found[a] & found[b] for a, b in combinations(found, 2))


def test_letters_repeat_often_enough_to_be_worth_counting():
    counts = [int(p.answer) for p in characters.load("test", 200, kinds=("count",))]
    assert np.mean(np.array(counts) > 1) > 0.5


def test_words_of_ones_own_are_asked_about_in_order():
    own = ["banana", "Otto", "x"]
    for kind in KINDS:
        found = char_tasks(own, None, kind, seed=3)
        assert [p.meta["word"] for p in found] == own == [p.meta["word"] for p in char_tasks(own, None, kind, seed=3)]
        assert all("n_tokens" not in p.meta for p in found)


def test_the_tokens_of_a_word_are_those_in_the_question():
    tokenizer = lm_of("bpe").tokenizer
    for p in characters.load("test", 60, tokenizer=tokenizer) + char_tasks(["station", "the", "gate"], tokenizer, "last", 1):
        content, word = p.messages[0]["content"], p.meta["word"]
        start = content.index(f'"{word}"') + 1
        offsets = tokenizer(content, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        owner = [
            next(i for i, (a, b) in enumerate(offsets) if a <= start + k < b) for k in range(len(word))
        ]  # token of each character
        assert p.meta["n_tokens"] == len(set(owner))
        assert p.meta["chars_per_token"] == len(word) / len(set(owner))
        if p.meta["kind"] in ("first", "last"):
            assert p.meta["target_token_len"] == owner.count(owner[int(p.answer)])
        else:
            assert math.isnan(p.meta["target_token_len"])


def test_a_character_tokenizer_has_one_token_a_character(tiny):
    for p in tasks.load("characters", "test", 20, lm=tiny):
        assert p.meta["n_tokens"] == len(p.meta["word"]) and p.meta["chars_per_token"] == 1
        assert p.meta["target_token_len"] == 1 or p.meta["kind"] not in ("first", "last")


def table(rows):
    return {(row.kind, row.feature): row for row in rows.itertuples()}


def test_correlations_are_undefined_where_nothing_varies_not_zero(tiny):
    found = characters.load("test", 120, tokenizer=tiny.tokenizer)
    rng = random.Random(0)
    rows = table(feature_correlations(found, [rng.random() < 0.5 for _ in found]))
    for kind in KINDS:
        assert math.isnan(rows[kind, "chars_per_token"].r) and not math.isnan(rows[kind, "word_length"].r)
    assert math.isnan(rows["last", "target_token_len"].r)
    assert rows["count", "target_token_len"].n == 0 and rows["count", "word_length"].n == 30
    assert all(math.isnan(r.r) for r in feature_correlations(found, [True] * len(found)).itertuples())


def test_correlations_find_what_decides(tiny):
    """Right iff the word is short: the correlation with its length is numpy's, and the interval is on its side of 0."""
    found = characters.load("test", 160, kinds=("first", "count"), tokenizer=lm_of("bpe").tokenizer)
    correct = [len(p.meta["word"]) < 7 for p in found]
    row = table(feature_correlations(found, correct))["first", "word_length"]
    own = [(len(p.meta["word"]), c) for p, c in zip(found, correct, strict=True) if p.meta["kind"] == "first"]
    assert row.r == pytest.approx(np.corrcoef(*zip(*own, strict=True))[0, 1]) and row.low <= row.r <= row.high < 0 and row.n == 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("word", "sum", "w"), "kind='sum': choose one of count, distinct, first, last"),
        (("", "count", "a"), "'' is not a word"),
        (("two words", "count", "t"), "'two words' is not a word: give text without white space"),
        (("word", "count", "x"), "character='x' with kind='count': give one of the characters of 'word'"),
        (("word", "last", None), "character=None with kind='last'"),
        (("word", "first", "wo"), "character='wo'"),
    ],
)
def test_bad_questions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        problem(*arguments)


def test_bad_input_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="Unknown split 'val'"):
        characters.load("val")
    with pytest.raises(ValueError, match=r"lengths=\(9, 3\): give an inclusive range of word lengths from 2 up"):
        characters.load("test", lengths=(9, 3))
    with pytest.raises(ValueError, match=r"kinds=\('sum',\): choose some of count"):
        characters.load("test", kinds=("sum",))
    # Drawn separately, the two would share questions.
    with pytest.raises(ValueError, match=r"kinds=\('count', 'first', 'count'\): a kind occurs twice"):
        characters.load("test", kinds=("count", "first", "count"))
    with pytest.raises(ValueError, match="found only"):
        characters.load("test", 10_000, kinds=("distinct",), lengths=(2, 2))
    with pytest.raises(ValueError, match="0 answers to 0 problems"):
        feature_correlations([], [])
    tokenizer = lm_of("bpe").tokenizer
    with pytest.raises(ValueError, match="is of task 'arithmetic'"):
        characters.token_tags(arithmetic.load("test", 1)[0], tokenizer)
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(NoOffsetsError, match=r"no character offsets.*tokenizer\.json"):
        characters.load("test", 1, tokenizer=tokenizer)
