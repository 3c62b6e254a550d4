"""Every notebook runs from top to bottom, in its small setting, and asserts what it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_FAST", "1")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    errors = [o for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "error"]
    assert not errors


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_prose_first_without_long_functions_and_asserts_something(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown"
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    assert any("assert " in source for source in sources)
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno < 10


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_visible_without_javascript_and_hold_no_dead_widgets(path):
    cells = nbformat.read(path, as_version=4).cells
    for data in (output.get("data", {}) for cell in cells for output in cell.get("outputs", [])):
        assert "image/png" in data or "application/vnd.plotly.v1+json" not in data
        assert "application/vnd.jupyter.widget-view+json" not in data


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_says_how_long_it_takes_and_what_to_try_next(path):
    first, *_, last = nbformat.read(path, as_version=4).cells
    assert re.search(r"\*Takes about \d+ minutes? on one processor core\.\*$", first.source)
    assert last.source.startswith("## What to try next\n\n- ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_between_notebooks_lead_somewhere(path):
    for cell in nbformat.read(path, as_version=4).cells:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", cell.source) if cell.cell_type == "markdown" else []:
            assert (FOLDER / target).exists(), target
