"""DTO as a job: the pairs are those of the method, a stopped run ends with the same pairs, and other settings are refused."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from toolkit import jobs, lm, preferences, steps, store, tasks
from toolkit.generate import Sampling, rollouts
from toolkit.jobs import dto as job
from toolkit.methods import thinking_optimization
from toolkit.methods.thinking_optimization import DTOSettings

SAMPLING = Sampling(n=2, max_new_tokens=120)
SETTINGS = DTOSettings(probes=2, completions=2, answering=Sampling(max_new_tokens=12))


@pytest.fixture(scope="module")
def reasoner():
    return lm.load("tiny-reasoner")


@pytest.fixture(scope="module")
def problems():
    return tasks.load("arithmetic", "train", n=6)


def test_the_pairs_are_the_methods_and_a_stopped_run_ends_with_the_same(reasoner, problems, tmp_path, monkeypatch):
    sampled = rollouts(reasoner, problems, SAMPLING, progress=False)
    wanted = thinking_optimization.pairs(
        reasoner, thinking_optimization.optimise(reasoner, sampled, problems, replace(SETTINGS, split=steps.lines))
    )
    assert len(wanted) > 1
    monkeypatch.setattr(job, "CHUNK", 5)
    real, calls = thinking_optimization.optimise, []

    def stops(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(thinking_optimization, "optimise", stops)
    with pytest.raises(KeyboardInterrupt):
        jobs.make_pairs(reasoner, problems, SAMPLING, SETTINGS, tmp_path, segments="lines")
    pairs, table = jobs.make_pairs(reasoner, problems, SAMPLING, SETTINGS, tmp_path, segments="lines")
    assert len(calls) == 4, "the first part is not made again"
    pd.testing.assert_frame_equal(pairs, wanted)
    assert store.read_rows(tmp_path / job.PAIRS) == wanted.to_dict("records")
    assert len(table) == len(sampled) and table["path_tokens"].notna().sum() == len(pairs)
    with pytest.raises(store.WrongModelError, match="segments"):
        jobs.make_pairs(reasoner, problems, SAMPLING, SETTINGS, tmp_path, segments="cues")
    with pytest.raises(store.WrongModelError, match="dto"):
        jobs.make_pairs(reasoner, problems, SAMPLING, replace(SETTINGS, probes=3), tmp_path, segments="lines")
    pytest.importorskip("trl")
    trained = jobs.train_on_pairs(reasoner, pairs, preferences.Settings(steps=1, batch=2), tmp_path)
    assert trained.parent == reasoner.fingerprint and (tmp_path / "trained" / "model").is_dir()
