"""Next steps that a command prints can be typed as printed, and use the model and task of the command that prints them."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from toolkit import jobs, pages, report, store
from toolkit.cli import common, dto, edit, entropy, giraffe, grpo, lenses, why
from toolkit.cli.help import Command, app

GIVEN = {
    "model": "some model", "think": "<a>,</a>", "template": ["enable_thinking=false", 'effort="low"'], "dtype": "bfloat16", "device": "cuda:1",
    "trust_remote_code": True, "task": "mine.jsonl", "max_new_tokens": 4096, "layers": "1-3", "as_json": False,
}  # fmt: skip


def parsed(line: str) -> dict:
    """The parameters that a command line sets."""
    _, name, *arguments = shlex.split(line)
    group = typer.main.get_command(app)
    with typer.main.get_command(app).make_context("toolkit", [name]) as context:
        command = group.get_command(context, name)
        return command.make_context(name, arguments, parent=context).params


@pytest.mark.parametrize(
    "line",
    [
        "toolkit rollouts -n 20 -o runs/r", "toolkit direction -r runs/r -o v.safetensors", "toolkit heads -r runs/r", "toolkit thinkedit -o out",
        "toolkit compare base=a edited=b", "toolkit steer -v v.safetensors -p hello", "toolkit dose -v v.safetensors -o out",
    ],
)  # fmt: skip
def test_a_next_step_can_be_typed_and_keeps_model_task_and_budget(line, monkeypatch):
    monkeypatch.setattr(Command, "values", dict(GIVEN))
    monkeypatch.setattr(Command, "given", frozenset(GIVEN))
    params = parsed(common.same_options(*shlex.split(line)[1:], more=("layers",)))
    kept = {name: value for name, value in GIVEN.items() if name in params and name != "as_json"}
    assert {"think", "template", "dtype", "device", "trust_remote_code"} <= kept.keys()
    assert {name: params[name] for name in kept} == kept


def test_what_was_not_given_is_not_repeated_unless_the_next_command_needs_it(monkeypatch):
    monkeypatch.setattr(Command, "values", GIVEN | {"trust_remote_code": False})
    monkeypatch.setattr(Command, "given", frozenset({"trust_remote_code"}))
    assert common.same_options("heads", "-r", "runs/r") == "toolkit heads -r runs/r"
    assert common.same_options("thinkedit", "-o", "out") == "toolkit thinkedit -o out --model 'some model'"


def test_a_value_that_the_command_found_itself_is_repeated_and_none_is_left_out(monkeypatch):
    monkeypatch.setattr(Command, "values", {"task": None, "model": "m"})
    monkeypatch.setattr(Command, "given", frozenset())
    assert common.same_options("heads", task="a b") == "toolkit heads --task 'a b'"
    monkeypatch.setattr(Command, "values", {"task": "needle"})
    monkeypatch.setattr(Command, "given", frozenset({"task"}))
    assert common.same_options("heads", "--search", "needle", task=None) == "toolkit heads --search needle"


def test_paths_with_blanks_and_quotes_are_typed_as_one_word():
    path = Path("my runs") / "it's" / "v.safetensors"
    assert shlex.split(common.command_line("push", path, "USER/NAME")) == ["toolkit", "push", str(path), "USER/NAME"]
    assert parsed(common.same_options("steer", "-v", path, "-p", "1 + 2"))["vector"] == path


@pytest.fixture
def steps_of(monkeypatch, tiny, tmp_path):
    """``steps_of(module, words)``: the next steps that a command names after its work, which is left out."""
    monkeypatch.chdir(tmp_path)

    def run(module, *words: str) -> list[str]:
        named: dict[str, str] = {}
        monkeypatch.setattr(module, "load_model", lambda *a: tiny)
        monkeypatch.setattr(module, "next_steps", lambda **lines: named.update(lines))
        monkeypatch.setattr(module, "show", lambda *a: None)
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == 0, (result.output, result.exception)
        return list(named.values())

    return run


def test_the_task_of_rollouts_is_that_of_the_next_step(steps_of, monkeypatch):
    source = SimpleNamespace(
        task=lambda given: given or "lookup", check=lambda lm: None, rollouts=[], origin={}, temperature=1.0, problems=3,
        header={"sampling": {"max_new_tokens": 100}},
    )  # fmt: skip
    monkeypatch.setattr(jobs, "read_rollouts", lambda *a, **k: source)
    tables = {name: pd.DataFrame({"layer": [0], "head": [0], "score": [1.0], "pair": ["a"]}) for name in ("heads", "overlaps")}
    monkeypatch.setattr(jobs, "atlas", lambda *a, **k: SimpleNamespace(**tables, tables=tables))
    monkeypatch.setattr(jobs, "entropy_report", lambda *a, **k: {})
    monkeypatch.setattr(jobs, "entropy_headline", lambda tables: None)
    monkeypatch.setattr(edit, "_find_heads", lambda *a: SimpleNamespace(plan=SimpleNamespace(name="plan")))
    for name, value in {"is_saved": True, "plan_table": pd.DataFrame(), "edit_and_measure": (None, None)}.items():
        monkeypatch.setattr(jobs, name, lambda *a, _value=value, **k: _value)
    monkeypatch.setattr(report, "judged_on", lambda measured: "")
    monkeypatch.setattr(report, "headline_table", lambda summary: None)
    for module, words in (
        (lenses, ("heads", "--rollouts", "r")),
        (entropy, ("entropy", "--rollouts", "r", "-o", "out")),
        (edit, ("thinkedit", "-m", "tiny-reasoner", "--rollouts", "r", "-o", "edited")),
    ):
        line = steps_of(module, *words)[0]
        assert parsed(line)["task"] == "lookup", line
    assert "--task" not in steps_of(lenses, "heads")[0]


@pytest.mark.parametrize("search", ["lookup", "needle"])
def test_after_retrieval_heads_the_same_prompts_are_searched_and_the_task_is_not_theirs(steps_of, monkeypatch, search):
    columns = [
        "ranking",
        "rank",
        "heads",
        "op",
        "during",
        "accuracy",
        "random",
        "draws",
        *(f"more_than_random{e}" for e in ("", "_low", "_high")),
    ]
    table = pd.DataFrame([dict.fromkeys(columns, 1)])
    monkeypatch.setattr(jobs, "retrieval_report", lambda *a, **k: {"heads": table, "masking": table})
    (line,) = steps_of(lenses, "retrieval-heads", "-t", search)
    assert parsed(line)["search"] == search and parsed(line)["task"] is None


def test_after_why_both_models_and_their_options_are_named_as_typed(steps_of, monkeypatch):
    found = SimpleNamespace(heads=pd.DataFrame({"head": [0]}), undo=None, tables={})
    monkeypatch.setattr(jobs, "why_report", lambda *a, **k: found)
    monkeypatch.setattr("toolkit.jobs.why_page.undo_table", lambda undo: None)
    (line,) = steps_of(why, "why", "my model", "its; edit", "-t", "lookup", "--dtype", "bfloat16")
    params = parsed(line)
    assert (
        params["models"] == ["base=my model", "changed=its; edit"] and params["task"] == "lookup" and params["dtype"] == "bfloat16"
    )


def test_after_a_vector_is_trained_its_doses_are_measured_in_a_directory_of_the_run(steps_of, monkeypatch):
    monkeypatch.setattr("toolkit.jobs.grpo.grpo", lambda *a, **k: SimpleNamespace(main=True))
    monkeypatch.setattr("toolkit.jobs.grpo.before_and_after", lambda done: None)
    monkeypatch.setattr("toolkit.jobs.grpo.compared", lambda *a: "by step")
    monkeypatch.setattr("toolkit.jobs.grpo.training_page", lambda *a, **k: None)
    monkeypatch.setattr(pages, "write", lambda *a: None)
    made = SimpleNamespace(provenance=SimpleNamespace(notes={"strength": 2.0}))
    monkeypatch.setattr(store, "load", lambda *a: made)
    (line,) = steps_of(grpo, "grpo", "--train", "vector", "--set", "learning_rate=0.1", "-o", "my run", "-t", "lookup")
    params = parsed(line)
    assert params["out_dir"] == Path("my run/doses") and params["alpha"] == "0,1,2" and params["task"] == "lookup"


def test_after_dto_and_giraffe_the_models_options_are_carried_on(steps_of, monkeypatch):
    options = ("--think", "<a>,</a>", "--template", "enable_thinking=false", "--dtype", "bfloat16", "--device", "cpu")
    pairs = pd.DataFrame([dict.fromkeys(("correct", "segments", "exit", "dropped", "tokens", "path_tokens"), 1.0)])
    monkeypatch.setattr(jobs, "make_pairs", lambda *a, **k: ([], pairs))
    monkeypatch.setattr(jobs, "train_on_pairs", lambda *a: None)
    monkeypatch.setattr(jobs, "stretched", lambda lm, *a, **k: lm)
    shown = (
        "condition",
        "length",
        "tokens",
        "recall",
        "recall_low",
        "recall_high",
        "nll",
        "nll_change",
        "nll_change_low",
        "nll_change_high",
    )
    monkeypatch.setattr(jobs, "giraffe_report", lambda *a, **k: {"lengths": pd.DataFrame([dict.fromkeys(shown, 1.0)])})
    (compare,) = steps_of(dto, "dto", "-o", "out", "--steps", "1", "-t", "lookup", "--max-new-tokens", "77", *options)
    (check,) = steps_of(giraffe, "giraffe", "-o", "out", "--lengths", "640", "-t", "lookup", *options)
    for line in (compare, check):
        params = parsed(line)
        assert (params["think"], params["template"], params["dtype"], params["device"]) == (
            "<a>,</a>",
            ["enable_thinking=false"],
            "bfloat16",
            "cpu",
        )
    assert parsed(compare)["task"] == "lookup" and parsed(compare)["max_new_tokens"] == 77
    assert parsed(check)["model"] == "out/model"
