"""The command ``entropy``: entropy of thinking."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.common import (
    AsJson,
    BatchSize,
    Budget,
    Command,
    Device,
    Dtype,
    Model,
    Partial,
    Samples,
    TaskOfRollouts,
    Template,
    Think,
    Trust,
    Type,
    app,
    load_model,
    out,
    print_json,
    reject_unread,
    say,
    show,
)


class Steps(StrEnum):
    """Readers that split thinking into steps."""

    fitting = "fitting"
    lines = "lines"
    cues = "cues"


@app.command(cls=Command)
def entropy(
    out_dir: Annotated[
        Path, typer.Option("--out", "-o", help="Directory to write to. After a stop, run the same command again to resume.")
    ],
    model: Model = "tiny-reasoner",
    task: TaskOfRollouts = None,
    split: Annotated[str | None, typer.Option(help="train, dev or test. Default: that of --rollouts, else test.")] = None,
    problems: Annotated[
        int | None, typer.Option("--problems", "-n", min=1, help="Number of problems. Default: as in --rollouts, else 200.")
    ] = None,
    samples: Samples = 8,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sampling temperature, also used for entropies; above 0. Default: that of --rollouts, else 1."),
    ] = None,
    rollouts: Annotated[
        Path | None,
        typer.Option(
            "--rollouts",
            "-r",
            help="Rollouts from `toolkit rollouts --details`, instead of sampling. They set task, split, problems and seed.",
        ),
    ] = None,
    partial: Partial = False,
    steps: Annotated[
        Steps,
        typer.Option(
            help="How thinking is split into steps. lines: one step per line, recomputed exactly (the tiny reasoner's format). cues: by cue "
            "words, for prose. fitting: lines for arithmetic and lookup, else cues."
        ),
    ] = Steps.fitting,
    max_new_tokens: Budget = 1024,
    batch_size: BatchSize = 256,
    think: Think = None,
    template: Template = None,
    dtype: Type = Dtype.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    seed: Annotated[int | None, typer.Option(help="Random seed. Default: that of --rollouts, else 0.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the entropy of thinking, and how it relates to length and to correct answers (PEAR, arXiv 2510.08026).

    Measures token entropy by phase, step and position; its correlation with length, pooled and [bold]within question[/bold] (where the
    difficulty of the problem cancels); the cost of dropping the think tokens of highest entropy, compared with random tokens and with
    cutting off the end; the correlation of failed steps (arXiv 2509.19284), re-checks and entropy with correct answers; and the gain of
    keeping the response of lowest entropy. All with 95 % intervals over problems.

    Writes report.html (with transcripts coloured by entropy), entropy.json, rows.parquet and the rollouts.

    Examples:

    [bold]toolkit entropy -o runs/entropy[/bold]

    [bold]toolkit entropy -m deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B -t gsm8k -n 100 -k 4 --temperature 0.6 --max-new-tokens 4096
    --dtype bfloat16 -o runs/r1-entropy[/bold]
    """
    from toolkit import jobs, store, tasks
    from toolkit.methods import failed_steps

    reader_of = {Steps.fitting: failed_steps.fitting, Steps.lines: failed_steps.tiny, Steps.cues: failed_steps.cued}[steps]
    if rollouts is None:
        reject_unread("without --rollouts", "partial")
    else:
        reject_unread("with --rollouts, which are sampled already", "samples", "max_new_tokens")
    source = jobs.read_rollouts(rollouts, partial=partial) if rollouts else None
    if source is not None and temperature not in (None, source.temperature):
        raise typer.BadParameter(f"--temperature {temperature:g}: {rollouts} was sampled at {source.temperature:g}. Leave it out.")
    origin = {} if source is None else source.origin
    temperature = source.temperature if source else 1.0 if temperature is None else temperature
    settings = jobs.EntropySettings(temperature, split or origin.get("split", "test"), reader_of=reader_of)
    study = jobs.Study(
        source.task(task) if source else task or "arithmetic",
        problems or (source.problems if source else 200),
        samples,
        max_new_tokens,
        batch_size,
        origin.get("seed", 0) if seed is None else seed,
    )
    tasks.check(study.task, settings.split)
    store.writable(out_dir)
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    if source is not None:
        source.check(lm)
    tables = jobs.entropy_report(lm, study, out_dir, settings=settings, rollouts=source.rollouts if source else None, say=say)
    if as_json:
        print_json(store.read_json(out_dir / "entropy.json"))
        return
    show(jobs.entropy_headline(tables), f"{lm.name}, with 95 % intervals over problems")
    out.print(f"Open [bold]{out_dir / 'report.html'}[/bold].")
