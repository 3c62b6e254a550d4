"""The command line: parses, calls, prints. ``toolkit --help`` lists the commands; each has examples in its own help."""

from __future__ import annotations

from rich.markup import escape

from toolkit.cli import board, edit, entropy, grpo, lenses, steer
from toolkit.cli.common import app, log

__all__ = ["app", "board", "edit", "entropy", "grpo", "lenses", "main", "steer"]


def main() -> None:
    """Run the command line; expected errors become one readable line and exit code 1."""
    try:
        app()
    except (ValueError, OSError, ImportError, KeyError, IndexError) as error:
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        log.print("[bold red]error:[/bold red]", escape(" ".join(text.split())), highlight=False, soft_wrap=True)
        raise SystemExit(1) from error
