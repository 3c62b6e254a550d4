"""The questions of data/questions are answered by their rules, and say what would have changed the answers."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from test_readme import ROOT, script

from toolkit import store
from toolkit.claims import Claim
from toolkit.stats import Estimate

publish = script(ROOT / "data/publish.py")
measure = publish.script("questions/measure.py")
RESULTS = store.read_json(ROOT / "data/questions/results.json")


def claim(mean: float, half: float, smallest: float = 1.0, beyond: float = 0.0) -> Claim:
    estimate = Estimate(float(mean), float(mean - half), float(mean + half))
    return Claim(text="t", source="", estimate=estimate, smallest=float(smallest), unit="tokens", beyond=float(beyond))


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ([claim(3, 1), claim(2, 1)], "yes"),
        ([claim(3, 1), claim(2, 3)], "undecided"),
        ([claim(3, 1), claim(0.1, 0.5)], "no"),  # no effect of the size that matters is possible
        ([claim(0.5, 0.2), claim(3, 1)], "no"),  # real, but too small to matter
        ([claim(-3, 1), claim(2, 3)], "no"),  # one no is enough
        ([claim(-1, 1, smallest=0, beyond=-3)], "yes"),  # a loss within the limit
        ([claim(-5, 1, smallest=0, beyond=-3)], "no"),
        ([claim(-3, 1, smallest=0, beyond=-3)], "undecided"),
    ],
)
def test_a_question_is_answered_by_all_of_its_effects(claims, expected):
    assert measure.answer(claims) == expected


def test_the_shift_that_would_change_an_answer_changes_it_and_a_smaller_one_does_not():
    claims = [claim(3, 1), claim(9, 1)]
    other, size, way = re.fullmatch(r"(\w+), if \*t\* were ([\d.]+) tokens (\w+)", measure.turning(claims)).groups()
    assert other == "undecided" and way == "lower"

    def shifted(by):
        e = claims[0].estimate
        return measure.answer([replace(claims[0], estimate=Estimate(e.mean - by, e.low - by, e.high - by)), claims[1]])

    assert shifted(float(size) + 0.05) == "undecided" and shifted(float(size) - 0.1) == "yes"


def test_the_answers_follow_from_the_estimates_and_the_questions_are_those_that_were_asked():
    questions = measure.questions()
    assert [a["question"] for a in RESULTS["answers"]] == [q.text for q in questions]
    for asked, told in zip(questions, RESULTS["answers"], strict=True):
        claims = [e.claim(Estimate(v["mean"], v["low"], v["high"])) for e, v in zip(asked.effects, told["effects"], strict=True)]
        assert measure.answer(claims) == told["answer"] and [c.verdict for c in claims] == [v["verdict"] for v in told["effects"]]
        assert measure.turning(claims) == told["turns"]


def test_the_differences_of_the_answers_are_those_of_the_conditions():
    """An effect against base is in both tables of the results."""
    for asked, told in zip(measure.questions(), RESULTS["answers"], strict=True):
        for e, v in zip(asked.effects, told["effects"], strict=True):
            about = RESULTS["conditions"][e.of][e.task][e.metric]
            kept = about["by level, minus base"][e.level] if e.level else about["minus base"]
            if e.minus == measure.sampler.BASE:
                assert v["mean"] == pytest.approx(e.sign * kept["mean"])
