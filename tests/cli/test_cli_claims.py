"""``toolkit claims``: errors before any work, whole responses as thinking where there are no tags, JSON, and the files it names."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner
from zoo import model_of_type

from toolkit import cli
from toolkit.cli import claims as command
from toolkit.jobs.published_claims import CLAIMS

SMALL = ("-n", 6, "-k", 2, "--max-new-tokens", 12, "--claims", "length,steps")


def run(*arguments: object):
    return CliRunner().invoke(cli.app, ["claims", *(str(a) for a in arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--claims", "edits"), "Unknown claims edits: choose from length, entropy"),
        (("-k", 1), "at least 2 samples per problem"),
        (("--temperature", 0), "give one above 0"),
        (("-t", "nothing"), "Unknown task"),
        (("--search", "gsm8k"), "is no retrieval task"),
        (("--claims", "length", "--instances", 9), "--instances is not used without the claims retrieval"),
        (("--claims", "direction,steering", "--fraction", 0.1), "--fraction is not used without the claims edit"),
        (
            ("--claims", "efficiency", "--short-below", 9),
            "--short-below is not used without the claims direction or steering or edit",
        ),
        (("--claims", "length,direction", "--draws", 5), "--draws is not used without the claims steering or"),
        (
            ("--claims", "entropy,steps,retrieval", "--train-problems", 9),
            "--train-problems is not used without the claims length or",
        ),
        (("--length", 99), "--length is not used by lookup"),
        (("--draws", 2), "--draws"),
        (("--short-below", 9), "both short_below and long_above"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(arguments, message, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    result = run(*arguments, "-o", tmp_path / "out")
    said = " ".join(f"{result.output} {result.exception}".replace("│", " ").split())
    assert result.exit_code != 0 and message in said


def test_a_file_as_output_is_refused_before_a_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("mine")
    assert run("-o", tmp_path / "file").exit_code != 0 and (tmp_path / "file").read_text() == "mine"


def test_a_model_without_tags_thinks_in_whole_responses_and_prints_what_it_writes(monkeypatch, tmp_path):
    lm = replace(model_of_type("llama"), tags=None)
    monkeypatch.setattr(command, "load_model", lambda *a, **k: lm)
    result = run(*SMALL, "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert "whole responses count as thinking" in result.stderr
    printed, written = json.loads(result.stdout), json.loads((tmp_path / "claims.json").read_text())
    assert printed["claims"] == written["claims"] and list(written["claims"]) == ["length", "steps"]
    assert written["command"].startswith("toolkit claims")
    again = run(*SMALL, "-o", tmp_path)
    assert again.exit_code == 0 and "Published claims on" in again.output and "claims.md" in again.output
    assert "toolkit thinkedit -o runs/edited" in again.output and "--think response" in again.output  # as it refuses without


def test_an_option_is_refused_only_without_the_groups_that_use_it():
    assert set(command.READ_BY["train_problems",]) == {name for name, group in CLAIMS.items() if group.train}
    assert set(command.READ_BY["draws",]) == {name for name, group in CLAIMS.items() if group.conditions(1)}
    assert all(group.train for group in CLAIMS.values() if group.directed)
