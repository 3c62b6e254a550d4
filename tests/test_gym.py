"""Data sets of reasoning-gym: seeded, split by question, graded by their own scoring, named errors where that cannot be."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from itertools import combinations

import pytest

from toolkit import store, tasks
from toolkit.tasks import arithmetic, grading, splits
from toolkit.tasks.external import gym
from toolkit.tasks.external.gym import GymError


def test_without_reasoning_gym_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    for attempt in (gym.names, lambda: tasks.load("gym:chain_sum"), lambda: tasks.check("gym:chain_sum")):
        with pytest.raises(ImportError, match=re.escape("pip install 'reasoning-length-toolkit[tasks]'")):
            attempt()


reasoning_gym = pytest.importorskip("reasoning_gym")
SOME = ("chain_sum", "countdown", "word_sorting", "number_filtering", "letter_counting", "knights_knaves")


@pytest.mark.parametrize("name", SOME)
def test_gold_answers_are_right_and_nonsense_is_wrong(name):
    for p in gym.load(name, "test", 5, 1):
        said = p.answer
        assert gym.score(p, said) == 1 and grading.grade(p, said)
        assert grading.grade(p, f"I think so. <answer> {said} </answer> Done.")
        assert not grading.grade(p, "?~?") and not grading.grade(p, "") and not grading.grade(p, "<answer></answer>")
        assert p.meta["task"] == f"gym:{name}" and p.meta["split"] == "test" and p.meta["difficulty"] == 0


def test_grading_is_not_by_the_text_of_the_answer():
    """Any expression that makes the target is right: an exact match would call it wrong."""
    p = next(p for p in gym.load("countdown", "train", 30) if re.fullmatch(r"\d+ [+*] .*", p.answer) or " + " in p.answer)
    assert grading.grade(p, f"({p.answer}) + 0*1") is False, "uses numbers that are not given"
    assert grading.grade(p, f"(({p.answer}))") and p.answer != f"(({p.answer}))"


def test_partial_credit_is_a_score_and_not_right():
    p = gym.load("chain_sum", "train", 1)[0]
    text = f"it is {p.answer}, I think"
    dataset = reasoning_gym.create_dataset("chain_sum", seed=p.meta["gym"]["seed"], size=5000)
    assert gym.score(p, text) == dataset.score_answer(text, dataset[p.meta["gym"]["index"]])
    assert 0 < gym.score(p, text) < 1 and not grading.grade(p, text)


def test_an_answer_that_breaks_the_scoring_is_wrong():
    """prime_factorization reads numbers without looking whether there are any."""
    p = gym.load("prime_factorization", "train", 1)[0]
    assert gym.score(p, "zzz") == 0 and gym.score(p, p.answer) == 1


def test_one_seed_gives_the_same_problems_and_the_next_one_others():
    first = tasks.load("gym:chain_sum", "test", 20, 0)
    assert first == gym.load("chain_sum", "test", 20, 0) and len({p.id for p in first}) == 20
    assert first[:5] != gym.load("chain_sum", "test", 5, 1)
    shared = {p.id for p in first} & {p.id for p in gym.load("chain_sum", "test", 20, 1)}
    assert len(shared) < 3, "seeds side by side do not draw the same entries"


def test_no_question_is_in_two_splits():
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # so few that they would meet by chance
    found = {
        s: {p.messages[0]["content"] for seed in (0, 1) for p in gym.load("chain_sum", s, 8, seed, settings=few)}
        for s in splits.SPLITS
    }
    assert not any(found[a] & found[b] for a, b in combinations(found, 2))


def test_settings_and_levels_change_the_problems():
    for p in gym.load("chain_sum", "test", 5, settings={"min_terms": 4, "max_terms": 4}):
        assert len(re.findall(r"\d+", p.messages[0]["content"])) == 4
    low, high = (gym.load("chain_sum", "test", 12, level=level) for level in (0, 3))
    assert {p.meta["difficulty"] for p in low} == {0} and {p.meta["difficulty"] for p in high} == {3}

    def longest(found):
        return max(len(p.messages[0]["content"]) for p in found)

    assert longest(low) < longest(high) and all(grading.grade(p, p.answer) for p in high)


def test_problems_go_through_a_file_and_are_still_graded(tmp_path):
    own = gym.load("word_sorting", "test", 3)
    back = tasks.load(str(store.save_problems(own, tmp_path / "p.jsonl")))
    assert back == own and all(grading.grade(p, p.answer) for p in back)


def test_what_cannot_be_is_refused():
    with pytest.raises(GymError, match=r"no data set 'chain_sums': choose one of .*chain_sum,"):
        tasks.check("gym:chain_sums")
    with pytest.raises(GymError, match=r"chain_sum does not take the settings .*'min_term'"):
        gym.load("chain_sum", settings={"min_term": 4})
    with pytest.raises(GymError, match=r"chain_sum does not take the settings .*min_terms"):
        gym.load("chain_sum", settings={"min_terms": 4, "max_terms": 2})
    with pytest.raises(GymError, match=r"level=99: the curriculum of chain_sum goes from 0 to \d"):
        gym.load("chain_sum", level=99)
    with pytest.raises(GymError, match=r"composite does not take the settings {}"):
        gym.load("composite")
    with pytest.raises(ValueError, match="Unknown split 'x'"):
        gym.load("chain_sum", "x")
    with pytest.raises(GymError, match=r"chain_sum gave \d+ different problems of split 'test' in \d+ draws, fewer than n=50"):
        gym.load("chain_sum", "test", 50, settings={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    with pytest.raises(GymError, match="has no meta"):
        gym.score(arithmetic.load("test", 1)[0], "1")


def test_entries_that_cannot_be_drawn_are_passed_over_and_counted(monkeypatch):
    draw = gym._entry

    def unlucky(recipe):
        if recipe["index"] % 2:
            raise ValueError("no luck")
        return draw(recipe)

    monkeypatch.setattr(gym, "_entry", unlucky)
    assert all(p.meta["gym"]["index"] % 2 == 0 for p in gym.load("chain_sum", "test", 5))
    monkeypatch.setattr(gym, "_entry", lambda recipe: unlucky({"index": 1}))
    with pytest.raises(GymError, match=r"gave 0 different problems .* 1200 draws failed, the last with ValueError\('no luck'\)"):
        gym.load("chain_sum", "test", 5)


def test_a_data_set_that_calls_anything_right_is_refused():
    """game_of_life_halting compares the truth of two texts: any text is true."""
    with pytest.raises(GymError, match="the full score, so its problems cannot be graded: choose another data set"):
        gym.load("game_of_life_halting", "train", 2)


def test_an_entry_that_is_another_one_now_is_not_graded():
    p = gym.load("chain_sum", "test", 1)[0]
    other = replace(p, meta={**p.meta, "gym": {**p.meta["gym"], "index": p.meta["gym"]["index"] + 1}})
    with pytest.raises(GymError, match=r"now draws another question there: load the problems again"):
        gym.score(other, p.answer)
