"""A damaged model directory is refused in one sentence, or computes what the undamaged one computes; never anything else."""

from __future__ import annotations

import os
import random

import damage_models
import pytest

from toolkit import lm as lms

EVERY = list(damage_models.damages())
SAMPLE = random.Random(3).sample([name for name in EVERY if not name.startswith("template")], 16)
"""The templates that loop take seconds each: tests/test_templates.py has them."""


@pytest.mark.parametrize("name", EVERY if os.environ.get("TOOLKIT_ALL_DAMAGES") else SAMPLE)
def test_a_damaged_directory_is_refused_or_computes_the_same(name, tmp_path):
    (outcome,) = damage_models.run(lms.tiny_reasoner_path(), tmp_path, [name])
    assert outcome.right, outcome


def test_there_are_a_hundred_damages_and_they_are_the_same_each_time():
    assert len(EVERY) >= 100
    assert list(damage_models.damages()) == EVERY


@pytest.mark.parametrize("verdict", ["accepted, and computes something else", "traceback: KeyError", "refused in 900 characters"])
def test_the_oracle_can_say_no(verdict):
    assert not damage_models.Outcome("x", verdict, "", 0.1).right


def test_the_oracle_sees_one_weight_changed(tmp_path):
    def nudge(path, rng):
        damage_models.tensors(lambda found, key, rng: found[key].view(-1)[0].add_(1.0))(path, rng)

    source = lms.tiny_reasoner_path()
    wanted = damage_models.computed(lms.load(source, device="cpu"))
    outcome = damage_models.judged("nudged", nudge, source, tmp_path, wanted)
    assert outcome.verdict == "accepted, and computes something else"
