"""Shared by the commands: the app, common options, loading a model, printing tables and JSON."""

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
    help="Find out why a reasoning model thinks too long or too short, edit, steer or train it, and compare the result with controls.",
)
out, log = Console(), Console(stderr=True)
N = TypeVar("N", int, float)


class Stopped(BaseException):
    """The user or the system stopped the command. Its notes list what is saved; ``remedy`` says how to resume.

    It is not an Exception, so that no error handler catches it, and not a KeyboardInterrupt, which typer would handle itself.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.remedy = "run the same command again to resume"


class _Lines(logging.Handler):
    """Print the package's log messages as lines of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


@app.callback()
def _begin() -> None:
    logger = logging.getLogger("toolkit")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines())


class Dtype(StrEnum):
    """Number types of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[
    str, typer.Option("--model", "-m", help="tiny-reasoner, smol-reasoner, a directory, a Hugging Face id, or a .gguf file.")
]
Think = Annotated[
    str | None,
    typer.Option(
        help="Think tags as 'OPEN,CLOSE', or 'response' for a model that does not mark its thinking. Default: detected from the tokenizer."
    ),
]
Type = Annotated[Dtype, typer.Option("--dtype", help="Number type of the weights. Edits are always computed in fp32.")]
Device = Annotated[str | None, typer.Option(help="Default: cuda if available, else cpu.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Allow the model's own code from the Hugging Face Hub to run.")]
Template = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        help="NAME=JSON: a switch of the chat template, such as enable_thinking=false. May be repeated.",
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
    str | None,
    typer.Option("--task", "-t", help="Task, as for `toolkit rollouts`. Default: that of --rollouts, else arithmetic."),
]
Split = Annotated[str, typer.Option(help="train, dev or test. A file of problems may set the split of each problem in meta.split.")]
Partial = Annotated[
    bool,
    typer.Option(
        "--partial",
        help="Use --rollouts even if their run is incomplete. Short prompts are sampled first, so they are overrepresented.",
    ),
]
AllowOverlap = Annotated[
    bool,
    typer.Option(
        "--allow-overlap", help="Also evaluate on problems that the edit or direction was made from; tables and cards then say so."
    ),
]
Problems = Annotated[int, typer.Option("--problems", "-n", min=1, help="Number of problems.")]
Samples = Annotated[int, typer.Option("--samples", "-k", min=1, help="Samples per problem.")]
Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")]
Budget = Annotated[int, typer.Option("--max-new-tokens", help="Token budget of a response.")]
BatchSize = Annotated[int, typer.Option(help="Rows decoded together; does not change the samples.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def parse_switches(texts: list[str] | None) -> dict[str, Any]:
    """Parse ``NAME=JSON`` texts as switches of a chat template."""
    switches = {}
    for name, sign, value in (text.partition("=") for text in texts or []):
        try:
            switches[name] = json.loads(value)
        except json.JSONDecodeError as error:
            raise typer.BadParameter(
                f"--template {name}{sign}{value}: give NAME=JSON, such as enable_thinking=false or 'reasoning_effort=\"low\"'."
            ) from error
    return switches


class Command(TyperCommand):
    """A command that records which options were given on the command line, for ``reject_unread``."""

    given: ClassVar[frozenset[str]] = frozenset()

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        Command.given = frozenset(name for name in ctx.params if ctx.get_parameter_source(name).name == "COMMANDLINE")
        return super().invoke(ctx)


def reject_unread(why: str, *names: str) -> None:
    """Raise BadParameter if one of these options was given although the command would ignore it.

    Args:
        why: Reason, such as ``"by --op add"``.
        names: Parameter names of the options. The command must be a ``Command``.
    """
    for name in names:
        if name in Command.given:
            raise typer.BadParameter(f"--{name.replace('_', '-')} is not used {why}: leave it out.")


def parse_numbers(text: str | None, option: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    """Parse numbers separated by commas; ``None`` gives an empty tuple."""
    try:
        return () if text is None else tuple(kind(part) for part in text.removeprefix("=").split(","))
    except ValueError as error:
        expected = (
            "whole numbers separated by commas, such as 256,1024" if kind is int else "numbers separated by commas, such as -1,0,1"
        )
        raise typer.BadParameter(f"{option} {text}: give {expected}.") from error


def weight_type(dtype: Dtype) -> Any:
    """Return the ``torch.dtype`` of that name."""
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
    """Return the directory for a command's rollouts: ``directory``, or one in ``runs/COMMAND`` named by a key of ``identity``."""
    from toolkit import store

    return store.writable(directory or Path("runs") / command / store.key(list(identity)))
