"""``--engine``: every command that samples gives the same through a server as through the toolkit's own loop, or refuses before any work."""

from __future__ import annotations

import json

import pytest
from servers import serving
from typer.testing import CliRunner

from toolkit import cli, store

SMALL = ["-n", "6", "-k", "2", "--max-new-tokens", "80", "-t", "tiny"]

CLASSES = ["-n", "12", "-k", "2", "--max-new-tokens", "60", "-t", "tiny", "--share", "0.4"]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_rollouts_through_a_server_equal_those_of_the_own_loop_and_say_what_sampled_them(tiny, tmp_path):
    greedy = ["--temperature", 0, *SMALL]
    with serving("vllm", tiny) as (url, _):
        run("rollouts", "-o", tmp_path / "server", "--engine", url, *greedy)
    run("rollouts", "-o", tmp_path / "own", *greedy)
    assert sorted(map(str, store.load_rollouts(tmp_path / "server"))) == sorted(map(str, store.load_rollouts(tmp_path / "own")))
    assert store.load_header(tmp_path / "server")["engine"] == "vllm" and "engine" not in store.load_header(tmp_path / "own")


def test_thinkedit_samples_judges_and_loads_its_controls_through_a_server(tiny, tmp_path):
    with serving("vllm", tiny) as (url, state):
        run("thinkedit", "-m", "tiny-reasoner", "-o", tmp_path / "edited", "--engine", url, *CLASSES)
    assert len(state.loaded) >= 2, "the edit and its controls were loaded as adapters"
    for folder in (tmp_path / "edited.work" / "rollouts" / "test").iterdir():
        assert store.load_header(folder)["engine"] == "vllm"
    rows = json.loads((tmp_path / "edited.work" / "report.json").read_text())
    assert {"base", "edited"} <= set(rows["conditions"])


def test_compare_finds_each_model_among_those_that_a_server_offers(tiny, tmp_path):
    from toolkit import edits
    from toolkit.types import HeadEdit, Plan

    plan = Plan((HeadEdit(2, 1, "scale", 1.0),), None, "off", tiny.provenance())
    edited = edits.apply(tiny, plan)
    edited.save(tmp_path / "edited")
    names = ["base=tiny-reasoner", f"edited={tmp_path / 'edited'}"]
    with serving("llama", tiny, edited) as (url, _):
        shown = run("compare", *names, "-o", tmp_path / "c", "--engine", url, "--temperature", 0, "--json", *SMALL)
    own = run("compare", *names, "-o", tmp_path / "own", "--temperature", 0, "--json", *SMALL)
    shown, own = json.loads(shown), json.loads(own)
    assert shown["paired"] == own["paired"]
    assert shown["provenance"]["notes"]["engine"] == "llama-server" and "engine" not in own["provenance"]["notes"]


def test_entropies_of_responses_from_a_server_are_computed_afterwards(tiny, tmp_path):
    with serving("vllm", tiny) as (url, _):
        run("entropy", "-o", tmp_path / "e", "--engine", url, "-n", 6, "-k", 3, "--max-new-tokens", 80, "-t", "tiny")
    assert store.load_header(tmp_path / "e" / "rollouts")["sampling"]["details"] is False
    assert (tmp_path / "e" / "entropy.json").is_file()


def test_doses_need_steering_and_are_refused_before_a_model_is_loaded(tmp_path):
    result = CliRunner().invoke(cli.app, ["dose", "-v", "no-such-file", "-o", str(tmp_path), "--engine", "http://localhost:1"])
    assert result.exit_code == 2 and "only the toolkit's own loop can do" in " ".join(result.output.replace("\u2502", " ").split())


def test_a_finished_comparison_needs_no_server(tiny, tmp_path):
    arguments = ["compare", "base=tiny-reasoner", "again=tiny-reasoner", "-o", tmp_path / "c", "--engine"]
    with serving("llama", tiny) as (url, _):
        before = run(*arguments, f"llama+{url}", "--json", *SMALL)
    assert json.loads(run(*arguments, f"llama+{url}", "--json", *SMALL)) == json.loads(before)


@pytest.mark.parametrize("engine", ["localhost:1", "vllm+localhost"])
def test_a_wrong_engine_is_refused_with_the_expected_form(engine, tmp_path):
    result = CliRunner().invoke(cli.app, ["rollouts", "-o", str(tmp_path), "--engine", engine, *SMALL])
    assert result.exit_code == 1 and "expected ours, vllm, or the address of a server" in str(result.exception)
