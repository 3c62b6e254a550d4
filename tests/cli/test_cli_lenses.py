"""The commands that look at heads: help, errors before any work, JSON that parses, files."""

from __future__ import annotations

import html
import json

import pytest
from typer.testing import CliRunner

from toolkit import cli, edits
from toolkit.lm import load
from toolkit.types import HeadEdit, Plan


def run(*arguments: str):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.mark.parametrize("command", ["retrieval-heads", "heads", "why"])
def test_help_shows_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output


def test_retrieval_heads_prints_what_it_writes(tmp_path):
    small = ("-n", 2, "--counts", "1", "--ops", "zero", "--draws", 1, "--max-new-tokens", 40, "-o", tmp_path / "out")
    result = run("retrieval-heads", *small, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    written = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    for name in ("heads", "masking", "thinking", "sparsity", "stability", "recall"):
        assert printed[name] == written[name]
    again = run("retrieval-heads", *small)
    assert again.exit_code == 0 and "Retrieval heads" in again.output


def test_heads_prints_the_table_and_the_overlaps(tmp_path, monkeypatch):
    monkeypatch.setattr("toolkit.jobs.heads.FEW", 4)
    found = run("rollouts", "-n", 30, "-k", 4, "--max-new-tokens", 80, "-o", tmp_path / "rollouts", "--json")
    assert found.exit_code == 0, found.output
    small = ("-r", tmp_path / "rollouts", "-n", 2, "-k", 1, "--max-new-tokens", 60, "-o", tmp_path / "out")
    result = run("heads", *small, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert len(printed["heads"]) == 32
    assert {"pair", "shared", "p_in_layer", "spearman"} <= set(printed["overlaps"][0])


def test_why_names_the_edited_head_and_writes_a_page_with_its_verdict(tmp_path):
    lm = load("tiny-reasoner", device="cpu")
    plan = Plan((HeadEdit(2, 4, "scale", 1.0),), None, "head 2.4", lm.provenance())
    edits.apply(lm, plan).save(tmp_path / "changed")
    small = ("-n", 12, "-k", 4, "--max-new-tokens", 60, "--top", 1, "--draws", 1, "--pairs", 4, "-o", tmp_path / "out")
    result = run("why", "tiny-reasoner", tmp_path / "changed", *small, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    written = json.loads((tmp_path / "out" / "why.json").read_text())
    assert all(printed[name] == written[name] for name in ("heads", "outputs", "entropies", "steps", "undo"))
    assert (printed["heads"][0]["layer"], printed["heads"][0]["head"]) == (2, 4) and written["heads_chosen"] == [[2, 4]]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "the change of 2.4" in page and "random 0" in page and all(html.escape(said) in page for said in written["verdict"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("retrieval-heads", "--counts", "one"), "give whole numbers"),
        (("retrieval-heads", "-t", "arithmetic"), "is no retrieval task"),
        (("heads", "--search", "gsm8k"), "is no retrieval task"),
        (("retrieval-heads", "--ops", "half"), "ops=half"),
        (("why", "tiny-reasoner", "tiny-reasoner", "-t", "no_such_task"), "no_such_task"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(arguments, message, monkeypatch, tmp_path):
    monkeypatch.setattr("toolkit.lm.load", lambda *a, **k: pytest.fail("a model was loaded"))
    result = run(*arguments, "-o", tmp_path / "out")
    assert result.exit_code != 0
    assert message in (result.output + str(result.exception))
