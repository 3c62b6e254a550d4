"""Every intervention against every reward: board."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from toolkit import processes
from toolkit.cli.common import (
    AsJson,
    Device,
    Dtype,
    Model,
    Template,
    Think,
    Trust,
    Type,
    app,
    load_model,
    out,
    print_json,
    say,
    show,
)

SHOWN = ("accuracy", "think_tokens", "aes", "shortest_20", "accuracy_lookup", "never_closed")
WORKER = "--measure-only"


@app.command()
def board(
    model: Model = "tiny-reasoner",
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Where results are kept and the board is written.")] = Path(
        "runs/board"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Every condition, small: under 12 minutes on two cores, to see it work.")
    ] = False,
    conditions: Annotated[
        Path | None,
        typer.Option(
            help="A Python file that defines CONDITIONS, and SIZES if it wants; copy toolkit/board/default.py. The file is executed: give only one you trust."
        ),
    ] = None,
    only: Annotated[str | None, typer.Option(help="Only conditions of such names, e.g. 'GRPO*,steered*'; base always.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds of whatever is random or trained.")] = None,
    task: Annotated[str | None, typer.Option(help="Judge and train on this task instead, e.g. gsm8k.")] = None,
    problems: Annotated[int | None, typer.Option("--problems", "-n", min=2, help="Problems of the main task.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Budget of a response in tokens.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of a policy.")] = None,
    lora: Annotated[int | None, typer.Option(min=1, help="Train a LoRA adapter of this rank instead of every weight.")] = None,
    engine: Annotated[
        str, typer.Option(help="Who generates while training: toolkit, or trl (for vLLM: --set use_vllm=true).")
    ] = "toolkit",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="NAME=VALUE for every recipe: problems, samples, max_tokens, learning_rate, or a field of TRL's GRPOConfig.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the work on this machine.")] = 1,
    measure_only: Annotated[bool, typer.Option(WORKER, hidden=True)] = False,
    think: Think = None,
    template: Template = None,
    dtype: Type = Dtype.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Judge edits, steering, decoding tricks, prompts and GRPO policies side by side, with random controls and intervals.

    Every result is kept under a key of all it depends on, the code included: killed and given again the board goes on, and a new condition costs only itself.
    Writes board.json, table.parquet and report.html (one file, works offline).

    Examples:

    [bold]toolkit board --quick --jobs 2[/bold]

    [bold]toolkit board --only 'base,ThinkEdit*,DLER*' --seeds 2[/bold]

    [bold]toolkit board -m Qwen/Qwen3-1.7B --task gsm8k --lora 16 --engine trl --set use_vllm=true --dtype bfloat16 -o runs/qwen[/bold]
    """
    import torch

    from toolkit import board as boards
    from toolkit import store
    from toolkit.board import default
    from toolkit.cli.grpo import settings_of

    given = {
        "task": task,
        "problems": problems,
        "max_new_tokens": max_new_tokens,
        "seeds": seeds,
        "steps": steps,
        "lora": lora,
        "engine": engine,
    }
    listed, own = boards.read(conditions) if conditions else (default.CONDITIONS, None)
    if quick and own:
        raise typer.BadParameter(f"{conditions} has SIZES of its own: leave out --quick.")
    start = own or (boards.QUICK if quick else boards.FULL)
    tiny = own.training.tiny if own else model == "tiny-reasoner"
    sizes = boards.sized(start, given, settings_of(settings), tiny=tiny)
    specs = boards.checked(listed, only)
    store.writable(out_dir)
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    helpers = [] if measure_only else [_helper() for _ in range(jobs - 1)]
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    ground = boards.Ground(lm, sizes, out_dir, say)
    try:
        boards.run(ground, specs, wait=not measure_only, progress=not measure_only)
    finally:
        for helper in helpers:
            helper.terminate()
    if measure_only:
        return
    found = boards.write(ground, specs, f"Thinking length of {lm.name}: interventions and trained policies", out_dir)
    if as_json:
        print_json({k: found[k] for k in ("conditions", "paired", "provenance")})
        return
    show(boards.shown(found, SHOWN), f"{lm.name}: mean, and difference to base [95 %]; * p < .05 after Holm")
    out.print(
        f"The page: [bold]{out_dir / 'report.html'}[/bold]; the numbers: {out_dir / 'board.json'}, {out_dir / 'table.parquet'}."
    )


def _helper() -> subprocess.Popen[bytes]:
    """This command again, as a process that only measures, and ends with this one."""
    return processes.start_helper("from toolkit.cli import main; main()", [*sys.argv[1:], WORKER])
