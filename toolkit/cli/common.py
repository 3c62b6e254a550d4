"""Code that all commands share: the app, common options, parsing of option values, loading a model, printing tables and JSON."""

from __future__ import annotations

import inspect
import json
import os
import shlex
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from toolkit.cli.help import PANELS, Command, app
from toolkit.cli.printing import log, name_files, next_steps, out, say, show

__all__ = ["Command", "app", "log", "name_files", "next_steps", "out", "say", "show"]  # so that commands import all from here
N = TypeVar("N", int, float)
CARRIED = (*PANELS["Model"], "task", "tool", "max_new_tokens")
"""Parameters whose options ``same_options`` repeats: which model, as loaded, with which tool, and what it is judged on."""


class Stopped(BaseException):
    """Raised by Ctrl-C or SIGTERM. Its notes (``__notes__``) say how far the work got and where it is saved.

    It derives from BaseException, so that no handler of ordinary errors catches it. It does not derive from KeyboardInterrupt, which typer
    would handle itself.

    Attributes:
        number: Number of the signal, such as 15 for SIGTERM.
        remedy: Text that says how to resume.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.remedy = "run the same command again to resume"


class Dtype(StrEnum):
    """Floating-point dtypes of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Loaded(StrEnum):
    """Dtypes in which weights can be loaded; ``8bit`` and ``4bit`` quantise them."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    eight = "8bit"
    four = "4bit"


Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="tiny-reasoner, tiny-searcher, smol-reasoner, a directory, a Hugging Face id, or a .gguf file."
    ),
]
Think = Annotated[
    str | None,
    typer.Option(
        help="Think tags as 'OPEN,CLOSE'; 'response' for a model that does not mark its thinking, so that the whole response counts as thinking. Default: detected from the tokenizer."
    ),
]
Type = Annotated[
    Loaded,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Number type of the weights: float32, bfloat16, float16, or 8bit and 4bit, which quantise them with bitsandbytes. Edits are always computed in fp32.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Device that runs the model, such as cpu or cuda:1; auto offloads to the CPU what does not fit on the GPU. Default: cuda if available, else cpu."
    ),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Allow the model's own code from the Hugging Face Hub to run.")]
Template = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        help="NAME=JSON: a variable of the chat template, such as enable_thinking=false. May be repeated. A template that prints today's date prints 2026-01-01 instead, so that a stopped run can resume on another day; 'strftime_now=\"2026-11-27\"' sets another date.",
    ),
]
Task = Annotated[
    str,
    typer.Option(
        "--task",
        "-t",
        help="tiny, arithmetic, lookup, countdown, sudoku, running_sum, characters, slaq, target_length, instructions, writing, ranking, text_to_sql, searching, needle, threading, wordproblems, gsm8k, math500, gym:NAME (reasoning-gym), or a JSONL file of problems.",
    ),
]
TaskOfRollouts = Annotated[
    str | None,
    typer.Option(
        "--task", "-t", help="Task, as for `toolkit rollouts`. Default: the task of --rollouts if given, else arithmetic."
    ),
]
Split = Annotated[
    str,
    typer.Option(
        help="Split of the problems: train, dev or test. A file of problems may set the split of each problem in meta.split."
    ),
]
Partial = Annotated[
    bool,
    typer.Option(
        "--partial",
        help="Use --rollouts even if the run that sampled them is incomplete. Short prompts are sampled first, so they are overrepresented.",
    ),
]
AllowOverlap = Annotated[
    bool,
    typer.Option(
        "--allow-overlap",
        help="Evaluate also on problems that the edit or direction was made from, instead of refusing; tables and cards then say so.",
    ),
]
Problems = Annotated[int, typer.Option("--problems", "-n", min=1, help="Number of problems.")]
Samples = Annotated[int, typer.Option("--samples", "-k", min=1, help="Samples per problem.")]
Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy decoding.")]
Budget = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Token budget of a response.")]
BatchSize = Annotated[
    int,
    typer.Option(
        min=1, help="Rows decoded together; with --engine URL, requests in flight at most. It does not change the samples."
    ),
]
EngineAddress = Annotated[
    str,
    typer.Option(
        "--engine",
        help="What samples the tokens: ours (this process), vllm (in this process, on a GPU), or the address of a server that serves the same weights, such as http://localhost:8000 (llama-server, vLLM, SGLang, Ollama). Its weights are checked by log-probabilities.",
    ),
]
ToolName = Annotated[
    str | None,
    typer.Option(
        "--tool",
        help="Tool that responses may call: search, over the corpus of the task searching (needs the extra search). Default: none.",
    ),
]
Track = Annotated[
    str | None,
    typer.Option(
        help="Also send the training log to a tracker: trackio, wandb or tensorboard (needs the extra track). tensorboard and trackio write files on this machine; trackio sends them elsewhere only if TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set. wandb sends the log, and facts about this machine, to its service unless WANDB_MODE=offline. [default: none; nothing leaves this machine]"
    ),
]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def parse_switches(texts: list[str] | None) -> dict[str, Any]:
    """Parse texts ``NAME=JSON`` into a dict from the name of a chat template variable to its value.

    Raises:
        BadParameter: a text is not of the form ``NAME=JSON``.
    """
    switches = {}
    for name, sign, value in (text.partition("=") for text in texts or []):
        try:
            switches[name] = json.loads(value)
        except json.JSONDecodeError as error:
            raise typer.BadParameter(
                f"--template {name}{sign}{value}: give NAME=JSON, such as enable_thinking=false or 'reasoning_effort=\"low\"'."
            ) from error
    return switches


def reject_unread(why: str, *names: str) -> None:
    """Raise BadParameter if one of the named options was given on the command line. Call it where the command would ignore them.

    This works only in commands of the class ``Command``.

    Args:
        why: End of the sentence "--NAME is not used ...", such as ``"by --op add"``.
        names: Parameter names of the ignored options.
    """
    for name in names:
        if name in Command.given:
            raise typer.BadParameter(f"--{name.replace('_', '-')} is not used {why}: leave it out.")


def command_line(*words: object) -> str:
    """Return a command of the toolkit that a shell takes as it is, such as ``toolkit push 'my model' USER/NAME``.

    Args:
        words: Name of the command and its arguments, such as paths with blanks.
    """
    return shlex.join(["toolkit", *map(str, words)])


def same_options(*words: object, more: Sequence[str] = (), **found: Any) -> str:
    """Return a command for ``next_steps``, with the options of the running command that the other command needs too.

    Those are the options in ``CARRIED`` that were given and that the other command has. An option that the other command requires is
    repeated even if it was not given.

    Args:
        words: Name of the command and its first arguments, such as ``"dose", "-v", path``.
        more: Parameter names of further options to repeat, such as ``"layers"``.
        found: Values that replace those of the command line, such as the task of --rollouts. ``None`` leaves the option out.
    """
    callbacks = {c.name or c.callback.__name__: c.callback for c in app.registered_commands if c.callback}
    parameters = inspect.signature(callbacks[str(words[0])]).parameters
    line = [command_line(*words)]
    for name in (*CARRIED, *more):
        value = {**Command.values, **found}.get(name)
        required = name in parameters and parameters[name].default is inspect.Parameter.empty
        if name not in parameters or value is None or not (required or name in found or name in Command.given):
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            line += [option] if value else []
        else:
            line += [f"{option} {shlex.quote(str(part))}" for part in (value if isinstance(value, list) else [value])]
    return " ".join(line)


def parse_numbers(text: str | None, option: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    """Parse numbers separated by commas; ``None`` gives an empty tuple.

    Args:
        text: Text, such as ``"1,2,4"``.
        option: Name of the option, for the error message.
        kind: ``int`` or ``float``.

    Raises:
        BadParameter: a part of the text is not a number of this kind.
    """
    # A leading "=" is removed: "-a=-1,0" reaches the option as "=-1,0".
    try:
        return () if text is None else tuple(kind(part) for part in text.removeprefix("=").split(","))
    except ValueError as error:
        expected = (
            "whole numbers separated by commas, such as 256,1024" if kind is int else "numbers separated by commas, such as -1,0,1"
        )
        raise typer.BadParameter(f"{option} {text}: give {expected}.") from error


def weight_type(dtype: Dtype) -> Any:
    """Return the ``torch.dtype`` of a ``Dtype``."""
    import torch

    return getattr(torch, dtype.value)


def load_model(model: str, think: str | None, dtype: Dtype | Loaded, device: str | None, trust: bool, template: list[str] | None):
    """Load the model of the option --model and return it as an ``LM``.

    The other arguments are the values of --think, --dtype, --device, --trust-remote-code and --template.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    from toolkit import lm, progress

    if not progress.is_watched():
        # Progress bars of libraries write carriage returns into log files.
        transformers_logging.disable_progress_bar()
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # datasets is imported later, if at all
    quantised = dtype in (Loaded.four, Loaded.eight)
    numbers = Dtype.bfloat16 if torch.cuda.is_available() else Dtype.float32  # dtype of computation with quantised weights
    return lm.load(
        model,
        dtype=weight_type(numbers if quantised else Dtype(dtype)),
        device=None if device == "auto" else device,
        device_map="auto" if device == "auto" else None,
        quantization=dtype.value if quantised else None,
        tags=lm.ThinkTags.parse(think) if think else None,
        template=parse_switches(template),
        trust_remote_code=trust,
    )


