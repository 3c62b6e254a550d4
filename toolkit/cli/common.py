"""What the commands share: the app, its options, loading a model, printing tables and JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import pandas as pd
import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    help="Find why a reasoning model thinks too long or too short, edit or steer it, and judge the change with controls.",
)
out, log = Console(), Console(stderr=True)
N = TypeVar("N", int, float)


class Stopped(BaseException):
    """The user or the system stopped the command. Its notes tell what is kept; ``remedy`` what to do to go on.

    Not an Exception, so that nothing that expects errors takes it for one; not a KeyboardInterrupt, which typer would answer itself.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.remedy = "give the same command again"


class _Lines(logging.Handler):
    """What the package logs, as lines of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


@app.callback()
def _begin() -> None:
    logger = logging.getLogger("toolkit")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines())


class Dtype(StrEnum):
    """Weight types."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[str, typer.Option("--model", "-m", help="tiny-reasoner, smol-reasoner, a directory, a hub id, or a .gguf file.")]
Think = Annotated[
    str | None,
    typer.Option(
        help="Think tags as 'OPEN,CLOSE', or 'response' for models that do not mark their thinking. Default: found in the tokenizer."
    ),
]
Type = Annotated[Dtype, typer.Option("--dtype", help="Weight type; edits are computed in fp32 whatever it is.")]
Device = Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let code from the hub run. Off unless given.")]
Template = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        help="NAME=JSON, several times: a switch of the chat template for every prompt, such as enable_thinking=false.",
    ),
]
Task = Annotated[
    str,
    typer.Option(
        "--task",
        "-t",
        help="tiny, arithmetic, lookup, countdown, running_sum, characters, slaq, target_length, needle, threading, wordproblems, gsm8k, math500, gym:NAME (reasoning-gym), or a JSONL file of problems.",
    ),
]
TaskOfRollouts = Annotated[
    str | None, typer.Option("--task", "-t", help="As for `toolkit rollouts`. Default: that of --rollouts, else arithmetic.")
]
Split = Annotated[str, typer.Option(help="train, dev or test; a file of problems may name its own in meta.split.")]
Partial = Annotated[
    bool,
    typer.Option("--partial", help="Use --rollouts also if their run was stopped; the part there is begins with short prompts."),
]
AllowOverlap = Annotated[
    bool,
    typer.Option("--allow-overlap", help="Judge also on problems that it was made from; every table and card then says so."),
]
Problems = Annotated[int, typer.Option("--problems", "-n", min=1, help="How many problems.")]
Samples = Annotated[int, typer.Option("--samples", "-k", min=1, help="Samples a problem.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
Budget = Annotated[int, typer.Option("--max-new-tokens", help="Budget of a response in tokens.")]
BatchSize = Annotated[int, typer.Option(help="Rows decoded together; never changes what is sampled.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def parse_switches(given: list[str] | None) -> dict[str, Any]:
    """Read ``NAME=JSON`` texts as the switches of a chat template."""
    found = {}
    for name, sign, value in (text.partition("=") for text in given or []):
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError as error:
            raise typer.BadParameter(
                f"--template {name}{sign}{value}: give NAME=JSON, such as enable_thinking=false or 'reasoning_effort=\"low\"'."
            ) from error
    return found


class Command(TyperCommand):
    """A command that knows which of its options were given, for :func:`reject_unread`."""

    given: ClassVar[frozenset[str]] = frozenset()

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        Command.given = frozenset(name for name in ctx.params if ctx.get_parameter_source(name).name == "COMMANDLINE")
        return super().invoke(ctx)


def reject_unread(why: str, *names: str) -> None:
    """Raise BadParameter if an option of these names was given, though the command (a :class:`Command`) does not read it: ``why``."""
    for name in names:
        if name in Command.given:
            raise typer.BadParameter(f"--{name.replace('_', '-')} is not read {why}: leave it out.")


def parse_numbers(text: str | None, option: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    """Numbers joined by commas; none for ``None``."""
    try:
        return () if text is None else tuple(kind(part) for part in text.removeprefix("=").split(","))
    except ValueError as error:
        what = "whole numbers joined by commas, such as 256,1024" if kind is int else "numbers joined by commas, such as -1,0,1"
        raise typer.BadParameter(f"{option} {text}: give {what}.") from error


def weight_type(dtype: Dtype) -> Any:
    """The ``torch.dtype`` of that name."""
    import torch

    return getattr(torch, dtype.value)


def load_model(
    model: str, think: str | None, dtype: Dtype, device: str | None, trust: bool = False, template: list[str] | None = None
):
    from toolkit import lm

    tags = lm.ThinkTags.parse(think) if think else None
    of_template = parse_switches(template)
    return lm.load(model, dtype=weight_type(dtype), device=device, tags=tags, template=of_template, trust_remote_code=trust)


def show(frame: pd.DataFrame, title: str) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column(frame.index.name or "", overflow="fold")
    for column in frame.columns:
        table.add_column(str(column), justify="right")
    for name, *row in frame.itertuples():
        table.add_row(str(name), *(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    out.print(table)


def print_json(value: Any) -> None:
    from toolkit import store

    out.print_json(json.dumps(value, default=store.jsonable))


def say(text: str) -> None:
    log.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)


def result_directory(directory: Path | None, command: str, *identity: Any) -> Path:
    """Where a command keeps what it samples: the directory given, else one below ``runs`` that is named by everything in ``identity``."""
    from toolkit import store

    chosen = directory or Path("runs") / command / store.key(list(identity))
    return store.writable(chosen)
