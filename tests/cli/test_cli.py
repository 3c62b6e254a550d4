"""The command line: help that teaches, errors before any work, JSON that parses, files that others can load."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from toolkit import cli, jobs, store, tasks
from toolkit.types import Direction

COMMANDS = ("demo", "thinkedit", "rollouts", "direction", "compare")


def run(*arguments: str):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "rollouts"
    result = run("rollouts", "-n", "40", "-k", "4", "--max-new-tokens", "200", "-o", folder, "--json")
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output


def test_rollouts_given_again_are_kept(rollouts):
    before = store.load_rollouts(rollouts)
    assert run("rollouts", "-n", "40", "-k", "4", "--max-new-tokens", "200", "-o", rollouts).exit_code == 0
    assert store.load_rollouts(rollouts) == before
    assert len(before) == 160


def test_direction_is_saved_with_its_provenance(rollouts, tmp_path):
    result = run("direction", "-r", rollouts, "-o", tmp_path / "d.safetensors", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    loaded = store.load(tmp_path / "d.safetensors", Direction)
    assert printed["provenance"]["fingerprint"] == loaded.provenance.fingerprint
    assert len(printed["layers"]) == loaded.vector.shape[0]


def test_dry_run_prints_the_plan_and_writes_nothing(rollouts, tmp_path):
    result = run("thinkedit", "-m", "tiny-reasoner", "--rollouts", rollouts, "--dry-run", "-o", tmp_path / "none", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["plan"]
    assert not (tmp_path / "none").exists()


def test_thinkedit_writes_a_checkpoint_with_card_and_numbers(rollouts, tmp_path):
    target = tmp_path / "edited"
    arguments = (
        "-m",
        "tiny-reasoner",
        "--rollouts",
        rollouts,
        "-n",
        "12",
        "-k",
        "2",
        "--max-new-tokens",
        "200",
        "-o",
        target,
        "--json",
    )
    result = run("thinkedit", *arguments)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert {"base", "edited"} < set(printed["conditions"])
    assert "accuracy" in printed["paired"]["edited"]
    card = (target / "README.md").read_text()
    assert card.startswith("---\nbase_model: tiny-reasoner") and "95 % interval" in card
    model = AutoModelForCausalLM.from_pretrained(target)
    edit = store.read_json(target / "edit.json")
    assert edit["parent"] != edit["fingerprint"]
    assert all(row["after"] < row["before"] for row in edit["norms"])
    assert model.config.num_hidden_layers > 0


class Caught(Exception):
    """Raised instead of the work of a command."""


@pytest.mark.parametrize(("given", "seed"), [((), 0), (("--seed", "7"), 7)])
def test_the_seed_of_the_demo_also_draws_its_random_controls(given, seed, monkeypatch, tmp_path):
    def caught(lm, study, directory, *, settings, **_):
        assert study.seed == settings.seed == seed and settings == replace(jobs.DEMO, seed=seed)
        raise Caught

    monkeypatch.setattr(jobs, "demo", caught)
    assert isinstance(run("demo", *given, "-o", tmp_path / "out").exception, Caught)


def test_the_default_directory_of_a_comparison_depends_on_which_model_is_the_base(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    keys = []

    def caught(directory, command, *identity):
        keys.append(store.key(list(identity)))
        raise Caught

    monkeypatch.setattr(cli.edit, "result_directory", caught)
    for names in ("ab", "ba", "ab"):
        assert isinstance(run("compare", *(f"{name}=tiny-reasoner" for name in names), "-n", "2").exception, Caught)
    assert keys[0] == keys[2] != keys[1]


def test_the_help_of_task_names_every_task():
    words = re.split(r"[^\w:]+", run("rollouts", "--help").output)
    assert not {*tasks.NAMES} - {*words}


def test_demo_writes_everything_it_promises(tmp_path):
    result = run("demo", "-n", "24", "-k", "3", "-o", tmp_path / "demo", "--json")
    assert result.exit_code == 0, result.output
    written = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"report.json", "report.html", "direction.safetensors", "heads.json", "edited"} <= written
    report = json.loads(result.stdout)
    base = report["conditions"]["base"]["metrics"]
    assert {"accuracy", "think_tokens", "shortest_20", "closed"} <= set(base)
    assert all(m["low"] <= m["mean"] <= m["high"] for m in base.values())
    assert report["provenance"]["fingerprint"] and report["out"] == str(tmp_path / "demo")
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("data-figure=") >= 8 and "cdn.plot.ly" not in page.split("<body>")[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("rollouts", "-t", "nonsense", "-o", "x"), "nonsense"),
        (("rollouts", "--split", "exam", "-o", "x"), "exam"),
        (("rollouts", "--temperature", "-1", "-o", "x"), "temperature"),
        (("rollouts", "-m", "./no/such/model", "-o", "x"), "no/such/model"),
        (("thinkedit", "-m", "tiny-reasoner", "--fraction", "2", "-o", "x"), "fraction"),
        (("thinkedit", "-m", "tiny-reasoner", "--short-below", "5", "-o", "x"), "long_above"),
        (("thinkedit", "-m", "tiny-reasoner", "--rollouts", "nowhere", "-o", "x"), "nowhere"),
        (("thinkedit", "-m", "tiny-reasoner", "--think", "oops", "-o", "x"), "oops"),
        (("direction", "-r", "nowhere", "-o", "x"), "nowhere"),
        (("direction", "-r", "nowhere", "-o", "x", "--estimator", "magic"), "magic"),
        (("compare", "tiny-reasoner"), "NAME=MODEL"),
    ],
)
def test_bad_input_is_named_before_any_work(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code != 0
    assert says in str(result.exception) + result.output
    assert not list(tmp_path.rglob("*.parquet"))


def test_an_output_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("demo", "-o", tmp_path / "file" / "below")
    assert result.exit_code != 0
    assert str(tmp_path / "file") in str(result.exception)


@pytest.mark.parametrize(
    "arguments",
    [("rollouts",), ("compare", "base=m"), ("heads",), ("retrieval-heads",), ("entropy",), ("giraffe", "--lengths", "64")],
    ids=lambda arguments: arguments[0],
)
def test_an_output_directory_is_checked_before_a_model_is_loaded(arguments, tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded first")

    for module in (cli.edit, cli.lenses, cli.entropy, cli.giraffe):
        monkeypatch.setattr(module, "load_model", load)
    (tmp_path / "file").write_text("")
    result = run(*arguments, "-o", tmp_path / "file" / "below")
    assert isinstance(result.exception, OSError) and "Cannot write to" in str(result.exception)


@pytest.mark.parametrize("option", ["--max-new-tokens", "--batch-size", "--problems", "--samples"])
def test_a_number_below_one_is_a_wrong_option(option, tmp_path):
    result = run("rollouts", "-o", tmp_path / "r", option, "0")
    assert result.exit_code == 2 and option in result.output and not (tmp_path / "r").exists()


def test_a_full_directory_is_not_overwritten(rollouts, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    result = run("thinkedit", "-m", "tiny-reasoner", "--rollouts", rollouts, "-o", tmp_path)
    assert "not empty" in str(result.exception)
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("thinkedit", "-m", "m", "-o", "x", "--dry-run", "--adapter", "a"), "--adapter is not used with --dry-run"),
        (("thinkedit", "-m", "m", "-o", "x", "--partial"), "--partial is not used without --rollouts"),
        *(
            (
                ("thinkedit", "-m", "m", "-o", "x", "--dry-run", "--rollouts", "r", option, "4"),
                f"{option} is not used with --dry-run and",
            )
            for option in ("--problems", "--samples", "--max-new-tokens", "--engine", "--batch-size")
        ),
        (("thinkedit", "-m", "m", "-o", "x", "--short-below", "9", "--long-above", "20", "--share", "0.1"), "--share is not used"),
        (
            ("direction", "-r", "r", "-o", "x", "--method", "efficiency", "--short-below", "9"),
            "--short-below is not used by --method",
        ),
        (
            ("direction", "-r", "r", "-o", "x", "--method", "pca", "--estimator", "whitened"),
            "--estimator is not used by --method pca",
        ),
        (("entropy", "-o", "x", "--rollouts", "r", "-k", "2"), "--samples is not used with --rollouts"),
        (("entropy", "-o", "x", "--rollouts", "r", "--max-new-tokens", "9"), "--max-new-tokens is not used with --rollouts"),
        (("heads", "-o", "x", "--lengths", "64"), "--lengths is not used by --search lookup"),
        (("steer", "-v", "v", "-p", "1+1=?", "--value", "2"), "--value is not used by --op add"),
        (
            ("export", "-v", "v", "-o", "x", "--to", "safetensors", "--drop-layer-0"),
            "--drop-layer-0 is not used by --to safetensors",
        ),
        (("export", "-v", "v", "-o", "x", "--to", "folder", "--strength", "2"), "--strength is not used by --to folder"),
        (("export", "-v", "v", "-o", "x", "--to", "gguf", "--doses", "d"), "--doses is not used by --to gguf"),
        (("export", "-v", "v", "-o", "x", "--to", "gguf", "--plan", "p"), "--plan is not used by --to gguf"),
        (("export", "--plan", "p", "-o", "x", "--to", "adapter", "--base", "b"), "--base is not used by --to adapter"),
        (("export", "--plan", "p", "-o", "x", "--to", "merged", "--during", "think"), "--during is not used by --to merged"),
        (("export", "-o", "x", "--to", "inspect", "--model", "m"), "--model is not used by --to inspect"),
        (("export", "-v", "v", "-o", "x", "--to", "hotwire", "-n", "5"), "--problems is not used by --to hotwire"),
        (("export", "-o", "x", "--to", "hotwire"), "--to hotwire needs a direction: give its file with --vector"),
        (("export", "-o", "x", "--to", "ollama", "--base", "b"), "--to ollama needs a plan: give its file with --plan"),
        (("export", "-o", "x", "--to", "lm-eval", "-t", "needle"), "Export another task, or a JSONL file"),
        (("import", "f", "-o", "x", "--from", "gguf", "--layer", "1"), "--layer is not used with --from gguf"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(arguments, option):
    result = run(*arguments)
    assert result.exit_code == 2
    assert option in " ".join(result.output.replace("\u2502", " ").split())


def test_an_adapter_that_is_there_already_is_this_very_one_or_refused(rollouts, tmp_path):
    sizes = ("--rollouts", rollouts, "-n", "4", "-k", "1", "--max-new-tokens", "40")
    asked = ("thinkedit", "-m", "tiny-reasoner", *sizes, "-o", tmp_path / "edited", "--adapter")
    for _ in range(2):
        assert run(*asked, tmp_path / "adapter").exit_code == 0
    (tmp_path / "other").mkdir()
    store.write_text("x", tmp_path / "other" / "adapter_config.json")
    assert "holds another adapter" in str(run(*asked, tmp_path / "other").exception)
