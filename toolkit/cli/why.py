"""The command ``why``: which heads, directions and steps make a changed model think longer or shorter than its base."""

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
    Problems,
    Samples,
    Seed,
    Task,
    Template,
    Think,
    Trust,
    Type,
    app,
    load_model,
    name_files,
    next_steps,
    print_json,
    same_options,
    say,
    show,
)


@app.command(cls=Command)
def why(
    base: Annotated[str, typer.Argument(help="The base model.", metavar="BASE")],
    other: Annotated[str, typer.Argument(help="The changed model (edited or trained), of the same architecture.", metavar="OTHER")],
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Directory to write to.")] = Path("runs/why"),
    task: Task = "arithmetic",
    top: Annotated[int, typer.Option(min=1, help="Number of heads to put back: those with the largest effects.")] = 2,
    draws: Annotated[int, typer.Option(min=1, help="Number of random controls: sets of other heads of the same layers.")] = 3,
    pairs: Annotated[
        int, typer.Option(min=2, help="Largest number of pairs of responses (short, long) on which every head is patched.")
    ] = 60,
    problems: Problems = 100,
    samples: Samples = 4,
    max_new_tokens: Budget = 400,
    allow_overlap: AllowOverlap = False,
    batch_size: BatchSize = 256,
    think: Think = None,
    template: Template = None,
    dtype: Type = Loaded.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Say why a changed model thinks longer or shorter than its base: which heads changed, along which direction, in which steps.

    Head by head, the output in one model is replaced by that in the other, in both directions, while both read the same responses. The heads with the
    largest effects are then put back to base while the changed model answers test problems, beside random heads of the same layers.

    After a stop, run the same command again to resume.

    Example: [bold]toolkit why tiny-reasoner runs/demo/edited -t arithmetic -o runs/why[/bold]
    """
    from toolkit import jobs, report, store, tasks
    from toolkit.jobs.why_page import undo_table

    tasks.check(task, "train", "dev", "test")
    study = jobs.Study(task, problems, samples, max_new_tokens, batch_size, seed, allow_overlap)
    store.writable(out_dir)
    lm, changed = (load_model(name, think, dtype, device, trust_remote_code, template) for name in (base, other))
    settings = jobs.WhySettings(top=top, draws=draws, pairs=pairs, seed=seed)
    found = jobs.why_report(lm, changed, study, settings, out_dir, say=say, command=Command.line)
    if as_json:
        print_json({"out": str(out_dir), **{name: report.json_records(table) for name, table in found.tables.items()}})
        return
    show(found.heads.head(8).round(3), "Effect of each head's change on the preference for long thinking, nats; largest first")
    show(undo_table(found.undo), "Part of the change that some heads make, with 95 % intervals")
    name_files("Open {}.", out_dir / "report.html")
    next_steps(compare_the_models=same_options("compare", f"base={base}", f"changed={other}"))
