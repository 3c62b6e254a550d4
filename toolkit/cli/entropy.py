"""Entropy of thinking: entropy."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.common import (
    AsJson,
    BatchSize,
    Budget,
    Device,
    Dtype,
    Model,
    Problems,
    Samples,
    Seed,
    Split,
    Task,
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


class Steps(StrEnum):
    """How thinking is read into steps."""

    fitting = "fitting"
    lines = "lines"
    cues = "cues"


@app.command()
def entropy(
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Where to write; given again after a kill, the run goes on.")],
    model: Model = "tiny-reasoner",
    task: Task = "arithmetic",
    split: Split = "test",
    problems: Problems = 200,
    samples: Samples = 8,
    temperature: Annotated[
        float | None, typer.Option(help="Of sampling, and so of every entropy; above 0. Default: 1, or that of --rollouts.")
    ] = None,
    rollouts: Annotated[
        Path | None,
        typer.Option(
            "--rollouts",
            "-r",
            help="From `toolkit rollouts --details`, instead of sampling; give the same task, split, problems and seed.",
        ),
    ] = None,
    steps: Annotated[
        Steps,
        typer.Option(
            help="lines: recomputed, exact, the tiny reasoner's own format. cues: cue words, for prose. fitting: lines for arithmetic "
            "and lookup, else cues."
        ),
    ] = Steps.fitting,
    max_new_tokens: Budget = 1024,
    batch_size: BatchSize = 256,
    think: Think = None,
    template: Template = None,
    dtype: Type = Dtype.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """How uncertain is thinking, and what does that say of its length and of right answers (PEAR, arXiv 2510.08026)?

    Token entropies by phase, step and position. Their correlation with length, pooled and [bold]within question[/bold], where how hard a
    problem is drops out. What dropping the highest-entropy think tokens costs, beside random ones and a cut-off end. Failed steps
    (arXiv 2509.19284), re-checks and entropy against right answers, and what keeping the surest response gains. Everything with 95 %
    intervals over problems.

    Writes report.html (with transcripts coloured by entropy), entropy.json, rows.parquet and the rollouts.

    Examples:

    [bold]toolkit entropy -o runs/entropy[/bold]

    [bold]toolkit entropy -m deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B -t gsm8k -n 100 -k 4 --temperature 0.6 --max-new-tokens 4096
    --dtype bfloat16 -o runs/r1-entropy[/bold]
    """
    from toolkit import jobs, store
    from toolkit.methods import failed_steps

    reader_of = {Steps.fitting: failed_steps.fitting, Steps.lines: failed_steps.tiny, Steps.cues: failed_steps.cued}[steps]
    settings = jobs.EntropySettings(1.0 if temperature is None else temperature, split, reader_of=reader_of)
    study = jobs.Study(task, problems, samples, max_new_tokens, batch_size, seed)
    store.writable(out_dir)
    lm, found = load_model(model, think, dtype, device, trust_remote_code, template), None
    if rollouts is not None:
        found, sampled_at = jobs.given_rollouts(rollouts, lm)
        if temperature not in (None, sampled_at):
            raise typer.BadParameter(f"--temperature {temperature:g}: {rollouts} was sampled at {sampled_at:g}. Leave it out.")
        settings = replace(settings, temperature=sampled_at)
    tables = jobs.entropy_report(lm, study, out_dir, settings=settings, found=found, say=say)
    if as_json:
        print_json(store.read_json(out_dir / "entropy.json"))
        return
    show(jobs.entropy_board(tables), f"{lm.name}, with 95 % intervals over problems")
    out.print(f"Open [bold]{out_dir / 'report.html'}[/bold].")