def connect_engine(address: str, lm: Any, work: Path, parallel: int | None = None):
    """Return the engine (the program that samples responses) that the option --engine names.

    Args:
        address: Value of the option.
        lm: Base model of the conditions whose responses are to be sampled.
        work: Directory of the command's intermediate files. If the engine is a server, the adapters that it loads are written into it.
        parallel: Largest number of requests in flight; ``None`` means the default for the kind of server.
    """
    from toolkit import engines

    return engines.connect(address, lm, adapters=work / "adapters", parallel=parallel)


def find_toolbox(tool: str | None):
    """Return the ``tools.Toolbox`` that the option --tool names, or ``None`` without the option.

    Raises:
        BadParameter: there is no such tool.
        ImportError: the tool needs a package that is not installed.
    """
    if tool not in (None, "search"):
        raise typer.BadParameter(f"--tool {tool}: the only tool is search.")
    if tool is None:
        return None
    from toolkit.tasks import searching

    return searching.toolbox()


def check_file(path: Path, force: bool) -> None:
    """Check before any work that a file can be written: its directory is writable, and only with ``force`` there may be something there.

    Raises:
        FileExistsError: there is a directory, or a file and no ``force``.
        OSError: the directory cannot be written.
    """
    from toolkit import store

    if path.is_dir():
        raise FileExistsError(f"{path} is a directory: give a file with --out, such as {path / 'direction.safetensors'}.")
    if path.exists() and not force:
        raise FileExistsError(f"{path} already exists: choose another file, or overwrite it with --force.")
    store.writable(path.parent)


def print_json(value: Any) -> None:
    """Print a value to stdout as one JSON document, in ASCII and without colours; NaN and infinity become null."""
    from toolkit import pages

    typer.echo(json.dumps(pages.plain(value), indent=2, allow_nan=False))  # not rich: with FORCE_COLOR it writes colours into pipes


def result_directory(directory: Path | None, command: str, *identity: Any) -> Path:
    """Return the directory for a command's rollouts, which is created if it does not exist.

    Args:
        directory: Directory that the user gave. ``None`` means ``runs/COMMAND/KEY``, where KEY is a hash of ``identity``.
        command: Name of the command.
        identity: Values that determine the rollouts, such as model and options.
    """
    from toolkit import store

    return store.writable(directory or Path("runs") / command / store.key(list(identity)))
