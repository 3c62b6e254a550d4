"""Commands refuse, before they sample anything, what cannot work: too few rollouts, and stored rollouts with other think tags."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from toolkit import cli, edits
from toolkit.cli import edit, entropy, lenses, why
from toolkit.jobs import Study, extraction_rollouts, retrieval
from toolkit.methods.thinkedit import ClassTooSmallError
from toolkit.store import WrongModelError
from toolkit.types import HeadEdit, Plan

FEW = ("-n", 5, "-k", 3)  # 15 rollouts: one too few


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def sampled(folder: Path) -> list[Path]:
    return list(folder.rglob("part-*.parquet"))


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("before") / "rollouts"
    assert run("rollouts", *FEW, "--max-new-tokens", 60, "--details", "-o", folder).exit_code == 0
    return folder


@pytest.mark.parametrize(
    "command",
    [("demo",), ("heads",), ("why", "tiny-reasoner", "changed"), ("thinkedit", "-m", "tiny-reasoner")],
    ids=lambda c: c[0],
)
def test_rollouts_that_cannot_fill_both_length_classes_are_refused_before_one_is_sampled(command, tiny, tmp_path, monkeypatch):
    changed = edits.apply(tiny, Plan((HeadEdit(1, 2, "scale", 1.0),), None, "one head", tiny.provenance()))
    loaded = {"changed": changed}
    monkeypatch.setattr(why, "load_model", lambda name, *a: loaded.get(name, tiny))
    result = run(*command, *FEW, "-o", tmp_path / "out")
    assert isinstance(result.exception, ClassTooSmallError)
    assert "15 rollouts (problems x samples) are too few" in str(result.exception) and "16 at least" in str(result.exception)
    assert not sampled(tmp_path)


def test_sixteen_rollouts_are_not_refused_before_they_are_sampled(tmp_path):
    result = run("thinkedit", "-m", "tiny-reasoner", "-n", 8, "-k", 2, "--max-new-tokens", 8, "-o", tmp_path / "out")
    assert isinstance(result.exception, ClassTooSmallError) and "Of 16 rollouts" in str(result.exception)
    assert sampled(tmp_path)


def test_heads_refuses_too_few_stored_rollouts_before_it_samples_haystacks(rollouts, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "measure_retrieval", lambda *a, **k: pytest.fail("haystacks were sampled"))
    result = run("heads", "-r", rollouts, "-n", 2, "-o", tmp_path / "out")
    assert isinstance(result.exception, ClassTooSmallError)


@pytest.mark.parametrize("command", ["thinkedit", "direction", "heads", "entropy"])
@pytest.mark.parametrize(("think", "here"), [("response", "whole responses as thinking"), ("<a>,</a>", "the think tags <a>,</a>")])
def test_stored_rollouts_are_refused_if_the_model_is_loaded_with_other_think_tags(command, think, here, rollouts, tmp_path):
    given = "-r" if command in ("direction", "heads") else "--rollouts"
    result = run(command, "-m", "tiny-reasoner", given, rollouts, "--think", think, "-o", tmp_path / "out")
    assert isinstance(result.exception, WrongModelError)
    said = str(result.exception)
    assert "were sampled with the think tags <think>,</think>" in said and f"is loaded with {here}" in said
    assert "--think '<think>,</think>'" in said and "sample them again" in said
    assert not sampled(tmp_path) and not (tmp_path / "out").is_file()


def test_the_think_tags_that_the_message_names_are_accepted(rollouts, tmp_path):
    result = run("direction", "-r", rollouts, "--think", "<think>,</think>", "-o", tmp_path / "out")
    assert not isinstance(result.exception, WrongModelError)


@pytest.fixture
def untagged(tiny, monkeypatch):
    """The tiny reasoner without think tags, as the model that commands load."""
    lm = replace(tiny, tags=None)
    for module in (edit, entropy, lenses):
        monkeypatch.setattr(module, "load_model", lambda *a, **k: lm)
    return lm


@pytest.mark.parametrize("command", [("demo",), ("entropy",), ("heads",), ("thinkedit", "-m", "x")], ids=lambda c: c[0])
def test_a_model_without_think_tags_is_refused_before_anything_is_sampled(command, untagged, tmp_path):
    result = run(*command, "-o", tmp_path / "out")
    assert isinstance(result.exception, ValueError) and "has no think tags" in str(result.exception)
    assert "--think response" in str(result.exception)
    assert not sampled(tmp_path)


def test_extraction_from_a_model_without_think_tags_is_refused_before_anything_is_sampled(untagged, tmp_path):
    with pytest.raises(ValueError, match="has no think tags"):
        extraction_rollouts(untagged, Study(problems=8, samples=2), out=tmp_path)
    assert not sampled(tmp_path)


def test_rollouts_without_think_tags_name_no_step_that_needs_thinking_and_give_no_direction(untagged, tmp_path):
    result = run("rollouts", "-n", 2, "-k", 1, "--max-new-tokens", 4, "-o", tmp_path / "r")
    assert result.exit_code == 0 and "toolkit direction" not in result.output and "--think response" in result.output
    refused = run("direction", "-r", tmp_path / "r", "-o", tmp_path / "v")
    assert "has no think tags" in str(refused.exception)
