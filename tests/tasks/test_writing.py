"""The task writing: every prompt states what its meta requires, a text that follows it is right and has the highest reward."""

from __future__ import annotations

import random

import pytest

from toolkit import rewards, stats, tasks
from toolkit.rewards import RewardBatch
from toolkit.rewards.columns import problem_columns
from toolkit.tasks import writing
from toolkit.tasks.grading import grade
from toolkit.types import Problem

PROBLEMS = tasks.load("writing", "train", 60)


def obedient(problem: Problem, words: int) -> str:
    """A text with the headings, the keywords and a number of words, without repetition."""
    rng = random.Random(words)
    head = [*problem.meta["headings"], " ".join(problem.meta["keywords"])]
    rest = words - stats.words("\n".join(head))
    return "\n".join([*head, " ".join(f"w{rng.randrange(10**9)}" for _ in range(rest))])


def test_a_prompt_states_the_length_the_headings_in_order_and_the_keywords():
    for p in PROBLEMS:
        content = p.messages[0]["content"]
        assert f"about {p.meta['target_words']} words" in content
        places = [content.index(h) for h in p.meta["headings"]]
        assert places == sorted(places) and len(set(places)) == p.meta["difficulty"]
        assert all(word in content.rpartition("Mention:")[2] for word in p.meta["keywords"])
        assert p.meta["low_words"] == pytest.approx(0.8 * p.meta["target_words"])
        assert p.meta["high_words"] == pytest.approx(1.2 * p.meta["target_words"])


def test_a_text_that_follows_the_prompt_has_the_highest_reward_and_is_right():
    texts = [obedient(p, p.meta["target_words"]) for p in PROBLEMS]
    assert all(grade(p, t) for p, t in zip(PROBLEMS, texts, strict=True))
    assert not any(grade(p, obedient(p, 2 * p.meta["target_words"])) for p in PROBLEMS)
    batch = RewardBatch.from_columns(problem_id=[p.id for p in PROBLEMS], answer_text=texts, formatted=True)
    batch = batch.with_columns(**problem_columns(batch["problem_id"], PROBLEMS))
    assert rewards.ALL["longwriter_zero"].make()(batch).values.min() == pytest.approx(3.0)


def test_problems_of_one_kind_and_subject_are_in_one_split():
    seen = {
        s: {p.messages[0]["content"].partition(" in about ")[0] for p in tasks.load("writing", s, 60)}
        for s in ("train", "dev", "test")
    }
    assert not (seen["train"] & seen["test"] or seen["train"] & seen["dev"] or seen["dev"] & seen["test"])


def test_requested_lengths_can_be_chosen_and_are_checked():
    assert {p.meta["target_words"] for p in writing.load("test", 30, lengths=(20, 30))} == {20, 30}
    for wrong in ((), (0, 10)):
        with pytest.raises(ValueError, match="give at least one number of words"):
            writing.load("test", 3, lengths=wrong)
