"""Rewards of several aspects: pages and their items, constraints of instructions, a rule beside a model. Against naive versions."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from batches import batch_of
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from toolkit.constraints import KINDS, LENGTH, Constraint, extract, length_score
from toolkit.rewards import RewardBatch
from toolkit.rewards.ace_rl import ACERL
from toolkit.rewards.answers import closed_answer_text
from toolkit.rewards.beyond_monolithic import BeyondMonolithic, Hybrid, hybrid
from toolkit.rewards.correctness import Format
from toolkit.rewards.fine_grained import equations_hold
from toolkit.rewards.page_llm import PageLLM, swap_gains
from toolkit.rewards.repetition import Distinct
from toolkit.stats.rankings import ndcg, written
from toolkit.tasks import grading, instructions
from toolkit.tasks.instructions import write

# --- pages -------------------------------------------------------------------------------------------------------

RELEVANCE = st.lists(st.integers(0, 3), min_size=2, max_size=6).filter(any)


@given(RELEVANCE, st.data())
def test_an_items_reward_is_the_fall_of_ndcg_when_it_changes_places_with_the_next(relevance, data):
    n = len(relevance)
    ranking = data.draw(st.permutations(range(n)))
    gains = swap_gains(ranking, relevance)
    (own,) = _segments([written(ranking)], tuple(relevance))
    for r in range(n - 1):
        assert own[r].value == pytest.approx(min(0.0, gains[r]))
        swapped = [*ranking[:r], ranking[r + 1], ranking[r], *ranking[r + 2 :]]
        assert gains[r] == pytest.approx(ndcg(ranking, relevance) - ndcg(swapped, relevance), abs=1e-9)
    # The last item changes places with an item without gain that is appended to the page.
    longer, last = [*relevance, 0], [*ranking[:-1], n, ranking[-1]]
    assert gains[-1] == pytest.approx(ndcg([*ranking, n], longer) - ndcg(last, longer), abs=1e-9)


def test_the_best_page_has_the_highest_reward_and_no_charged_item():
    relevance = (0, 3, 1, 2)
    texts = [written(order) for order in itertools.permutations(range(4))]
    scored = PageLLM()(_pages(texts, relevance))
    best = written([1, 3, 2, 0])
    assert texts[int(scored.values.argmax())] == best
    charged = {t: min(s.value for s in own) for t, own in zip(texts, _segments(texts, relevance), strict=True)}
    assert charged[best] >= 0 and sum(low >= 0 for low in charged.values()) == 1


def _pages(texts, relevance):
    answers = [closed_answer_text(text) for text in texts]
    return RewardBatch.from_columns(text=texts, answer_text=answers, relevance=[relevance] * len(texts))


def _segments(texts, relevance):
    return PageLLM().segments(_pages(texts, relevance))


def test_items_stand_at_their_identifiers_in_the_answer_and_repeats_are_charged():
    text = "<think>[1] or [2]</think>[2] > [2] > [7] > [1]"
    (own,) = _segments([text], (0, 3))
    items = [s for s in own if s.kind == "items"]
    assert [text[: s.stop][-3:] for s in items] == ["[2]", "[2]", "[7]", "[1]"]
    assert items[1].value == items[2].value == -0.1
    assert items[0].value == 0  # swapped with the next it would be worse
    assert _segments(["[1] > [2]"], (0, 3))[0][0].value == pytest.approx(ndcg([0, 1], (0, 3)) - 1)
    (page,) = [s for s in own if s.kind == "page"]
    assert page.stop == len(text) and page.value == pytest.approx(0.5)  # half of the identifiers are repeated or unknown
    assert PageLLM()(_pages([text], (0, 3))).values[0] == pytest.approx(sum(s.value for s in own))


def test_other_think_tags_are_left_out_like_the_usual_ones():
    text, answer = "[THINK][1] or [2][/THINK][2] > [1]", "[2] > [1]"
    batch = RewardBatch.from_columns(text=[text], answer_text=[answer], relevance=[(0, 1)])
    (own,) = PageLLM().segments(batch)
    assert [text[: s.stop][-3:] for s in own if s.kind == "items"] == ["[2]", "[1]"]


def test_a_ranking_in_thinking_that_is_never_closed_is_paid_nothing():
    ranking = "[2] > [1]"
    for text, paid in (("<think>x</think>" + ranking, 1.0), ("<think>" + ranking, 0.0)):
        assert PageLLM()(_pages([text], (0, 1))).values[0] == paid


def test_an_empty_page_is_that_of_the_given_order_without_items():
    scored = PageLLM()(_pages(["unsure", "[1] > [2]"], (0, 3)))
    assert scored.components["page"][0] == scored.components["page"][1] and scored.components["items"][0] == 0


@pytest.mark.parametrize("score", [0.1, 0.7, 1 / 3])
def test_equal_scores_say_nothing_whatever_their_rounding(score):
    assert hybrid(np.zeros(3), np.zeros(3), np.full(3, score))[1].tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("line", "holds"),
    [
        ("3 +\t4 = 7", True),
        ("3 +\u00a04 = 8", False),
        ("2 * 3 + 4 = 10", None),
        ("10 / 2 + 1 = 6", None),
        ("1.5+1=2.5", None),
        ("so 3+4=7.", True),
    ],
)
def test_only_whole_equations_of_whole_numbers_are_judged(line, holds):
    assert equations_hold(line) is holds


# --- constraints -------------------------------------------------------------------------------------------------


def drawn(seed: int) -> tuple[Constraint, ...]:
    return instructions.constraints(random.Random(seed), 2 + seed % 5)


@pytest.mark.parametrize("seed", range(60))
def test_what_an_instruction_states_is_read_back_and_a_text_breaks_what_it_is_written_to_break(seed):
    wanted = drawn(seed)
    assert extract("Describe soil. " + " ".join(c.phrase for c in wanted)) == wanted
    for broken in [(), *((c.kind,) for c in wanted), tuple(c.kind for c in wanted)]:
        text = write(wanted, broken)
        assert [c.kind for c in wanted if not c.met(text)] == list(broken), text


def test_every_kind_of_constraint_is_generated():
    assert {c.kind for seed in range(60) for c in drawn(seed)} == set(KINDS)


def test_the_reward_never_falls_when_one_more_constraint_is_met():
    for seed in range(30):
        wanted = drawn(seed)
        question, kinds = " ".join(c.phrase for c in wanted), [c.kind for c in wanted]
        subsets = [s for k in range(len(kinds) + 1) for s in itertools.combinations(kinds, k)]
        values = ACERL()(RewardBatch.from_columns(question=question, answer_text=[write(wanted, s) for s in subsets])).values
        paid = dict(zip(map(frozenset, subsets), values, strict=True))
        assert paid[frozenset()] == 1
        for broken, value in paid.items():
            assert all(paid[broken - {kind}] > value for kind in broken)


def test_the_reward_is_that_of_a_loop():
    for seed in range(20):
        wanted, text = drawn(seed), write(drawn(seed + 1), ("mention",))
        others = [c for c in wanted if c.kind not in LENGTH]
        (length,) = [c for c in wanted if c.kind in LENGTH]
        expected = 0.7 * sum(c.met(text) for c in others) / len(others) + 0.3 * length_score(length, text)
        batch = RewardBatch.from_columns(question=" ".join(c.phrase for c in wanted), answer_text=[text])
        assert ACERL(0.3)(batch).values[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("question", "answer", "value"),
    [
        ("Describe soil.", "anything", 1.0),
        ('Use at most 40 words. Do not use "wet".', " ", 0.0),  # an empty answer keeps every prohibition
        ("Use at most 4 words.", "one two", 1.0),
        ("Use at least 4 words.", "one two", 0.5),
        ('Mention "a".', "b", 0.0),
    ],
)
def test_a_mean_over_nothing_is_left_out(question, answer, value):
    assert ACERL()(RewardBatch.from_columns(question=question, answer_text=[answer])).values[0] == value


def test_the_gold_answers_of_the_task_are_right_and_broken_ones_are_not():
    problems = instructions.load("test", 30)
    for p in problems:
        wanted = extract(p.messages[0]["content"])
        assert grading.grade(p, p.answer) and len(wanted) == p.meta["difficulty"]
        assert not any(grading.grade(p, write(wanted, (c.kind,))) for c in wanted)
    assert instructions.load("test", 30) == problems != instructions.load("test", 30, seed=1)
    asked = {split: {_question(p) for p in instructions.load(split, 60)} for split in ("train", "dev", "test")}
    assert not asked["train"] & asked["test"] and not asked["dev"] & asked["test"]


def _question(p) -> str:
    content = p.messages[0]["content"]
    return content[: content.index(extract(content)[0].phrase)]


def test_length_is_scored_for_length_constraints_only():
    with pytest.raises(ValueError, match="is no length constraint"):
        length_score(Constraint("mention", ("a",)), "a")


# --- rule and model ----------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1), st.floats(-3, 3)), min_size=1, max_size=8))
def test_a_sure_rule_decides_alone_and_an_unsure_one_leaves_it_to_the_model(rows):
    c, q, u = (np.array(column, float) for column in zip(*rows, strict=True))
    mean, std = u.mean(), u.std() or 1.0
    expected = [qi * ci + (1 - qi) / (1 + math.exp(-(ui - mean) / std)) for ci, qi, ui in zip(c, q, u, strict=True)]
    assert_allclose(sum(hybrid(c, q, u)), expected, atol=1e-12)
    assert_allclose(sum(hybrid(c, np.ones(len(c)), u)), c)
    unsure = sum(hybrid(c, np.zeros(len(c)), u))
    assert (np.argsort(unsure, kind="stable")[-1] == np.argsort(u, kind="stable")[-1]) or u.std() < 1e-6


@pytest.mark.parametrize(
    ("columns", "message"), [({"rule_confidence": 1.5}, "confidence of 1.5"), ({"model_score": np.nan}, "must be finite")]
)
def test_columns_outside_their_range_are_refused(columns, message):
    batch = batch_of([1, 0], [5, 5], rule_confidence=1.0, model_score=0.0).with_columns(**columns)
    with pytest.raises(ValueError, match=message):
        Hybrid()(batch)


def test_with_a_sure_rule_the_hybrid_form_is_the_plain_one_and_aspects_are_added():
    batch = batch_of(
        [1, 1, 0], [200, 400, 150], rule_confidence=1.0, model_score=[3.0, 1.0, 9.0], token_ids=[(1, 1), (1, 2), (3, 3)]
    )
    plain = BeyondMonolithic()(batch)
    assert_allclose(BeyondMonolithic(assumed_correctness=Hybrid())(batch).values, plain.values)
    more = BeyondMonolithic(aspects=((1.0, Format()), (0.2, Distinct(n=1))))(batch)
    assert_allclose(more.values - plain.values, 0.2 * Distinct(n=1)(batch).values)


def test_where_the_rule_is_unsure_the_model_says_which_answers_set_the_length():
    columns = {"rule_confidence": 0.0, "model_score": [5.0, 0.0, 0.0]}
    scored = BeyondMonolithic(assumed_correctness=Hybrid())(batch_of([0, 1, 1], [400, 100, 400], **columns))
    # The first alone counts as right, so that the mean length is its own and the second is too short.
    assert scored.components["length"][1] == pytest.approx(0.5 * math.expm1(-0.75 / 0.5))
    assert scored.components["length"][0] == scored.components["length"][2] == 0
