"""What a new user meets on the command line: version, help, tables at 80 columns, next steps, models that do not exist, existing files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from rich.console import Console
from typer.testing import CliRunner

import toolkit
from toolkit import cli, repositories, store, tasks
from toolkit.cli import help as helps
from toolkit.cli import printing
from toolkit.sites import UnsupportedModelError
from toolkit.types import Direction

NAMES = [name for names in helps.COMMANDS.values() for name in names]


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})


def test_the_version_is_that_of_the_package():
    assert run("--version").output.strip() == f"reasoning-length-toolkit {toolkit.__version__}"


def test_the_help_groups_every_command_and_shows_an_example_of_each():
    shown = " ".join(run("--help").output.replace("│", " ").split())
    assert all(group in shown for group in helps.COMMANDS)
    assert "More" not in shown, "a command is in no group of cli.help.COMMANDS"
    for name in NAMES:
        assert f" toolkit {name} " in shown, name


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_command_has_groups_and_switches_without_a_type(name):
    shown = run(name, "--help").output
    assert "<bool>" not in shown and "Example" in shown
    assert max(map(len, shown.splitlines())) <= 80
    if "--model" in shown and name != "check":
        assert "─ Model ─" in shown


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_table_fits_the_terminal_and_loses_no_word(width, monkeypatch, capsys):
    monkeypatch.setattr(printing, "out", Console(width=width))
    table = pd.DataFrame(
        {f"think_tokens_of_condition_{i}": [f"12.{i} (-1.2 [-3.4, 0.5])", 3.14159] for i in range(9)},
        index=pd.Index(["base", "control: random heads edited"], name="condition"),
    )
    printing.show(table, "A title")
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    words = re.findall(r"[^\s┃│┏┓┡┩└┘━─┳╇┴┼╞╡]+", shown)
    for word in ("control:", "random", "condition", *(f"12.{i}" for i in range(9)), "(-1.2", "[-3.4,", "0.5])", "3.14"):
        assert word in words, word


def test_a_table_that_fits_is_one_table_with_short_cells_on_one_line(monkeypatch, capsys):
    monkeypatch.setattr(printing, "out", Console(width=80))
    frame = pd.DataFrame(
        {"task": ["arithmetic"] * 2, "difficulty": [2, 3], "think_tokens": [9.08, 14.0], "response_tokens": [14.1, 18.8]}
    )
    printing.show(frame, "Rollouts")
    shown = capsys.readouterr().out
    assert shown.count("┏") == 1
    assert len([line for line in shown.splitlines() if "arithmetic" in line]) == 2


def test_brackets_in_a_cell_are_text_and_not_markup(monkeypatch, capsys):
    monkeypatch.setattr(printing, "out", Console(width=80))
    printing.show(pd.DataFrame({"tag": ["[THINK]"]}), "Tags [THINK]")
    assert capsys.readouterr().out.count("[THINK]") == 2


@pytest.mark.parametrize("name", ["nosuch/model", "tiny-reasonner"])
def test_a_model_that_does_not_exist_is_said_to_be_neither_directory_nor_hub_model(name):
    result = run("check", name)
    said = " ".join(result.output.split())
    assert result.exit_code == 1
    assert f"No directory or hub model '{name}'" in said and "downloads are switched off" in said


class Missing:
    """The hub, which does not know the repository."""

    def model_info(self, name, revision, timeout):
        raise RepositoryNotFoundError("404", response=type("R", (), {"headers": {}, "request": None, "status_code": 404})())


class Unreachable:
    def model_info(self, name, revision, timeout):
        raise ConnectionError("no route")


@pytest.mark.parametrize(
    ("hub", "said"),
    [(Missing, "No directory or hub model 'a/b': check the spelling"), (Unreachable, r"cannot be reached \(ConnectionError\)")],
)
def test_the_reason_why_a_hub_model_is_missing_is_said(hub, said, monkeypatch):
    monkeypatch.setattr(repositories, "HfApi", hub)
    with pytest.raises(UnsupportedModelError, match=said):
        repositories.check_exists("a/b")


@pytest.fixture
def vector(tiny, tmp_path):
    v = torch.randn(tiny.layout.n_layers, tiny.layout.d_model, generator=torch.Generator().manual_seed(0))
    v[0] = 0.0
    return store.save(
        Direction(v, "resid_post", "think", "by hand", 1, 1, tiny.provenance(task="arithmetic")), tmp_path / "v.safetensors"
    )


def test_a_file_is_overwritten_only_with_force(vector, tmp_path):
    mine = tmp_path / "mine.gguf"
    store.write_text("precious", mine)
    asked = ("export", "-v", vector, "--to", "gguf", "-o", mine)
    assert "already exists: choose another file, or overwrite it with --force" in str(run(*asked).exception)
    assert mine.read_text() == "precious"
    assert run(*asked, "--force").exit_code == 0
    asked = ("import", mine, "--from", "gguf", "-o", vector)
    assert "already exists" in str(run(*asked).exception)
    assert run(*asked, "--force").exit_code == 0
    assert "Next:" in run("import", mine, "--from", "gguf", "-o", tmp_path / "again.safetensors").output


def test_an_existing_file_is_noticed_before_a_model_is_loaded(vector, tmp_path, monkeypatch):
    monkeypatch.setattr("toolkit.cli.export.load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    for taken, said in ((vector, "already exists"), (tmp_path, "is a directory")):
        assert said in str(run("export", "-v", vector, "--to", "gguf", "-o", taken).exception)


def test_without_alpha_steer_shows_strengths_that_fit_and_says_so(vector, tmp_path):
    asked = ("steer", "-v", vector, "-p", "7+8-3=?", "-k", 2, "--max-new-tokens", 50, "-o", tmp_path / "out")
    result = run(*asked)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert (
        "usable" in said and "Relative dose" in said and f"toolkit dose -o runs/doses --max-new-tokens 50 --vector {vector}" in said
    )
    found = json.loads(run(*asked, "--json").stdout)
    assert {row["strength"] for row in found} >= {0.0} and all({"prompt", "sample", "closed", "text"} < set(row) for row in found)


def test_rollouts_of_other_problems_are_told_by_number_not_by_hash(tmp_path):
    sizes = ("-k", 1, "--max-new-tokens", 8, "-o", tmp_path / "r")
    assert run("rollouts", "-n", 3, *sizes).exit_code == 0
    said = str(run("rollouts", "-n", 2, *sizes).exception)
    assert "3 problems there, 2 here" in said and not re.search(r"\b[0-9a-f]{10,}\b", said.replace(str(tmp_path), ""))


def test_only_can_name_every_condition_of_the_board():
    from toolkit import board
    from toolkit.board import default

    for spec in default.CONDITIONS:
        chosen = [s.name for s in board.select_conditions(default.CONDITIONS, spec.name)]
        assert chosen == list(dict.fromkeys(["base", spec.name]))
    with pytest.raises(ValueError, match="No condition matches 'nothing'"):
        board.select_conditions(default.CONDITIONS, "base,nothing")


def test_json_is_one_document_with_null_for_what_is_not_finite_and_no_colours(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    cli.common.print_json(
        {"mean": float("nan"), "low": -math.inf, "of": torch.tensor([1.5]), "text": "[bold]λ[/bold]", "at": Path("a")}
    )
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"mean": None, "low": None, "of": [1.5], "text": "[bold]λ[/bold]", "at": "a"}
    assert printed.isascii() and "\x1b" not in printed and "NaN" not in printed


def test_json_has_full_numbers_and_says_where_the_files_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = json.loads(run("rollouts", "-n", 3, "-k", 3, "--max-new-tokens", 60, "-o", "r", "--json").stdout)
    rows = store.load_rollouts(tmp_path / "r")
    assert sum(row["think_tokens"] * row["rollouts"] for row in found["by_difficulty"]) == pytest.approx(
        sum(r.think_tokens for r in rows), abs=1e-9
    )
    compared = json.loads(run("compare", "base=tiny-reasoner", "-n", 2, "-k", 1, "--max-new-tokens", 20, "--json").stdout)
    assert (tmp_path / compared["out"] / "report.html").is_file()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"question": "Capital of France?", "answer": "Paris"}', "mine.jsonl, line 3: the answer 'Paris' holds no number"),
        ("not JSON", "mine.jsonl, line 3: it is not JSON: Expecting value, at character 1"),
        ('{"question": "2+2=?"}', "mine.jsonl, line 3: the line has no 'answer'"),
    ],
)
def test_a_bad_problem_is_named_by_its_line(line, said, tmp_path):
    store.write_text('{"question": "1+1=?", "answer": 2}\n\n' + line + "\n", tmp_path / "mine.jsonl")
    assert said in str(run("rollouts", "-t", tmp_path / "mine.jsonl", "-o", tmp_path / "r").exception)


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.json", "problems/mine"])
def test_a_problem_file_that_does_not_exist_is_said_to_be_missing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"No problem file at {name}" in str(run("rollouts", "-t", name, "-o", "r").exception)


def test_a_small_file_says_how_it_was_divided(tmp_path, caplog):
    file = store.write_text("".join(f'{{"question": "{i}+1=?", "answer": {i + 1}}}\n' for i in range(12)), tmp_path / "mine.jsonl")
    with caplog.at_level("WARNING", "toolkit"):
        assert len(tasks.load(str(file), "train", 12)) < 12
    assert "fewer than the 12 requested" in caplog.text and "a hash of the id decides" in caplog.text
