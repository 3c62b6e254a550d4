"""Ranking: relevance and NDCG as by hand, answers that a reader of the prompt agrees with, candidates that BM25 ordered."""

from __future__ import annotations

import importlib.util
import math
import random
import re
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit import tasks
from toolkit.stats.rankings import completed, named, ndcg, written
from toolkit.tasks import grading, ranking, splits

needs_bm25 = pytest.mark.skipif(importlib.util.find_spec("bm25s") is None, reason="bm25s is not installed (extra search)")
VERBS = {"omits": 0, "mentions": 1, "describes": 2, "explains": 3}


def oracle(text: str) -> list[int]:
    """Relevance of each passage of a prompt, read word by word."""
    subject = re.search(r"subject '(\w+)'", text)[1]
    grades = []
    for line in re.findall(r"^\[\d+\] (.+)$", text, re.MULTILINE):
        words = line.replace(",", "").split()
        grades.append(VERBS[words[words.index(subject) - 2]] if subject in words else 0)
    return grades


def naive_ndcg(order, relevance, k):
    def dcg(grades):
        return sum((2**g - 1) / math.log2(r + 1) for r, g in enumerate(grades[:k], 1))

    return dcg([relevance[i] for i in order]) / dcg(sorted(relevance, reverse=True))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6).filter(any), st.integers(1, 7), st.randoms())
def test_ndcg_is_the_formula_written_out(relevance, k, rng):
    order = rng.sample(range(len(relevance)), len(relevance))
    assert ndcg(order, relevance, k) == pytest.approx(naive_ndcg(order, relevance, k))
    assert ndcg(order, relevance) == pytest.approx(naive_ndcg(order, relevance, len(relevance)))


@pytest.mark.parametrize(("order", "relevance", "k"), [([0, 0], [1, 0], 1), ([0, 1], [0, 0], 1), ([0, 1], [1, 0], 0), ([], [], 1)])
def test_an_ndcg_that_is_not_defined_is_refused(order, relevance, k):
    with pytest.raises(ValueError, match=r"give|needs|has to count"):
        ndcg(order, relevance, k)


def test_rankings_are_read_back():
    for order in permutations(range(4)):
        assert named(written(order), 4) == list(order) == completed(written(order), 4)
    assert completed("It is [2], then [2] and [7].", 3) == [1, 0, 2]


def test_every_problem_has_the_relevance_of_its_prompt_and_a_best_answer():
    for split in splits.SPLITS:
        for p in tasks.load("ranking", split, 15, 3):
            grades = oracle(p.messages[0]["content"])
            assert grades == p.meta["relevance"] and any(grades) and p.meta["split"] == split
            order = named(p.answer, len(grades))
            assert [grades[i] for i in order] == sorted(grades, reverse=True) and ndcg(order, grades) == pytest.approx(1)
            assert grading.grade(p, p.answer)


def test_an_answer_is_right_exactly_if_no_ranking_is_better():
    p = ranking.problem("mill", ["describes the mill", "omits the mill", "explains the mill", "describes the mill"], [2, 0, 3, 2])
    for order in permutations(range(4)):
        assert grading.grade(p, written(order)) == (ndcg(order, [2, 0, 3, 2]) > 1 - 1e-12)
    assert not grading.grade(p, "[3] > [1] > [4]"), "a passage is missing"
    best = next(written(order) for order in permutations(range(4)) if ndcg(order, [2, 0, 3, 2]) > 1 - 1e-12)
    assert grading.grade(p, best) and not grading.grade(p, f"{best} > [1]") and not grading.grade(p, f"{best} > [9]")


def test_equal_seeds_give_equal_problems_and_splits_do_not_meet():
    assert ranking.load("dev", 10, 1) == ranking.load("dev", 10, 1) != ranking.load("dev", 10, 2)
    contents = [{p.id for p in ranking.load(split, 12, 0)} for split in splits.SPLITS]
    assert not (contents[0] & contents[1] or contents[0] & contents[2] or contents[1] & contents[2])


@pytest.mark.parametrize(
    "call",
    [
        lambda: ranking.load("test", 1, candidates=1),
        lambda: ranking.load("test", 1, clauses=(0, 2)),
        lambda: ranking.problem("mill", ["explains the mill", "x"], [3]),
        lambda: ranking.problem("mill", ["omits the mill", "x"], [0, 0]),
        lambda: ranking.drawn("mill", ["omits the mill", "x"], 2, random.Random(0)),
        lambda: ranking.bm25("mill", ["x"], 2, random.Random(0)),
    ],
)
def test_impossible_rankings_are_refused(call):
    with pytest.raises(ValueError, match=r"give|needs|need"):
        call()


@needs_bm25
def test_bm25_finds_the_passages_with_the_subject_and_does_not_know_their_relevance():
    problems = ranking.load("test", 16, 0, candidates=8, clauses=(1, 2), retrieve=ranking.bm25)
    shares, by_bm25 = [], []
    for p in problems:
        passages, grades, subject = p.meta["passages"], p.meta["relevance"], p.meta["subject"]
        scores = ranking.bm25_scores(subject, passages)
        assert all((score > 0) == (subject in passage) for score, passage in zip(scores, passages, strict=True))
        shares.append(sum(subject in passage for passage in passages) / 8)
        by_bm25.append(ndcg(range(8), grades))
    assert sum(shares) / 16 > 0.4, "half of the passages or so contain the subject"
    assert sum(by_bm25) / 16 < 0.9


@needs_bm25
def test_bm25_scores_are_the_formula_written_out():
    passages, question = ["a mill a mill", "the river", "a mill by the river and the road"], "mill"
    texts = [p.split() for p in passages]
    mean, k, b = sum(map(len, texts)) / 3, 1.5, 0.75
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))  # two passages contain the word
    for words, score in zip(texts, ranking.bm25_scores(question, passages), strict=True):
        f = words.count("mill")
        assert score == pytest.approx(idf * f / (f + k * (1 - b + b * len(words) / mean)), rel=1e-5)


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(ranking.MissingBM25Error, match=r"pip install 'reasoning-length-toolkit\[search\]'"):
        ranking.bm25_scores("mill", ["a mill"])
