"""A file that was altered in any way is a named error or changes nothing: a few alterations of every kind, drawn from a seed.

All of them: ``python tests/fuzz.py --all`` (``make torture``).
"""

from __future__ import annotations

import json
from dataclasses import replace

import fuzz
import pytest
from fuzz import KINDS

SEED, EACH = 0, 3


@pytest.mark.parametrize("kind", KINDS)
def test_an_altered_file_is_a_named_error_or_the_same_value(kind):
    failed = [trial for trial in fuzz.run([kind], SEED, each=EACH) if trial.outcome in fuzz.FAILURES]
    assert not failed, failed


def test_the_oracle_sees_a_reader_that_trusts_its_file(monkeypatch):
    """The harness itself: a reader without checks fails it in each of the ways it knows."""
    trusting = replace(KINDS["doses"], read=lambda path: json.loads(path.read_text())["doses"])
    monkeypatch.setattr(fuzz, "KINDS", {"doses": trusting})
    outcomes = {trial.outcome for trial in fuzz.run(["doses"], SEED, each=60)}
    assert {"traceback", "silently accepted", "same value"} <= outcomes


def test_the_big_run_has_more_than_600_alterations():
    assert (
        sum(
            len(fuzz.alterations_of(kind, SEED, 60))
            for kind in ("direction", "plan", "problems", "doses", "own vector", "table.jsonl")
        )
        > 600
    )
