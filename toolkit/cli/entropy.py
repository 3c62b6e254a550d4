"""The command ``entropy``: measure the entropy of think tokens."""

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
    EngineAddress,
    Loaded,
    Model,
    Partial,
    Samples,
    TaskOfRollouts,
    Template,
    Think,
    Trust,
    Type,
    app,
    connect_engine,
    load_model,
    name_files,
    next_steps,
    print_json,
    reject_unread,
    same_options,
    say,
    show,
)


class Steps(StrEnum):
    """Ways to split thinking into steps and to find failed steps; the help of ``--steps`` explains them."""

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
    split: Annotated[
        str | None,
        typer.Option(help="Split of the problems: train, dev or test. Default: the split of --rollouts if given, else test."),
    ] = None,
    problems: Annotated[
        int | None,
        typer.Option("--problems", "-n", min=1, help="Number of problems. Default: the number in --rollouts if given, else 200."),
    ] = None,
    samples: Samples = 8,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Sampling temperature, also of the softmax whose entropy is taken; above 0. Default: 1. With --rollouts it is fixed to their temperature."
        ),
    ] = None,
    rollouts: Annotated[
        Path | None,
        typer.Option(
            "--rollouts",
            "-r",
            help="Measure these rollouts, from `toolkit rollouts --details`, instead of sampling. Task, split, number of problems and seed default to theirs; temperature, samples and token budget cannot be changed.",
        ),
    ] = None,
    partial: Partial = False,
    steps: Annotated[
        Steps,
        typer.Option(
            help="How thinking is split into steps, and how failed steps are found. lines: one step per line of arithmetic or lookup; a step failed "
            "if its result, computed again, is wrong. cues: by cue words such as 'Wait', for prose; a guess. fitting: computed again for arithmetic, "
            "lookup and wordproblems, cues for all other tasks."
        ),
    ] = Steps.fitting,
    max_new_tokens: Budget = 1024,
    engine: EngineAddress = "ours",
    batch_size: BatchSize = 256,
    think: Think = None,
    template: Template = None,
    dtype: Type = Loaded.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    seed: Annotated[int | None, typer.Option(help="Random seed. Default: the seed of --rollouts if given, else 0.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the entropy of the next-token distribution in thinking, and how it relates to length and right answers (arXiv 2510.08026).

    Where is entropy high? Token entropy by phase (thinking, answer), by step and by position in the think span.

    Does entropy rise with length? Correlation of entropy and length, pooled and [bold]within problem[/bold] (each problem's mean is
    subtracted, so that its difficulty cancels).

    Does the answer need the tokens of high entropy? Accuracy lost if these think tokens are dropped and the model answers again, compared
    with dropping random tokens and with cutting off the end.

    Which measures predict right answers? Correlation of right answers with failed steps of thinking (wrong or abandoned ones, arXiv
    2509.19284), re-checks (steps that check an earlier step) and entropy. Also the accuracy gained by selecting, for each problem, the
    response with the lowest entropy or with the lowest share of failed steps.

    Intervals are 95 %, from resampling problems. Writes report.html (with transcripts coloured by entropy), entropy.json, rows.parquet and
    the rollouts.

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
        reject_unread("with --rollouts, which are sampled already", "samples", "max_new_tokens", "engine")
    source = jobs.read_rollouts(rollouts, partial=partial) if rollouts else None
    if source is not None and temperature not in (None, source.temperature):
        raise typer.BadParameter(
            f"--temperature {temperature:g}: the rollouts in {rollouts} were sampled at {source.temperature:g}. Leave --temperature out."
        )
    origin = {} if source is None else source.origin
    temperature = source.temperature if source else 1.0 if temperature is None else temperature
    settings = jobs.EntropySettings(temperature, split or origin.get("split", "test"), reader_of=reader_of)
    study = jobs.Study(
        source.task(task) if source else task or "arithmetic",
        problems or (source.problems if source else 200),
        samples,
        source.header["sampling"]["max_new_tokens"] if source else max_new_tokens,  # prompts of needle depend on it
        batch_size,
        origin.get("seed", 0) if seed is None else seed,
    )
    tasks.check(study.task, settings.split)
    store.writable(out_dir)
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    jobs.check_thinking(lm)
    if source is not None:
        source.check(lm)
    sampled, sampler = source.rollouts if source else None, connect_engine(engine, lm, out_dir, batch_size)
    tables = jobs.entropy_report(
        lm, study, out_dir, settings=settings, rollouts=sampled, engine=sampler, say=say, command=Command.line
    )
    if as_json:
        print_json({"out": str(out_dir), **store.read_json(out_dir / "entropy.json")})
        return
    show(jobs.entropy_headline(tables), f"{lm.name}, with 95 % intervals over problems")
    name_files("Open {}.", out_dir / "report.html")
    found = {"task": study.task} if source else {}
    next_steps(which_heads_raise_or_lower_entropy=same_options("heads", **found))
