"""Lines that commands print."""

from __future__ import annotations

from pathlib import Path

from toolkit.cli import printing


def test_a_path_is_printed_as_it_is_on_one_line(capsys, monkeypatch):
    """A long path is not broken, and what looks like markup in a path is part of its name."""
    monkeypatch.setattr(printing.out, "_width", 40)
    path = Path("/runs/[bold]a {trial}", "x" * 80, "report.html")
    printing.name_files("Open {}; the rest is in {}.", path, "here")
    assert capsys.readouterr().out == f"Open {path}; the rest is in here.\n"
