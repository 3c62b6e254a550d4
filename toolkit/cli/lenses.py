"""The commands ``retrieval-heads`` and ``heads``: score every attention head by one or several measures (called *lenses* in the code)."""

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
    Loaded,
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
    name_files,
    next_steps,
    parse_numbers,
    print_json,
    reject_unread,
    same_options,
    say,
    show,
)


@app.command(cls=Command)
def retrieval_heads(
    model: Model = "tiny-reasoner",
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Directory to write to.")] = Path("runs/retrieval-heads"),
    task: Annotated[
        str,
        typer.Option(
            "--task", "-t", help="lookup (for the tiny reasoner), needle (facts in filler text) or threading (chains of keys)."
        ),
    ] = "lookup",
    instances: Annotated[
        int,
        typer.Option(
            "--instances",
            "-n",
            min=1,
            help="Number of haystacks (prompts that hide a fact) to find heads on, and of other haystacks to mask the heads on.",
        ),
    ] = 100,
    lengths: Annotated[
        str | None, typer.Option(help="Prompt lengths in tokens, e.g. 256,1024. Default: five lengths up to the model's context.")
    ] = None,
    counts: Annotated[str, typer.Option(help="Numbers of heads to mask, e.g. 1,2,4.")] = "1,2,3,4",
    ops: Annotated[
        str,
        typer.Option(
            help="Masking operations to try at the largest count: uniform (uniform attention), zero (no output), mean (mean output). May be empty; uniform is always measured while decoding."
        ),
    ] = "uniform,zero,mean",
    draws: Annotated[
        int, typer.Option(min=1, help="Number of random controls per mask; each masks random heads of the same layers.")
    ] = 3,
    max_new_tokens: Budget = 120,
    batch_size: BatchSize = 256,
    think: Think = None,
    template: Template = None,
    dtype: Type = Loaded.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Find retrieval heads, which copy from the prompt (arXiv 2404.15574), and mask them to measure their effect.

    Heads are ranked in two ways: by the published copy score (the share of the answer's distinct tokens that the head copies from the
    prompt), and by how much they raise the logit of the generated token (ours). Earlier layers may copy the answer to a neighbouring token
    of the prompt. Only the second ranking finds heads that read the answer from this token.

    Heads are masked as published: while decoding, they attend uniformly to all earlier tokens. For comparison, they are also masked by zero
    and by mean ablation, and at the prompt's tokens too. For the task lookup and a model with think tags, the command also measures whether
    masking costs more accuracy when the model thinks than when it answers directly.

    Examples:

    [bold]toolkit retrieval-heads -m tiny-reasoner -o runs/retrieval-heads[/bold]

    [bold]toolkit retrieval-heads -m SmolLM2-135M-Instruct.gguf --think response -t needle --lengths 256,512,1024 --counts 2,5,10,20[/bold]
    """
    from toolkit import jobs, report, store

    if task == "lookup":
        reject_unread("by lookup, whose prompts have fixed lengths", "lengths")
    search = jobs.Search(
        task,
        instances,
        parse_numbers(lengths, "--lengths", int),
        parse_numbers(counts, "--counts", int),
        tuple(filter(None, ops.split(","))),
        draws,
        max_new_tokens,
        batch_size,
        seed,
    )
    store.writable(out_dir)
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    tables = jobs.retrieval_report(lm, search, out_dir, say=say, command=Command.line)
    if as_json:
        print_json({"out": str(out_dir), **{name: report.json_records(table) for name, table in tables.items()}})
        return
    show(tables["heads"].query("rank <= 5").set_index("ranking"), "Retrieval heads")
    more = [f"more_than_random{end}" for end in ("", "_low", "_high")]
    columns = ["heads", "op", "during", "accuracy", "random", "draws", *more]
    show(
        tables["masking"].set_index("ranking")[columns],
        "Accuracy with top heads masked, with random heads of the same layers masked, and random minus top",
    )
    if "thinking" in tables:
        show(
            tables["thinking"].set_index("task"),
            "Accuracy, and accuracy lost to masking, when thinking and when answering directly",
        )
    name_files("Open {}.", out_dir / "report.html")
    next_steps(compare_with_other_ways_to_score_heads=same_options("heads", "--search", task, task=None))


@app.command(cls=Command)
def heads(
    model: Model = "tiny-reasoner",
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Directory to write to.")] = Path("runs/heads"),
    rollouts: Annotated[
        Path | None, typer.Option("--rollouts", "-r", help="Rollouts of this model, from `toolkit rollouts`. Default: sampled now.")
    ] = None,
    partial: Partial = False,
    task: TaskOfRollouts = None,
    allow_overlap: AllowOverlap = False,
    search: Annotated[
        str,
        typer.Option(
            help="Task on which retrieval is measured: lookup, needle (facts in filler text) or threading (chains of keys)."
        ),
    ] = "lookup",
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Prompt lengths of needle and threading in tokens, e.g. 256,1024. Default: five lengths up to the model's context."
        ),
    ] = None,
    problems: Problems = 100,
    samples: Samples = 4,
    max_new_tokens: Budget = 400,
    batch_size: BatchSize = 256,
    think: Think = None,
    template: Template = None,
    dtype: Type = Loaded.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Score every head by several measures, compare the measures, and measure the effects of ThinkEdit's edit and of steering.

    ThinkEdit (arXiv 2503.22048) edits the heads whose outputs point most towards short thinking.

    The measures: how far the head's output points towards short thinking; how much the head retrieves from the prompt; how much think
    entropy rises when the head is ablated; and the share of attention on three patterns: previous token, duplicate token, induction. The
    patterns need TransformerLens ([bold]pip install 'reasoning-length-toolkit\\[lens]'[/bold]).

    Any two measures are compared by the number of heads that are at the top of both, with permutation p-values, and by their rank
    correlation.

    Example: [bold]toolkit heads -m tiny-reasoner -o runs/heads[/bold]
    """
    from toolkit import jobs, report, store, tasks

    if search == "lookup":
        reject_unread("by --search lookup, whose prompts have fixed lengths", "lengths")
    if rollouts is None:
        reject_unread("without --rollouts", "partial")
    settings = jobs.Search(search, problems, parse_numbers(lengths, "--lengths", int), batch_size=batch_size, seed=seed)
    source = jobs.read_rollouts(rollouts, partial=partial) if rollouts else None
    task = source.task(task) if source else task or "arithmetic"
    tasks.check(task, *(() if source else ("train",)), "test")
    study = jobs.Study(task, problems, samples, max_new_tokens, batch_size, seed, allow_overlap)
    store.writable(out_dir)
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    jobs.check_thinking(lm)
    sampled, about = None, None
    if source is not None:
        source.check(lm)
        sampled, about = source.rollouts, source.origin
    atlas = jobs.atlas(lm, study, settings, out_dir, rollouts=sampled, origin=about, say=say, command=Command.line)
    if as_json:
        print_json({"out": str(out_dir), **{name: report.json_records(table) for name, table in atlas.tables.items()}})
        return
    show(atlas.heads.set_index("head").head(20).round(3), "Scores of the 20 heads that write most towards short thinking")
    show(atlas.overlaps.set_index("pair").round(3), "Do the scores find the same heads? Number of shared top heads, with p-values")
    name_files("Open {}.", out_dir / "report.html")
    found = {"task": task} if source else {}
    next_steps(edit_the_heads_that_shorten_thinking=same_options("thinkedit", "-o", "runs/edited", **found))
