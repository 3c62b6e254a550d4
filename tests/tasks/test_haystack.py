"""Haystacks: bindings located, tags, sizes, grading by words; tokenizers and templates in which nothing can be located."""

from __future__ import annotations

from itertools import pairwise

import pytest
from bpe import about, bpe_lm, lm_of, read

from toolkit import tasks
from toolkit.lm import LM
from toolkit.tasks import grading, haystack, lookup, needle
from toolkit.tasks.haystack import HaystackError, user_text
from toolkit.types import Problem


@pytest.fixture(params=["characters", "bpe"])
def lm(request) -> LM:
    return lm_of(request.param)


def fact(sentence: str = "The gate code of Orla is 4711.", answer: str = "4711") -> needle.Needle:
    return needle.Needle("What is the gate code of Orla?", sentence, answer)


def test_the_bindings_of_a_lookup_are_found_in_the_order_of_the_chain(lm):
    for p in lookup.load("test", 60):
        h, chain = haystack.locate_lookup(lm, p), p.meta["chain"]
        assert [about(read(lm, h, s)) for s in h.needed] == [f"{a}={b}" for a, b in pairwise(chain)]
        assert read(lm, h, h.answers[0]).strip("=; ") == p.answer
        assert about(read(lm, h, h.query)).removesuffix("?") == chain[0]
        assert not any(f"{a}={b};" in user_text(h.without) for a, b in pairwise(chain))
        rest = [w for w in user_text(p).split() if w not in {f"{a}={b};" for a, b in pairwise(chain)}]
        assert user_text(h.without).split() == rest


def test_a_lookup_can_be_solved_from_the_needed_bindings_and_not_without_one_of_them():
    lm = lm_of("characters")

    def follow(texts: list[str], start: str) -> str:
        bound = dict(t.strip(" ;").split("=") for t in texts)
        while start in bound:
            start = bound[start]
        return start

    for p in lookup.load("dev", 40):
        h = haystack.locate_lookup(lm, p)
        texts = [read(lm, h, s) for s in h.needed]
        assert follow(texts, p.meta["chain"][0]) == p.answer
        for i in range(len(texts)):
            assert follow(texts[:i] + texts[i + 1 :], p.meta["chain"][0]) != p.answer


def test_tags_tell_scope_and_dispersion(lm):
    one = haystack.haystack_tags(needle.place(lm, fact(), 600, 0.5))
    assert one["n_spans"] == 1 and one["gap_max"] == 0 and one["scope_frac"] < 0.2
    p = next(p for p in lookup.load("test", 50) if p.meta["difficulty"] == 3)
    many = haystack.haystack_tags(haystack.locate_lookup(lm, p))
    assert many["n_spans"] == 3 and many["gap_max"] >= many["gap_mean"] >= 0


def test_lengths_leave_room_for_the_response(lm):
    assert haystack.lengths(lm, 3, shortest=100, response=48) == (100, 1050, 2000)
    with pytest.raises(haystack.ContextTooLongError, match="2048 tokens"):
        haystack.lengths(lm, shortest=2000)
    with pytest.raises(HaystackError, match="n=0"):
        haystack.lengths(lm, 0)


@pytest.mark.parametrize(
    ("text", "recall", "contained"),
    [
        ("under the iron oven", 1.0, True),
        ("It is UNDER the iron oven.", 1.0, True),
        ("the oven, under iron", 1.0, False),
        ("the oven", 0.5, False),
        ("oven oven oven oven", 0.25, False),
        ("under the iron ovens", 0.75, False),
        ("", 0.0, False),
    ],
)
def test_recall_counts_words_and_containment_wants_them_in_order(text, recall, contained):
    gold = "under the iron oven"
    assert grading.word_recall(gold, text) == recall
    assert grading.contains(gold, text) is contained
    assert grading.grade(Problem("p", (), gold, {"grader": "recall"}), text) is (recall > 0.5)
    assert grading.grade(Problem("p", (), gold, {"grader": "contains"}), text) is contained


def test_a_number_inside_a_longer_number_is_not_contained():
    assert not grading.contains("471", "4711") and grading.contains("4711", "code: 4711!")


def test_recall_of_no_words_is_refused():
    with pytest.raises(ValueError, match="no words"):
        grading.word_recall("...", "text")


def test_a_tokenizer_without_offsets_is_refused(monkeypatch):
    lm = lm_of("bpe")
    monkeypatch.setattr(type(lm.tokenizer), "is_fast", property(lambda self: False))
    for attempt in (
        lambda: needle.place(lm, fact(), 400, 0.5),
        lambda: haystack.locate_lookup(lm, lookup.load("test", 1)[0]),
    ):
        with pytest.raises(haystack.NoOffsetsError, match=r"no character offsets.*tokenizer\.json"):
            attempt()


def _shouted(template: str) -> str:
    return template.replace("{{ m['content'] | trim }}", "{{ m['content'] | upper }}")


def _doubled(template: str) -> str:
    return template.replace("{{ m['content'] | trim }}", "{{ m['content'] }} {{ m['content'] }}")


def test_a_template_that_changes_the_message_is_refused():
    with pytest.raises(haystack.MissingTextError, match="does not occur"):
        needle.place(bpe_lm(_shouted), fact(), 400, 0.5)


def test_a_template_that_shows_the_message_twice_is_refused():
    with pytest.raises(haystack.RepeatedTextError, match="occurs twice"):
        needle.place(bpe_lm(_doubled), fact(), 800, 0.5)


def test_a_needle_the_tokenizer_cannot_write_is_refused():
    odd = needle.Needle("Wo wohnt er?", "Er wohnt in Łódź.", "Łódź")
    with pytest.raises(haystack.MissingTextError, match="cannot write it"):
        needle.place(lm_of("characters"), odd, 400, 0.5)


def test_a_problem_of_another_task_has_no_bindings():
    with pytest.raises(HaystackError, match=r"tasks\.lookup"):
        haystack.locate_lookup(lm_of("characters"), tasks.load("arithmetic", "test", 1)[0])


def test_one_span_is_not_read_off_many():
    lm = lm_of("characters")
    p = next(p for p in lookup.load("test", 50) if p.meta["difficulty"] == 3)
    with pytest.raises(HaystackError, match=r"needs 3 spans, not one: read \.needed"):
        _ = haystack.locate_lookup(lm, p).needle
