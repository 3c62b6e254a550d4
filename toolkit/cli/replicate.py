"""The command ``replicate``: run the plan of a published replication, and put the paper's numbers beside the measured ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.cli.common import (
    AsJson,
    Command,
    Device,
    EngineAddress,
    Loaded,
    Trust,
    app,
    command_line,
    connect_engine,
    load_model,
    name_files,
    next_steps,
    out,
    print_json,
    reject_unread,
    say,
    show,
)

if TYPE_CHECKING:
    from toolkit.jobs import Replication


@app.command(cls=Command)
def replicate(
    plan_file: Annotated[Path, typer.Argument(help="Plan, such as plans/qwen3-1.7b.toml.", metavar="PLAN.toml")],
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Directory to write to. After a stop, run the same command again to resume."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check every setting and print steps, hours and memory, without a model and without a download."
        ),
    ] = False,
    engine: EngineAddress = "ours",
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Run a published replication from its plan: rollouts, direction and heads, edit, comparison with random controls, report.

    The report puts the paper's numbers beside the measured ones, with 95 % intervals. A number of the paper that is not known is marked NOT
    FOUND. --dry-run computes hours from speeds that the plan assumes. [bold]plans/README.md[/bold] describes the fields of a plan.

    Writes report.html, report.md, replication.json, the edited model in edited, and the rollouts.

    Examples:

    [bold]toolkit replicate plans/deepseek-r1-distill-qwen-1.5b.toml --dry-run[/bold]

    [bold]toolkit replicate plans/tiny-reasoner.toml -o runs/tiny-replication[/bold]
    """
    from toolkit import jobs, store

    plan = jobs.read_plan(plan_file)
    if dry_run:
        reject_unread("with --dry-run, which runs nothing", "engine", "device", "trust_remote_code")
        _dry_run(plan, as_json)
        if not as_json:
            next_steps(run_it="the same command without --dry-run, with --out DIRECTORY")
        return
    if out_dir is None:
        raise typer.BadParameter("--out is missing: give the directory to write to, or --dry-run.")
    store.writable(out_dir)
    template = [f"{name}={json.dumps(value)}" for name, value in plan.model.template.items()]
    lm = load_model(plan.model.id, plan.model.think or None, Loaded(plan.model.dtype), device, trust_remote_code, template)
    jobs.check_thinking(lm)
    sampler = connect_engine(engine, lm, out_dir, plan.run.batch_size)
    table = jobs.replicate(lm, plan, out_dir, engine=sampler, say=say, command=Command.line)
    if as_json:
        print_json({"out": str(out_dir), **store.read_json(out_dir / "replication.json")})
        return
    show(table, f"{plan.title}: the paper's numbers and the measured ones, in percent and points")
    for sentence in jobs.replication_verdict(plan, table):
        out.print(sentence, markup=False, highlight=False, soft_wrap=True)
    name_files("Open {}; the edited model is in {}.", out_dir / "report.html", out_dir / "edited")
    next_steps(see_what_would_be_uploaded=command_line("push", out_dir / "edited", "USER/NAME", "--dry-run"))


def _dry_run(plan: Replication, as_json: bool) -> None:
    """Print the steps of a plan, the paper's numbers, and the parts that were never run with the real model."""
    from toolkit import jobs, report

    steps = jobs.replication_steps(plan)
    if as_json:
        print_json({"plan": plan, "steps": report.json_records(steps.reset_index()), "hours": steps["hours"].sum()})
        return
    show(steps.round(3), f"{plan.title}: {steps['hours'].sum():.1f} hours expected on {plan.run.device}")
    out.print(
        f"{plan.model.id} in {plan.model.dtype}: {plan.edited_heads} of {plan.model.layers * plan.model.heads} heads edited, "
        f"{plan.edit.draws} random controls of each kind, at most {steps['memory_gb'].max():.1f} GB.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    show(jobs.published_table(plan), "The paper's numbers, in percent")
    for line in [*(f"Deviation: {text}" for text in plan.deviations), *([f"Untested: {plan.untested}"] if plan.untested else [])]:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
