"""Controls of the studies in data/ are random draws, and their cards say what was measured."""

from __future__ import annotations

import re

import numpy as np
import pytest
from test_readme import ROOT, script

from toolkit import tasks
from toolkit.rewards import RewardBatch

WRONG = (
    "<think>3+4=8\n8+9=17\n17+1=20\n20-5=16\n16+2=18\n</think>18"  # right and wrong steps, so that an order of their values matters
)


def noise(seed, step, n=8):
    study = script(ROOT / "data/searching/study.py")
    return study.Noise(seed)(RewardBatch.from_columns(tokens=[5] * n, step=step)).values


def shuffled(seed, step, n=8):
    aspects = script(ROOT / "data/aspects/measure.py")
    batch = RewardBatch.from_columns(
        text=[WRONG] * n, question=["3+4+9+1-5+2=?"] * n, answer_text=["18"] * n, correct=[False] * n, step=step
    )
    control = aspects.Shuffled(seed)
    plain, mixed = ([[s.value for s in own] for own in r.segments(batch)] for r in (control.inner, control))
    assert all(sorted(a) == sorted(b) for a, b in zip(plain, mixed, strict=True))
    return np.array(mixed)


@pytest.mark.parametrize("control", [noise, shuffled])
def test_a_random_reward_is_no_fixed_preference_for_a_response(control):
    first = control(0, 1)
    assert np.array_equal(first, control(0, 1))
    assert not np.array_equal(first, control(1, 1))  # of another seed
    assert not np.array_equal(first, control(0, 2))  # of another step
    assert len(np.unique(first, axis=0)) > 1  # of the same response, sampled again in one batch


def test_the_noise_of_the_searching_study_is_as_large_as_the_judgements_of_reseek():
    values = noise(0, 1, n=4000)
    assert -0.3 <= values.min() < -0.29 and 0.29 < values.max() <= 0.3
    assert abs(values.mean()) < 0.02


def test_the_card_of_the_smol_reasoner_counts_the_problems_that_it_measured():
    measure = script(ROOT / "data/smol-reasoner/measure.py")
    committed = " ".join((ROOT / "data/smol-reasoner/README.md").read_text().split())

    def said(n):
        args = measure.arguments([])
        card = measure.card({}, tasks.load("wordproblems", "test", n), args, 7, "fast")
        found = re.search(
            r"(\d+) with a phrase and (\d+) without.*test stories, (\d+) problems, 8 samples.*: (\d+) facts", " ".join(card.split())
        )
        return found.groups()

    problems = measure.arguments([]).problems
    assert said(problems) == ("27", "73", "100", "24")
    for part in ("27 with a phrase and 73 without", "test stories, 100 problems, 8 samples", ": 24 facts"):
        assert part in committed
    hurried, calm, n, _ = map(int, said(40))
    assert hurried + calm == n == 40
