"""Target lengths: prompts as Ruler words them, hits as its tables have them, answers graded by the flexible range."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import combinations

import pytest

from toolkit import generate, rewards, stats, store, tasks
from toolkit.generate import Sampling
from toolkit.rewards import MissingColumnError
from toolkit.tasks import arithmetic, grading, splits, target_length
from toolkit.tasks.target_length import QUESTIONS, TARGETS, instruction, problem, target_length_prompts
from toolkit.types import Problem, Rollout, Span


def text(n: int) -> str:
    return "word " * n


def test_words_are_counted_as_ruler_counts_them():
    assert stats.words("don't stop-now") == 4


@pytest.mark.parametrize(
    ("target", "n", "precise", "flexible"),
    [(80, 70, 0, 100), (80, 71, 100, 100), (80, 100, 0, 100), (800, 800, 0, 0), (800, 801, 100, 100), (10, 0, 0, 0)],
)
def test_hits_are_the_golden_ones(target, n, precise, flexible):
    p = problem("Why?", target)
    found = target_length.length_match([text(n)], [p])["all"]
    assert (found.precise, found.flexible) == (precise, flexible)
    assert grading.grade(p, text(n)) == bool(flexible)


@pytest.mark.parametrize("target", TARGETS)
def test_grading_is_the_flexible_range_of_every_target(target):
    p = problem("Why?", target)
    low, high = stats.RULER_FLEXIBLE[target]
    for n in {low, low + 1, min(high, 2000), min(high, 2000) + 1}:
        assert grading.grade(p, text(int(n))) == bool(stats.hits([n], [target], stats.RULER_FLEXIBLE)[0])


def test_prompts_ask_in_rulers_words():
    assert instruction(50) == "The response should have a word count of 50 words."
    assert instruction(800) == "The response should have a word count of more than 800 words."
    p = problem("Why is the sky blue?", 300)
    assert p.messages[0]["content"] == "Why is the sky blue? The response should have a word count of 300 words."
    assert (p.answer, p.meta["difficulty"], p.meta["low_words"], p.meta["high_words"]) == ("300", 1, 200, 400)
    assert problem("Why?", 800).meta["high_words"] is None


def test_every_question_gets_a_target_and_all_are_drawn_alike():
    found = target_length_prompts(QUESTIONS * 10, seed=10)
    counts = Counter(p.meta["target_words"] for p in found)
    assert set(counts) == set(TARGETS) == {10, 30, 50, 80, 150, 300, 500, 700, 800}
    assert all(abs(c - len(found) / 9) < 4 * math.sqrt(len(found) / 9) for c in counts.values())
    assert [p.meta["question"] for p in found] == list(QUESTIONS * 10)
    assert found == target_length_prompts(QUESTIONS * 10, seed=10) != target_length_prompts(QUESTIONS * 10, seed=11)
    assert {p.meta["difficulty"] for p in found} == {0, 1, 2}


def test_targets_of_ones_own_have_ranges_of_a_tenth_and_a_fifth():
    p = problem("Why?", 100)
    assert (p.meta["low_words"], p.meta["high_words"]) == (80, 120) and "difficulty" not in p.meta
    found = target_length.length_match([text(115)], [p])
    assert (found["100"].precise, found["100"].flexible, found["all"].rmse) == (0, 100, 15)


def test_the_report_is_that_of_stats():
    found = target_length_prompts(QUESTIONS, seed=3)
    texts = [text(7 * i % 900) for i in range(len(found))]
    lengths, targets = [stats.words(t) for t in texts], [p.meta["target_words"] for p in found]
    assert repr(target_length.length_match(texts, found)) == repr(stats.length_match(lengths, targets))
    assert grading.grade(found[0], texts[0]) is (found[0].meta["low_words"] < lengths[0] <= found[0].meta["high_words"])


def test_splits_are_disjoint_by_question():
    found = {s: {p.meta["question"] for p in target_length.load(s, 30)} for s in splits.SPLITS}
    assert not any(found[a] & found[b] for a, b in combinations(found, 2))
    assert len(set(QUESTIONS)) == len(QUESTIONS) == 240
    own = target_length.load("test", 40, 2)
    assert own == tasks.load("target_length", "test", 40, 2) and len({p.id for p in own}) == 40
    assert {p.meta["split"] for p in own} == {"test"}


def test_problems_go_through_a_file(tmp_path):
    own = [problem("Why?", 800), problem("Why?", 30)]
    back = store.load_problems(store.save_problems(own, tmp_path / "p.jsonl"))
    assert [grading.grade(p, text(801)) for p in back] == [True, False] and [p.meta for p in back] == [p.meta for p in own]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=re.escape("0 questions, targets=[10]: give at least one of each")):
        target_length_prompts([], [10])
    with pytest.raises(ValueError, match=re.escape("1 questions, targets=[0]")):
        target_length_prompts(["Why?"], [0])
    with pytest.raises(ValueError, match="Unknown split 'x'"):
        target_length.load("x")
    with pytest.raises(ValueError, match="found only"):
        target_length.load("dev", 1000, targets=(10,))
    with pytest.raises(ValueError, match="has no target length"):
        target_length.length_match(["a"], arithmetic.load("test", 1))
    with pytest.raises(ValueError, match="0 lengths and 1 targets"):
        target_length.length_match([], [problem("Why?", 10)])


# --- from the task to a reward ---------------------------------------------------------------------------------


def answered(p: Problem, n: int) -> Rollout:
    """A response that thinks in three words and answers in ``n``; special tokens are no words of it."""
    said = f"<think>let me think</think>{text(n)}<|end|>"
    return Rollout(p.id, n, (5, 6, 7, 8), 1, Span(1, 2), Span(3, 4), "stop", said, grading.grade(p, text(n)))


def test_rulers_reward_is_the_tasks_own_grade_for_published_targets_and_ones_own():
    problems = target_length_prompts(QUESTIONS[:60], [*TARGETS, 25, 110])
    found = [answered(p, n) for p in problems for n in (0, 15, 21, 30, 66, 88, 100, 132, 133, 200, 450, 800, 801)]
    table = rewards.score(found, rewards.ALL["ruler"].make(), problems)
    assert table["reward"].tolist() == [float(r.correct) for r in found] and 0 < table["reward"].mean() < 1


def test_longwriters_reward_of_the_task_is_a_naive_loop_over_its_ranges_in_words():
    problems = target_length_prompts(QUESTIONS[:40])
    found = [answered(p, n) for p in problems for n in (0, 10, 30, 70, 150, 500, 900, 2000, 5000)]
    ranges = {p.id: (p.meta["low_words"], p.meta["high_words"]) for p in problems}
    assert any(high is None for _, high in ranges.values()), "an open range is among them"

    def naive(r: Rollout) -> float:
        low, high = ranges[r.problem_id]
        n = r.sample  # its words
        if n < low:
            return n / low
        return 1.0 if high is None or n <= high else max(0.0, (4000 - n) / (4000 - high))

    table = rewards.score(found, rewards.ALL["longwriter"].make(unit="words", longest=4000), problems)
    assert table["reward"].tolist() == pytest.approx([naive(r) for r in found])


def test_a_reward_in_tokens_is_refused_on_targets_in_words():
    problems = target_length_prompts(QUESTIONS[:2])
    with pytest.raises(MissingColumnError, match=r"needs the column 'high_tokens'.*count words \(unit='words'\)"):
        rewards.score([answered(p, 5) for p in problems], rewards.ALL["longwriter"].make(), problems)


def test_sampled_responses_to_the_task_are_paid_what_they_are_graded(tiny):
    problems = [problem(f"{a}+{b}=?", 10) for a, b in ((3, 4), (12, 5), (20, 7))]
    found = generate.rollouts(tiny, problems, Sampling(n=4, max_new_tokens=60), progress=False)
    assert rewards.score(found, rewards.ALL["ruler"].make(), problems)["reward"].tolist() == [float(r.correct) for r in found]
    assert any(r.correct for r in found)


def test_problems_with_targets_of_ones_own_are_read_back_and_can_be_graded(tmp_path):
    """Their ranges are no whole numbers, and Ruler's last has no end."""
    made = target_length_prompts([f"What is {k}?" for k in range(6)], targets=[75, 12.5, 800])
    assert grading.problems_of(store.save_problems(made, tmp_path / "p.jsonl")) == made
