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


# Notebook -> beginnings of the asserts that hold for every model: on the toolkit itself, or on results that are read from data/.
NOT_FINDINGS = {
    "01_think_edit": ("(at_run_time - in_weights)", "edited.parent ==", "lm.load(folder).fingerprint"),
    "02_steering": ("(again.vector",),
    "03_neighbours": (
        "ours ==", "[bridges.site_of_nnsight", "len({m.n for m", "all(((distance <", "all((d <", "torch.equal(", "model.fingerprint ==",
    ),
    "04_retrieval_heads": ("(smollm2['masking']",),
    "06_head_atlas": ("(overlaps['p_holm'] >=",),
    "07_rewards": ("(one.loc[~one['correct'], 'reward'] == 0)", "np.array_equal(before", "len(hapo.history)", "abs(both(batch)", "paid =="),
    "08_grpo": ("first[0] == first[1]", "longer.log['step']", "(naive_price[", "oracle[32] <="),
    "09_board": ("",),  # all are on the committed board, or on what a board keeps
}  # fmt: skip


def asserted(nodes, guarded: bool = False):
    """Each assert below the nodes, with True if it stands under ``if MODEL == "tiny-reasoner"``, alone or with more conditions."""
    for node in nodes:
        if isinstance(node, ast.Assert):
            yield ast.unparse(node.test), guarded
        inside = guarded or (isinstance(node, ast.If) and ast.unparse(node.test).startswith("MODEL == 'tiny-reasoner'"))
        yield from asserted(ast.iter_child_nodes(node), inside)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_finding_about_the_tiny_reasoner_is_not_asserted_of_another_model(path):
    """A reader who changes MODEL, as every notebook suggests, must not get an AssertionError after minutes."""
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    if any(re.search(r"^MODEL = ", source, re.MULTILINE) for source in sources):
        unguarded = [text for source in sources for text, guarded in asserted([ast.parse(source)]) if not guarded]
        general = NOT_FINDINGS.get(path.stem, ())
        assert [text for text in unguarded if not text.startswith(general)] == []
        assert all(any(text.startswith(start) for text in unguarded) for start in general), "an exception that no assert needs"


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
