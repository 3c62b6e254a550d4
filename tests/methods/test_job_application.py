"""Job applications: criteria against a reading of the prompt, and the collapse to "reject", which raises the alarm of ``grpo``."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.grpo import advantages, log, measures
from toolkit.methods import job_application as ja
from toolkit.methods.job_application import AGGRESSIVE, GENTLE, REJECTED, SELECTED, Assessment, Penalties


def naive_fit(prompt: str) -> float:
    job, applicant = prompt.splitlines()[:2]
    asked, has = (re.search(r"(?:needs|knows) ([^;]*);", line)[1].split(", ") for line in (job, applicant))
    needed, years = (int(re.search(r"(\d+) years", line)[1]) for line in (job, applicant))
    return (sum(s in has for s in asked) / len(asked) + min(1, years / needed)) / 2


def test_a_reader_of_the_prompt_finds_the_same_fit_and_splits_are_disjoint():
    drawn = {split: ja.applications(split, 60) for split in ("train", "test")}
    for application in drawn["train"]:
        fit = naive_fit(ja.message(application))
        assert application.fit == pytest.approx(fit) and application.label == (SELECTED if fit >= 0.6 else REJECTED)
    assert not set(drawn["train"]) & set(drawn["test"])
    assert {a.label for a in drawn["test"]} == {SELECTED, REJECTED}


@pytest.mark.parametrize(
    "text",
    ["", "SCORE: 7\nDECISION: SELECTED", "SKILLS: sql\nSCORE: 11\nDECISION: SELECTED", "SKILLS: sql\nSCORE: 7\nDECISION: MAYBE",
     "SKILLS: sql\nSCORE: 7\nDECISION: SELECTED\nDECISION: REJECTED", "SKILLS: sql\nDECISION: SELECTED\nSCORE: 7"],
)  # fmt: skip
def test_text_that_is_no_assessment_gets_nothing(text):
    application = ja.applications("train", 1)[0]
    assert ja.read(text) is None and ja.reward(ja.read(text), application) == 0


@given(st.integers(0, 30), st.sampled_from([SELECTED, REJECTED]), st.integers(0, 10), st.booleans(), st.floats(0, 9))
def test_the_reward_is_the_sum_by_hand(which, decision, score, invents, penalty):
    a = DRAWN[which]
    claimed = [s for s in a.asked if s in a.has] + ([s for s in ja.SKILLS if s not in a.has][:1] if invents else [])
    assessment = ja.read(f"SKILLS: {', '.join(claimed) or 'none'}\nSCORE: {score}\nDECISION: {decision}")
    assert assessment == Assessment(tuple(claimed), float(score), decision)
    penalties = Penalties(penalty, penalty + 1, penalty + 2)
    expected = 1.0 if decision == a.label else -(penalty if decision == SELECTED else penalty + 1)
    expected += -(penalty + 2) if invents else 1.0
    expected += 0.5 * (1 - abs(score / 10 - a.fit)) + 0.5
    assert ja.reward(assessment, a, penalties) == pytest.approx(expected)


DRAWN = ja.applications("train", 31)


@pytest.fixture(scope="module")
def pools():
    return ja.applications("train", 200), ja.applications("test", 100)


def said(selected: np.ndarray, test) -> list[str]:
    """Alarms of a log row for decisions on the test applications."""
    gold = [a.label for a in test]
    correct = [(SELECTED if s else REJECTED) == g for s, g in zip(selected, gold, strict=True)]
    recalls = measures.class_recalls(correct, gold)
    return log.alarms([{"held_out/recall_low": min(recalls.values()), "held_out/recall_high": max(recalls.values())}])


@pytest.mark.parametrize("seed", range(3))
def test_harsh_penalties_make_the_policy_reject_everybody_and_the_alarm_says_so(pools, seed):
    train, test = pools
    gold = np.array([a.label == SELECTED for a in test])
    harsh = ja.polish(train, test, advantages.dr_grpo, AGGRESSIVE, seed=seed) > 0.5
    gentle = ja.polish(train, test, advantages.dr_grpo, GENTLE, seed=seed) > 0.5
    assert harsh[0].mean() > 0.4 and harsh[-1].mean() < 0.02, "from the supervised policy to rejecting everybody"
    assert said(harsh[0], test) == [] and said(gentle[-1], test) == []
    (text,) = said(harsh[-1], test)
    assert text.startswith("one class: ")
    assert (gentle[-1] == gold).mean() > 0.8


def test_the_penalty_of_a_decision_has_no_effect_on_advantages_that_are_divided_by_their_spread(pools):
    train, test = pools
    runs = [
        ja.polish(train, test, advantages.grpo, p, seed=0, settings=ja.Polish(steps=20, invented=0.0))
        for p in (GENTLE, Penalties(wrong_select=50.0))
    ]
    assert np.abs(runs[0] - runs[1]).max() < 1e-2
    scaled = [
        ja.polish(train, test, advantages.dr_grpo, p, seed=0, settings=ja.Polish(steps=20, invented=0.0))
        for p in (GENTLE, Penalties(wrong_select=50.0))
    ]
    assert np.abs(scaled[0] - scaled[1]).max() > 0.3


def test_without_updates_beyond_the_kl_penalty_the_policy_stays_the_supervised_one(pools):
    train, test = pools
    p = ja.polish(train, test, lambda r, g, t: np.zeros(len(g)), AGGRESSIVE, seed=1, settings=ja.Polish(steps=5, beta=5.0))
    assert p == pytest.approx(np.tile(p[0], (6, 1)))
    with pytest.raises(ValueError, match="give more"):
        ja.polish(train[:3], test, advantages.grpo, GENTLE, seed=0)
