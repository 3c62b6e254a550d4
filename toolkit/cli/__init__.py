"""The command line ``toolkit``: parse options, call the functions of ``toolkit.jobs``, and print results.

``toolkit --help`` lists the commands.
"""

from __future__ import annotations

import signal

from rich.markup import escape

from toolkit.cli import board, check, claims, dto, edit, entropy, export, giraffe, grpo, lenses, replicate, steer, why
from toolkit.cli.common import Stopped, app, log

__all__ = [
    "Stopped",
    "app",
    "board",
    "check",
    "claims",
    "dto",
    "edit",
    "entropy",
    "export",
    "giraffe",
    "grpo",
    "lenses",
    "main",
    "replicate",
    "steer",
    "why",
]


def main() -> None:
    """Run the command that is given on the command line.

    An expected error, such as a wrong option value or a missing file, prints one line and exits with code 1. Ctrl-C prints one line and
    exits with code 130, SIGTERM with code 143.
    """
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        app()
    except Stopped as stopped:
        kept = ", ".join(getattr(stopped, "__notes__", ()))
        log.print(f"Stopped{': ' + kept if kept else ''}; {stopped.remedy}.", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(128 + stopped.number) from stopped
    except (ValueError, OSError, ImportError, KeyError, IndexError) as error:
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        log.print("[bold red]error:[/bold red]", escape(" ".join(text.split())), highlight=False, soft_wrap=True)
        raise SystemExit(1) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: object) -> None:
    """Handle SIGINT or SIGTERM: raise ``Stopped``."""
    signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
    raise Stopped(number)
