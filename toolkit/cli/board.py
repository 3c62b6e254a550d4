"""The command ``board``: compare interventions and trained policies on the same problems."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from toolkit import processes
from toolkit.cli.common import (
    AsJson,
    Command,
    Device,
    EngineAddress,
    Loaded,
    Model,
    Template,
    Think,
    Track,
    Trust,
    Type,
    app,
    connect_engine,
    load_model,
    name_files,
    next_steps,
    print_json,
    say,
    show,
)
from toolkit.cli.grpo import Rank

SHOWN = ("accuracy", "think_tokens", "aes", "shortest_20", "accuracy_lookup", "never_closed")  # metrics in the terminal's table
WORKER = "--measure-only"  # hidden option of the processes that help with --jobs


@app.command()
def board(
    model: Model = "tiny-reasoner",
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Directory of the results and of the board.")] = Path("runs/board"),
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Measure every condition on few problems, in about 20 minutes on two cores (estimated). For a trial run only: too small for conclusions.",
        ),
    ] = False,
    conditions: Annotated[
        Path | None,
        typer.Option(
            help="A Python file that defines CONDITIONS and, optionally, SIZES; copy toolkit/board/default.py. The file is executed, so give only one that you trust."
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Measure only these conditions: names or patterns, separated by commas, e.g. 'GRPO*,DLER, merged'. base is always included. A name that does not exist is answered with all names."
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds for conditions that are random or trained.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Train policies on this task, and evaluate on it instead of all main tasks, e.g. gsm8k.")
    ] = None,
    problems: Annotated[
        int | None,
        typer.Option("--problems", "-n", min=2, help="Number of test problems of the main task (the first, if there are several)."),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Token budget of a response.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps per policy.")] = None,
    train: Annotated[
        str,
        typer.Option(
            help="Part of each policy to train: all, adapter or vector (see toolkit grpo). vector needs --set learning_rate=RATE."
        ),
    ] = "all",
    rank: Rank = None,
    training_engine: Annotated[
        str | None,
        typer.Option(
            help="Code that generates responses in training: toolkit, or trl (for vLLM add --set use_vllm=true). [default: toolkit]"
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="NAME=VALUE for every recipe; may be repeated. NAME is problems (per batch), samples (per problem), updates (optimizer steps per batch), max_tokens (per response), learning_rate, or a field of TRL's GRPOConfig.",
        ),
    ] = None,
    engine: EngineAddress = "ours",
    track: Track = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the work on this machine.")] = 1,
    measure_only: Annotated[bool, typer.Option(WORKER, hidden=True)] = False,
    think: Think = None,
    template: Template = None,
    dtype: Type = Loaded.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Compare edits, steering, decoding rules, prompts and GRPO policies, with random controls and confidence intervals.

    Each of these is a condition: a way to change the model or its sampling, measured on the same problems as the base model.

    With --engine, a server samples the responses of the conditions that it supports: those that only change weights or prompts. The
    toolkit's own loop samples those of the others, such as steered models.

    Writes board.json, table.parquet and report.html (one file, works offline). After a stop, run the same command again to resume. A
    finished result is reused while its model, settings and code are unchanged. So if you add a condition, only that condition is measured.

    Examples:

    [bold]toolkit board --quick --jobs 2[/bold]

    [bold]toolkit board --only 'base,ThinkEdit*,DLER*' --seeds 2[/bold]

    [bold]toolkit board -m Qwen/Qwen3-1.7B --task gsm8k --train adapter --training-engine trl --set use_vllm=true --dtype bfloat16 -o runs/qwen[/bold]
    """
    import torch

    from toolkit import board as boards
    from toolkit import shipped, store
    from toolkit.board import default
    from toolkit.cli.grpo import parse_part, parse_settings

    listed, file_sizes = boards.read_conditions(conditions) if conditions else (default.CONDITIONS, None)
    chosen = parse_settings(settings)
    rated = {**(dict(file_sizes.training.changes) if file_sizes else {}), **chosen}  # a file may give the learning rate too
    options = {
        "task": task,
        "problems": problems,
        "max_new_tokens": max_new_tokens,
        "seeds": seeds,
        "steps": steps,
        "train": parse_part(train, rank, rated, parts=("all", "adapter", "vector")),
        "engine": training_engine,
        "track": track,
    }
    if quick and file_sizes:
        raise typer.BadParameter(f"{conditions} defines SIZES: leave out --quick.")
    # Sizes: those of the file, else of --quick or of a full board; single options then change them.
    start = file_sizes or (boards.QUICK if quick else boards.FULL)
    tiny = file_sizes.training.tiny if file_sizes else model in shipped.COMPLETE
    sizes = boards.adjust_sizes(start, options, chosen, tiny=tiny)
    specs = boards.select_conditions(listed, only)
    store.writable(out_dir)
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))  # the processes share the cores
    helpers = [] if measure_only else [_helper() for _ in range(jobs - 1)]
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    ground = boards.Ground(lm, sizes, out_dir, say, connect_engine(engine, lm, out_dir))
    try:
        boards.run(ground, specs, wait=not measure_only, progress=not measure_only)
    finally:
        for helper in helpers:
            helper.terminate()
    if measure_only:
        return
    result = boards.write(
        ground, specs, f"Thinking length of {lm.name}: interventions and trained policies", out_dir, command=Command.line
    )
    if as_json:
        print_json({"out": str(out_dir), **{k: result[k] for k in ("conditions", "paired", "provenance")}})
        return
    title = f"{lm.name}: mean, and difference from base with its 95 % interval; * p < .05 after Holm's correction"
    show(boards.text_table(result, SHOWN), title)
    name_files("Open {}; numbers are in {}, {}.", out_dir / "report.html", out_dir / "board.json", out_dir / "table.parquet")
    if quick:
        next_steps(measure_in_full="the same command without --quick and with a new --out")


def _helper() -> subprocess.Popen[bytes]:
    """Start a helper process that runs the same ``toolkit board`` command. It only measures conditions, and ends when this process ends."""
    return processes.start_helper("from toolkit.cli import main; main()", [*sys.argv[1:], WORKER])
