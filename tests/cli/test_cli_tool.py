"""The option --tool: responses with calls in the commands that sample, and a clear refusal of an unknown tool."""

from __future__ import annotations

import html
import json

import pytest
from typer.testing import CliRunner

from toolkit import lm as lms
from toolkit import store
from toolkit.cli import app

SEARCHER = ("-t", "searching", "--max-new-tokens", "120")


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_rollouts_with_a_tool_hold_results_and_without_it_none(tmp_path):
    for name, more in (("with", ("--tool", "search")), ("without", ())):
        result = run("rollouts", "-m", "tiny-searcher", *SEARCHER, "-n", 8, "-k", 2, *more, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
    calls = {name: sum(len(r.results) for r in store.load_rollouts(tmp_path / name)) for name in ("with", "without")}
    assert calls["with"] > 4 and calls["without"] == 0
    assert "tools search" in store.load_header(tmp_path / "with")["interventions"][0]


def test_models_are_compared_with_the_tool_in_another_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ("compare", "base=tiny-searcher", "again=tiny-searcher", *SEARCHER, "-n", 4, "-k", 1, "--json")
    for more in ((), ("--tool", "search")):
        result = run(*command, *more)
        assert result.exit_code == 0, result.output
    folders = sorted((tmp_path / "runs" / "compare").iterdir())
    assert len(folders) == 2
    calls = {sum(len(r.results) for r in store.load_rollouts(folder / "rollouts" / "base")) > 0 for folder in folders}
    assert calls == {True, False}


def test_a_policy_is_trained_with_the_tool(tmp_path):
    sizes = ("--steps", 2, "-n", 8, "--evaluate-every", 2, "--save-every", 2, "--set", "problems=2", "--set", "samples=4")
    result = run("grpo", "-m", "tiny-searcher", "-t", "searching", "--tool", "search", *sizes, "-o", tmp_path / "run")
    assert result.exit_code == 0, result.output
    about = json.loads((tmp_path / "run" / "model" / "grpo.json").read_text())
    assert "tools search" in json.dumps(about)


@pytest.mark.parametrize("command", [("rollouts", "-o", "x"), ("compare", "a=tiny-searcher"), ("grpo", "-o", "x")])
def test_an_unknown_tool_is_refused_before_any_work(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*command, "--tool", "oracle")
    assert result.exit_code == 2 and "--tool oracle: the only tool is search" in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reward", ["ppr", "mash", "reseek"])
def test_a_reward_of_calls_without_a_tool_is_refused_before_any_work(reward, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("grpo", "-m", "tiny-searcher", "-t", "searching", "-r", reward, "-o", "x")
    assert result.exit_code == 2 and f"--reward {reward} pays for tool calls" in " ".join(result.output.split())
    assert "loading" not in result.output and not (tmp_path / "x" / "model").exists()


def test_transcripts_of_two_tokenizers_are_each_read_with_their_own(tmp_path):
    done = run(
        "compare",
        "one=tiny-reasoner",
        "other=tiny-searcher",
        "-t",
        "arithmetic",
        "-n",
        2,
        "-k",
        1,
        "--max-new-tokens",
        60,
        "-o",
        tmp_path,
    )
    assert done.exit_code == 0, done.output
    page = html.unescape((tmp_path / "report.html").read_text())
    for name in ("one", "other"):
        response = store.load_rollouts(tmp_path / "rollouts" / name)[0]
        lm = lms.load("tiny-reasoner" if name == "one" else "tiny-searcher")
        assert response.think is not None
        assert lm.text(response.token_ids[response.think.start : response.think.stop]).strip() in page
