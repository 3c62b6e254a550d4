"""Next steps that a command prints can be typed as printed, and use the model and task of the command that prints them."""

from __future__ import annotations

import shlex

import pytest
import typer

from toolkit.cli import common
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
    params = parsed(common.same_options(line, "layers"))
    kept = {name: value for name, value in GIVEN.items() if name in params and name != "as_json"}
    assert {"think", "template", "dtype", "device", "trust_remote_code"} <= kept.keys()
    assert {name: params[name] for name in kept} == kept


def test_what_was_not_given_is_not_repeated_unless_the_next_command_needs_it(monkeypatch):
    monkeypatch.setattr(Command, "values", GIVEN | {"trust_remote_code": False})
    monkeypatch.setattr(Command, "given", frozenset({"trust_remote_code"}))
    assert common.same_options("toolkit heads -r runs/r") == "toolkit heads -r runs/r"
    assert common.same_options("toolkit thinkedit -o out") == "toolkit thinkedit -o out --model 'some model'"
