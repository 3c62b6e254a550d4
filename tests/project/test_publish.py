"""Numbers are spliced into pages between marks, and nowhere else."""

from __future__ import annotations

import pytest
from test_readme import ROOT, script

publish = script(ROOT / "data/publish.py")


def test_a_text_replaces_what_is_between_its_marks_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x: begin -->\nold \\1\n<!-- x: end -->\nb\n<!-- y: begin -->\nstays\n<!-- y: end -->\n")
    publish.splice("x", "new \\1", page)
    assert page.read_text() == "a\n<!-- x: begin -->\n\nnew \\1\n\n<!-- x: end -->\nb\n<!-- y: begin -->\nstays\n<!-- y: end -->\n"
    with pytest.raises(ValueError, match="0 pairs of the marks <!-- z: begin -->"):
        publish.splice("z", "new", page)
