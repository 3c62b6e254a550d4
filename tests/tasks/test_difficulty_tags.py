"""Scope and dispersion of what a question needs (arXiv 2407.00402)."""

from __future__ import annotations

import math

import pytest
from bpe import lm_of

from toolkit.tasks import arithmetic, haystack, lookup, needle, slaq, threading, wordproblems
from toolkit.tasks.haystack import HaystackError, difficulty_tags, find_once, haystack_tags
from toolkit.types import Problem

AXES = {"scope_tokens", "scope_frac", "n_spans", "gap_mean", "gap_max", "redundancy", "lexical_overlap"}
FACT = "The gate code of Orla is 4711."


@pytest.fixture(params=["characters", "bpe"])
def lm(request):
    return lm_of(request.param)


def told(*sentences: str, needed: tuple[str, ...] = (FACT,), query: str = "What is the gate code of Orla?") -> Problem:
    """A prompt of sentences and a question; each needed one is at its first place."""
    text = " ".join([*sentences, query])
    ranges = tuple((text.index(piece), text.index(piece) + len(piece)) for piece in needed)
    return Problem("p", ({"role": "user", "content": text},), "4711", {"needed": ranges, "query": find_once(text, query)})


def test_one_needle_has_small_scope_and_no_gap(lm):
    found = haystack_tags(needle.place(lm, needle.Needle("What is the gate code of Orla?", FACT, "4711"), 600, 0.5))
    assert set(found) == AXES
    assert found["n_spans"] == 1 and found["gap_max"] == 0 and found["scope_frac"] < 0.2 and found["redundancy"] == 0
    assert found["lexical_overlap"] > 0.3


def test_when_everything_is_needed_scope_is_nearly_everything(lm):
    sentences = [f"Box {i} holds {i + 3} coins." for i in range(30)]
    found = difficulty_tags(lm, told(*sentences, needed=tuple(sentences), query="Sum?"))
    assert found["scope_frac"] > 0.85 and found["n_spans"] == 30 and found["gap_max"] <= 1 and found["lexical_overlap"] == 0


def test_a_copy_of_the_needle_raises_redundancy_and_leaves_scope_as_it_was(lm):
    once, twice = (difficulty_tags(lm, told("It rains.", FACT, "It snows.", *more)) for more in ((), (FACT, FACT)))
    assert (once["redundancy"], twice["redundancy"]) == (0, 2)
    assert once["scope_tokens"] == twice["scope_tokens"] and once["n_spans"] == twice["n_spans"] == 1


def test_a_piece_inside_a_longer_number_or_word_is_no_copy(lm):
    for sentence, copies in {"Bob has 13, 30, 3.5 and 3,000 pens.": 0, "Bob has 3 pens.": 1, "He has 13 or 3, not 3": 2}.items():
        assert difficulty_tags(lm, told("Ann has 3 pens.", sentence, needed=("3",), query="How many?"))["redundancy"] == copies
    assert difficulty_tags(lm, told("Ann has a cat.", "It scatters.", needed=("cat",), query="What?"))["redundancy"] == 0


def test_overlap_is_the_share_of_the_questions_words_that_the_needle_has(lm):
    assert difficulty_tags(lm, told(FACT, query="What is the gate code of Orla?"))["lexical_overlap"] == 6 / 7
    assert difficulty_tags(lm, told(FACT, query="How does one get in?"))["lexical_overlap"] == 0


def test_gaps_are_the_tokens_between_needed_pieces():
    lm, a, b = lm_of("characters"), "Ann has 2.", "Bob has 3."
    found = difficulty_tags(lm, told(a, "xxxx", b, "yy", FACT, needed=(FACT, a, b), query="Sum?"))
    assert (found["n_spans"], found["gap_mean"], found["gap_max"]) == (3, 5, 6), "' xxxx ' and ' yy ' are 6 and 4 characters"


def test_located_haystacks_and_their_problems_have_the_same_tags(lm):
    p = next(p for p in lookup.load("test", 50) if p.meta["difficulty"] == 3)
    for h in (haystack.locate_lookup(lm, p), threading.place(lm, threading.Ask("thread", steps=3), 500)):
        assert (
            haystack_tags(h) == difficulty_tags(lm, h.problem)
            and haystack_tags(h)["n_spans"] == 3
            and set(haystack_tags(h)) == AXES
        )


def test_tasks_that_say_what_they_need_are_tagged():
    lm = lm_of("bpe")
    for pair in slaq.draw_pairs("test", 3, noise=5):
        short, long = difficulty_tags(lm, pair.short[0]), difficulty_tags(lm, pair.long)
        assert (short["n_spans"], long["n_spans"]) == (1, 5) and short["scope_tokens"] < long["scope_tokens"]
        assert short["lexical_overlap"] > 0.5
    story = difficulty_tags(lm, wordproblems.load("test", 1)[0])
    assert story["n_spans"] >= 1 and math.isnan(story["lexical_overlap"])


def test_a_problem_that_does_not_say_what_it_needs_is_refused():
    with pytest.raises(HaystackError, match=r"has no meta\['needed'\]"):
        difficulty_tags(lm_of("bpe"), arithmetic.load("test", 1)[0])
