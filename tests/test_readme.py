"""The README keeps its word: its commands run, its Python runs, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from toolkit import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_command_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Blocks without a language are commands to run; "text" marks those that need a hub and a GPU.
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    plain = "".join(body for language, body in blocks if not language)
    commands = re.findall(r"^toolkit .+$", plain, re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        result = CliRunner().invoke(cli.app, shlex.split(command)[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
    assert (tmp_path / "runs/edited/model.safetensors").is_file()


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert set(names["report"].conditions) == {"base", "edited", "random heads"}


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)]+)\)", README))))
def test_links_of_the_readme_lead_to_files(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake (\w+)", README)) - {"and"}))
def test_make_targets_of_the_readme_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_table_of_the_readme_is_the_one_the_demo_wrote():
    spec = importlib.util.spec_from_file_location("update", ROOT / "notebooks/figures/update.py")
    update = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update)
    board = json.loads((ROOT / "notebooks/figures/demo.json").read_text())
    assert len(board) > 6
    assert update.table(board) in README
