"""A damaged model directory is refused in one sentence, or computes what the undamaged one computes; never anything else."""

from __future__ import annotations

import json
import os
import random
import sys
import time

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


def test_a_damage_that_hangs_is_ended_and_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(damage_models, "HANGS", 0.5)
    outcome = damage_models.alone("hangs", lambda path, rng: time.sleep(60), lms.tiny_reasoner_path(), tmp_path, ())
    assert outcome.verdict == "hangs for 1 s" and not outcome.right


@pytest.mark.parametrize(
    ("name", "told", "verdict"),
    [
        ("shard outside, relative", "names '../x', a file outside its directory: refused.", "refused"),
        ("shard outside, absolute", "misses the file x", "refused for another reason"),
        ("shard missing", "misses the file x", "refused"),
    ],
)
def test_a_file_outside_the_directory_is_refused_as_such(tmp_path, monkeypatch, name, told, verdict):
    def refuse(*args, **kwargs):
        raise lms.UnsupportedModelError(told)

    monkeypatch.setattr(lms, "load", refuse)
    outcome = damage_models.judged(name, lambda path, rng: None, lms.tiny_reasoner_path(), tmp_path, ())
    assert outcome.verdict == verdict


def test_the_oracle_sees_a_decoder_that_is_lost(tmp_path):
    source = lms.tiny_reasoner_path()
    damage = damage_models.put(damage_models.TOKENS, "decoder", {"type": "Replace", "pattern": {"String": "7"}, "content": "1"})
    outcome = damage_models.judged("decoder", damage, source, tmp_path, damage_models.computed(lms.load(source, device="cpu")))
    assert outcome.verdict == "accepted, and computes something else"


@pytest.mark.parametrize("verdict", ["refused", "hangs for 90 s"])
def test_the_script_writes_its_figures_and_fails_if_anything_is_wrong(tmp_path, monkeypatch, verdict):
    outcome, report = damage_models.Outcome("x", verdict, "", 0.1), tmp_path / "models.json"
    monkeypatch.setattr(damage_models, "run", lambda *args: [outcome])
    monkeypatch.setattr(sys, "argv", ["damage_models.py", "--all", "--report", str(report)])
    with pytest.raises(SystemExit) as ended:
        damage_models.main()
    assert ended.value.code == (verdict != "refused")
    assert json.loads(report.read_text())["verdicts"] == {verdict: 1}


def test_the_oracle_sees_one_weight_changed(tmp_path):
    def nudge(path, rng):
        damage_models.tensors(lambda found, key, rng: found[key].view(-1)[0].add_(1.0))(path, rng)

    source = lms.tiny_reasoner_path()
    wanted = damage_models.computed(lms.load(source, device="cpu"))
    outcome = damage_models.judged("nudged", nudge, source, tmp_path, wanted)
    assert outcome.verdict == "accepted, and computes something else"
