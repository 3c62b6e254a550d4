"""Progress: a bar where somebody watches, plain lines in a log, never a carriage return there."""

from __future__ import annotations

import io
import logging
import re
import sys
from pathlib import Path

import pytest

from toolkit import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(**settings) -> None:
    with progress.stage("sampling", 4, "rollout", **settings) as bar:
        for _ in range(4):
            bar.update()


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by 40 seconds each time it is read."""
    now = iter(range(0, 10_000, 40))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))


def test_a_log_gets_lines_with_rate_and_time_left_and_no_carriage_return(monkeypatch, caplog, clock):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(logging.getLogger("toolkit"), "handlers", [])  # those that the command line adds
    with caplog.at_level(logging.INFO, logger="toolkit"):
        work()
    assert stream.getvalue() == ""
    # Read at 0, then at every update: 40, 80 (a line is due after a minute), 120, 160, and at the end 200, when nothing is new.
    assert caplog.messages == [
        "sampling: 2 of 4 rollouts, 0.025 per second, 1:20 left",
        "sampling: 4 of 4 rollouts, 0.025 per second, took 2:40",
    ]


def test_what_was_done_before_is_not_in_the_rate(monkeypatch, caplog, clock):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO, logger="toolkit"), progress.stage("training", 10, "step", initial=5) as bar:
        bar.update(0)
        bar.update(4)
        assert bar.n == 9
    assert caplog.messages[0] == "training: 9 of 10 steps, 0.05 per second, 0:20 left"


def test_a_terminal_gets_a_named_bar_and_no_lines(monkeypatch, caplog):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with caplog.at_level(logging.INFO, logger="toolkit"):
        work()
    assert "sampling" in stream.getvalue() and "rollout/s" in stream.getvalue() and not caplog.messages


def test_a_stage_that_is_not_to_be_shown_says_nothing(monkeypatch, caplog, clock):
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        with caplog.at_level(logging.INFO, logger="toolkit"):
            work(show=False)
        assert stream.getvalue() == "" and not caplog.messages


def test_every_bar_of_the_toolkit_is_a_stage():
    package = Path(progress.__file__).parent
    others = [
        path for path in package.rglob("*.py") if path.name != "progress.py" and re.search(r"import.*\btqdm\b", path.read_text())
    ]
    assert not others


def test_the_bar_of_a_model_in_a_folder_names_the_model_and_not_where_it_lies(monkeypatch):
    from dataclasses import replace

    from families import family

    from toolkit import generate
    from toolkit.types import Problem

    names = []
    monkeypatch.setattr(generate, "stage", lambda name, *rest, **more: names.append(name) or progress.stage(name, *rest, **more))
    lm = replace(family("llama"), name="/a/folder/with/a/long/name/that/says/nothing/SmolLM2.gguf")
    generate.rollouts(lm, [Problem("p", ({"role": "user", "content": "1+1=?"},), "2")], generate.Sampling(max_new_tokens=2))
    assert names == ["sampling SmolLM2.gguf"]
