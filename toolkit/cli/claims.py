"""The command ``claims``: judge the published claims about thinking length on one model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.common import (
    AsJson,
    BatchSize,
    Budget,
    Command,
    Device,
    Loaded,
    Model,
    Problems,
    Samples,
    Seed,
    Task,
    Temperature,
    Template,
    Think,
    Trust,
    Type,
    app,
    load_model,
    name_files,
    next_steps,
    print_json,
    reject_unread,
    same_options,
    say,
    show,
)

OF_TINY_REASONER = ("tiny", "arithmetic", "lookup", "running_sum")  # tasks in the few characters that the tiny reasoner knows

READ_BY = {
    ("search", "instances", "length"): ("retrieval",),
    ("fraction",): ("edit",),
    ("short_below", "long_above"): ("direction", "steering", "edit"),
    ("draws",): ("steering", "efficiency", "edit", "retrieval"),
    ("train_problems",): ("length", "direction", "steering", "efficiency", "edit"),
}
"""Options -> groups of claims that read them. Without any of these groups, the options are refused."""


@app.command(cls=Command)
def claims(
    out_dir: Annotated[
        Path, typer.Option("--out", "-o", help="Directory to write to. After a stop, run the same command again to resume.")
    ],
    model: Model = "tiny-reasoner",
    task: Task = "arithmetic",
    claims_: Annotated[
        str | None,
        typer.Option(
            "--claims",
            help="Groups of claims, separated by commas: length, entropy, steps, direction, steering, efficiency, edit, retrieval. The first three need only responses. Default: all.",
        ),
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(
            help="Prompts that hide a fact, for retrieval heads: lookup, needle or threading. Default: lookup for the tasks of the tiny reasoner, else needle."
        ),
    ] = None,
    instances: Annotated[int, typer.Option(min=4, help="Number of such prompts.")] = 40,
    length: Annotated[int, typer.Option(min=32, help="Length of such a prompt in tokens, for needle and threading.")] = 256,
    fraction: Annotated[float, typer.Option(help="Share of heads to edit, 0 to 1 (paper: about 0.04).")] = 0.04,
    short_below: Annotated[
        float | None, typer.Option(help="Short class: fewer think tokens than this (paper: 100). Default: the shortest fifth.")
    ] = None,
    long_above: Annotated[
        float | None, typer.Option(help="Long class: more think tokens than this (paper: 1000). Default: the longest fifth.")
    ] = None,
    draws: Annotated[int, typer.Option(min=3, help="Random draws per control; fewer than three give no interval.")] = 3,
    train_problems: Annotated[
        int | None,
        typer.Option(min=1, help="Number of train problems, from which directions and heads are computed. Default: --problems."),
    ] = None,
    problems: Problems = 100,
    samples: Samples = 4,
    temperature: Temperature = 1.0,
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
    """Judge the published claims about thinking length on a model, each with an interval, a random control and a verdict.

    Any chat model will do. If it marks no thinking, whole responses count as thinking (natural chain of thought). Nothing is trained.

    [bold]length[/bold]: the shortest and the longest responses are wrong more often (arXiv 2505.00127, 2506.15647).
    [bold]entropy[/bold]: thinking is less certain than answering (2510.08026). [bold]steps[/bold]: failed steps go with wrong answers
    (2509.19284). [bold]direction[/bold], [bold]steering[/bold], [bold]edit[/bold]: one direction and few heads set the length (ThinkEdit,
    2503.22048). [bold]efficiency[/bold]: Efficiency Steering (2506.15647). [bold]retrieval[/bold]: few heads retrieve (2404.15574).

    The work and the time that it may take are printed first. If a claim cannot be measured, the report gives the reason. Writes report.html, claims.json, and
    claims.md, a text for posting.

    Examples:

    [bold]toolkit claims -m tiny-reasoner -o runs/claims[/bold]

    [bold]toolkit claims -m Qwen/Qwen2.5-1.5B-Instruct -t gsm8k --claims length,steering,edit --dtype bfloat16 -o runs/claims[/bold]
    """
    from toolkit import jobs, store, tasks
    from toolkit.tags import ThinkTags

    names = jobs.check_names(tuple(filter(None, (claims_ or "").split(","))))
    searched = search or ("lookup" if task in OF_TINY_REASONER else "needle")
    for options, groups in READ_BY.items():
        if not {*groups} & {*names}:
            reject_unread(f"without the claims {' or '.join(groups)}", *options)
    if searched == "lookup":
        reject_unread("by lookup, whose prompts have fixed lengths", "length")
    lengths = () if searched == "lookup" else (length,)
    plan = jobs.ClaimsStudy(
        jobs.Study(task, problems, samples, max_new_tokens, batch_size, seed, temperature=temperature),
        names,
        jobs.EditSettings(fraction, short_below=short_below, long_above=long_above, seed=seed, draws=draws),
        jobs.Search(searched, instances, lengths, draws=draws, batch_size=batch_size, seed=seed),
        train_problems,
    )
    tasks.check(task, "train", "dev", "test")
    store.writable(out_dir)
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    unmarked = lm.tags is None
    if unmarked:
        say("the model marks no thinking: whole responses count as thinking")
        lm = replace(lm, tags=ThinkTags(None, None))
    found = jobs.claims_report(lm, plan, out_dir, say=say, command=Command.line)
    if as_json:
        print_json({"out": str(out_dir), **store.read_json(out_dir / "claims.json")})
        return
    columns = ["effect (+ as claimed)", "power to detect it, %", "verdict"]
    show(jobs.posting_table(found)[columns], f"Published claims on {Path(lm.name).name}, with 95 % intervals")
    for claim in found:
        if claim.missing:
            say(f"not measured: {claim.text}: {claim.missing}")
    name_files("Open {}; the text for posting is {}.", out_dir / "report.html", out_dir / "claims.md")
    next_steps(
        narrower_intervals="the same command with more --problems and a new --out",
        edit_the_model=same_options("thinkedit", "-o", "runs/edited", **({"think": "response"} if unmarked else {})),
    )
