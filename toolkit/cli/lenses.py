"""Which heads do what: retrieval-heads, heads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.common import (
    AllowOverlap,
    AsJson,
    BatchSize,
    Budget,
    Command,
    Device,
    Dtype,
    Model,
    Partial,
    Problems,
    Samples,
    Seed,
    TaskOfRollouts,
    Template,
    Think,
    Trust,
    Type,
    app,
    load_model,
    numbers,
    out,
    print_json,
    say,
    show,
    unread,
)


@app.command(cls=Command)
def retrieval_heads(
    model: Model = "tiny-reasoner",
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Where to write.")] = Path("runs/retrieval-heads"),
    task: Annotated[
        str,
        typer.Option("--task", "-t", help="lookup (the tiny reasoner's), needle (facts in filler) or threading (chains of keys)."),
    ] = "lookup",
    instances: Annotated[
        int, typer.Option("--instances", "-n", min=1, help="Haystacks to find heads on, and as many others to mask them on.")
    ] = 100,
    lengths: Annotated[
        str | None, typer.Option(help="Prompt lengths in tokens, e.g. 256,1024. Default: five up to the model's context.")
    ] = None,
    counts: Annotated[str, typer.Option(help="How many heads to mask, e.g. 1,2,4.")] = "1,2,3,4",
    ops: Annotated[
        str, typer.Option(help="More ways to mask at the largest count: uniform, zero, mean; or empty.")
    ] = "uniform,zero,mean",
    draws: Annotated[int, typer.Option(min=1, help="Random heads of the same layers to mask beside each, as controls.")] = 3,
    max_new_tokens: Budget = 120,
    batch_size: BatchSize = 256,
    think: Think = None,
    template: Template = None,
    dtype: Type = Dtype.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Find the heads that copy from the prompt (arXiv 2404.15574), and mask them to see whether they matter.

    Two rankings: the published copy score, and what a head writes towards the emitted token (ours), which also finds heads that
    read an answer from the tokens beside it. Masking: uniform attention in decode only, as published, then zero and mean ablation
    and the prompt too. With think tags, also: does masking hurt thinking more than answering directly?

    Examples:

    [bold]toolkit retrieval-heads -m tiny-reasoner -o runs/retrieval-heads[/bold]

    [bold]toolkit retrieval-heads -m SmolLM2-135M-Instruct.gguf --think response -t needle --lengths 256,512,1024 --counts 2,5,10,20[/bold]
    """
    from toolkit import jobs, report

    if task == "lookup":
        unread("by lookup, whose prompts have lengths of their own", "lengths")
    search = jobs.Search(
        task,
        instances,
        numbers(lengths, "--lengths", int),
        numbers(counts, "--counts", int),
        tuple(filter(None, ops.split(","))),
        draws,
        max_new_tokens,
        batch_size,
        seed,
    )
    tables = jobs.retrieval_report(load_model(model, think, dtype, device, trust_remote_code, template), search, out_dir, say=say)
    if as_json:
        print_json({"out": str(out_dir), **{name: report.json_records(table) for name, table in tables.items()}})
        return
    show(tables["heads"].query("rank <= 5").set_index("ranking"), "Retrieval heads")
    columns = ["heads", "op", "during", "accuracy", "random", "more_than_random", "more_than_random_low", "more_than_random_high"]
    show(tables["masking"].set_index("ranking")[columns], "Accuracy with heads masked, beside random heads of the same layers")
    if "thinking" in tables:
        show(tables["thinking"].set_index("task"), "Masking while thinking and while answering directly")
    out.print(f"Open [bold]{out_dir / 'report.html'}[/bold].")


@app.command(cls=Command)
def heads(
    model: Model = "tiny-reasoner",
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Where to write.")] = Path("runs/heads"),
    rollouts: Annotated[
        Path | None, typer.Option("--rollouts", "-r", help="Rollouts of this model, from `toolkit rollouts`. Default: sampled now.")
    ] = None,
    partial: Partial = False,
    task: TaskOfRollouts = None,
    allow_overlap: AllowOverlap = False,
    search: Annotated[str, typer.Option(help="Where retrieval is measured: lookup, needle or threading.")] = "lookup",
    lengths: Annotated[str | None, typer.Option(help="Prompt lengths of needle and threading, in tokens.")] = None,
    problems: Problems = 100,
    samples: Samples = 4,
    max_new_tokens: Budget = 400,
    batch_size: BatchSize = 256,
    think: Think = None,
    template: Template = None,
    dtype: Type = Dtype.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """One table of every head: short thinking, retrieval, entropy when masked, previous token, induction, duplicate token.

    Then: are short-thinking heads retrieval heads? Overlaps of the top heads with permutation p-values, and rank correlations. The
    last three scores are TransformerLens's detectors ([bold]pip install 'reasoning-length-toolkit[lens]'[/bold]).

    Example: [bold]toolkit heads -m tiny-reasoner -o runs/heads[/bold]
    """
    from toolkit import jobs, report, tasks

    if search == "lookup":
        unread("by --search lookup, whose prompts have lengths of their own", "lengths")
    if rollouts is None:
        unread("without --rollouts", "partial")
    looked = jobs.Search(search, problems, numbers(lengths, "--lengths", int), batch_size=batch_size, seed=seed)
    given = jobs.given(rollouts, partial=partial) if rollouts else None
    task = given.task(task) if given else task or "arithmetic"
    tasks.check(task, *(() if given else ("train",)), "test")
    study = jobs.Study(task, problems, samples, max_new_tokens, batch_size, seed, allow_overlap)
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    found, about = None, None
    if given is not None:
        given.check(lm)
        found, about = given.rollouts, given.origin
    atlas = jobs.atlas(lm, study, looked, out_dir, found=found, origin=about, say=say)
    if as_json:
        print_json({"out": str(out_dir), **{name: report.json_records(table) for name, table in atlas.tables.items()}})
        return
    show(atlas.heads.set_index("head").head(20).round(3), "Heads, by short-thinking score")
    show(atlas.overlaps.set_index("pair").round(3), "Do the lenses see the same heads?")
    out.print(f"Open [bold]{out_dir / 'report.html'}[/bold].")
