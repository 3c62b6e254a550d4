"""The app of all commands, and how it presents them in ``--help``: commands and options in groups, one example for each command."""

from __future__ import annotations

import logging
import re
import shlex
import warnings
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

import toolkit
from toolkit.cli.printing import out, say

COMMANDS = {
    "Start here": ("demo", "check", "board"),
    "Step by step": ("rollouts", "direction", "steer", "dose", "thinkedit", "compare", "replicate"),
    "Train and extend": ("grpo", "dto", "giraffe"),
    "Look inside": ("claims", "heads", "retrieval-heads", "entropy", "why"),
    "Exchange with other tools": ("export", "import", "push"),
}
"""Group of commands in ``toolkit --help`` -> its commands, in order. A command that is not listed comes last."""
PANELS = {
    "Model": ("model", "think", "template", "dtype", "device", "trust_remote_code"),
    "Problems and sampling": (
        "task", "split", "problems", "train_problems", "instances", "length", "lengths", "tool", "samples", "temperature", "top_p", "max_new_tokens", "seed", "engine",
        "batch_size", "rollouts", "partial", "allow_overlap", "details",
    ),
    "Output": ("out_dir", "out_file", "out_path", "adapter", "force", "dry_run", "as_json"),
}  # fmt: skip
"""Group of options in the help of a command -> parameter names. The other options of a command are in its group "Options"."""
_PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}
_EXAMPLE = re.compile(r"\[bold\](toolkit [^\[]*(?:\[(?!/bold\])[^\[]*)*)\[/bold\]")


def _presented(params: list[Any]) -> list[Any]:
    """Give options their group, and switches no type: ``--json`` takes no value, so ``--json <bool>`` would mislead."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
        if param.param_type_name == "option" and not getattr(param, "rich_help_panel", None):
            param.rich_help_panel = _PANEL_OF.get(param.name)
    return params


class Command(TyperCommand):
    """A command whose options are in groups. It records which options were given on the command line, for ``reject_unread``.

    Attributes:
        given: Parameter names of the options that were given to the running command.
        values: Options and arguments of the running command, by parameter name.
        line: Command line that makes the result again: the running command with the arguments and options that were given.
    """

    given: ClassVar[frozenset[str]] = frozenset()
    values: ClassVar[dict[str, Any]] = {}
    line: ClassVar[str] = ""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return all parameters of the command."""
        return _presented(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        """Record which options were given on the command line, then run the command."""
        Command.given = frozenset(name for name in ctx.params if ctx.get_parameter_source(name).name == "COMMANDLINE")
        Command.values = dict(ctx.params)
        Command.line = _line(ctx, Command.given)
        return super().invoke(ctx)


def _line(ctx: Any, given: frozenset[str]) -> str:
    """Return the command line of a context, without options that only change what is printed or how a stopped command goes on."""
    words = ["toolkit", str(ctx.info_name)]
    for param in ctx.command.params:
        value = ctx.params.get(param.name)
        if (
            param.name not in given
            or param.name in ("as_json", "force", "resume")
            or value is None
            or getattr(param, "hidden", False)
        ):
            continue
        texts = [str(getattr(v, "value", v)) for v in (value if isinstance(value, list | tuple) else [value])]
        if param.param_type_name == "argument":
            words += texts
        elif getattr(param, "is_flag", False):
            words += [max(param.opts, key=len)] if value else [max(param.secondary_opts, key=len)] if param.secondary_opts else []
        else:
            words += [word for text in texts for word in (max(param.opts, key=len), text)]
    return shlex.join(words)


class _Group(TyperGroup):
    """The group of all commands: ``COMMANDS`` in order, each with its first sentence and its first example."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _presented(super().get_params(ctx))

    def list_commands(self, ctx: Any) -> list[str]:
        order = [name for names in COMMANDS.values() for name in names]
        return sorted(super().list_commands(ctx), key=lambda name: order.index(name) if name in order else len(order))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if isinstance(command, Command) and command.help and not command.short_help:
            command.rich_help_panel = next((group for group, names in COMMANDS.items() if cmd_name in names), "More")
            example = _EXAMPLE.search(command.help)
            first = command.help.strip().split("\n\n")[0].replace("\n", " ")
            command.short_help = first + (f"\n[dim]{' '.join(example[1].split())}[/dim]" if example else "")
        return command


class App(typer.Typer):
    """A typer app whose commands are of the class ``Command``."""

    def command(self, *names: str | None, **settings: Any) -> Any:  # type: ignore[override]
        """Return a decorator that makes a function a command; see ``typer.Typer.command``."""
        return super().command(*names, **{"cls": Command, **settings})


app = App(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    help="Find out why a reasoning model thinks too long or too short; edit, steer or train it; compare the result with random controls.\n\n"
    "New here? [bold]toolkit demo[/bold] takes a few minutes and needs no downloads. [bold]toolkit COMMAND --help[/bold] explains a command.",
)


class _Lines(logging.Handler):
    """Log handler that prints the package's log messages as lines of progress."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def _show_version(wanted: bool) -> bool:
    """Callback of ``--version``. If the option is given (``wanted``), print the version and exit."""
    if wanted:
        out.print(f"reasoning-length-toolkit {toolkit.__version__}", highlight=False)
        raise typer.Exit()
    return wanted


@app.callback()
def _begin(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make the package's log messages appear in the terminal, without those of libraries about themselves. Typer runs this first."""
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"transformers\."
    )  # deprecations: of no use to who runs a command
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # else: that a kernel could not be downloaded, even if nothing is quantised
    logger = logging.getLogger("toolkit")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines())
