"""The command ``check``: check a model, problems and rollouts before any long work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from toolkit.cli.common import (
    AsJson,
    Device,
    Loaded,
    Template,
    Think,
    Trust,
    Type,
    app,
    load_model,
    log,
    next_steps,
    out,
    print_json,
    same_options,
)


@app.command()
def check(
    model: Annotated[
        str, typer.Argument(help="tiny-reasoner, smol-reasoner, a directory, a Hugging Face id, or a .gguf file.")
    ] = "tiny-reasoner",
    problems: Annotated[
        str | None, typer.Option("--problems", help="A task, or a JSONL file of problems, to be read and rendered.")
    ] = None,
    rollouts: Annotated[
        Path | None, typer.Option("--rollouts", "-r", help="Directory of rollouts, to be compared with the model.")
    ] = None,
    think: Think = None,
    dtype: Type = Loaded.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    template: Template = None,
    as_json: AsJson = False,
) -> None:
    """Load a model and say what the toolkit can do with it. Takes seconds once the model is loaded.

    Prints the model's family, its layers with attention heads, its think tags, an example prompt, the estimated memory that commands need,
    and the decoding speed. Lists the features of the toolkit that do not work with this model, with the reason. Also checks that the
    model's activations, attention and KV cache behave as the toolkit assumes, and prints the largest numerical deviation of each check.

    With --problems, also loads up to five test problems of a task or a file. Prints the length of their longest prompt and the text of the
    first problem, or the reason why the problems cannot be used. Every line of a file is checked, and the reason names the first faulty
    line.

    With --rollouts, also prints the number of rollouts and whether they were sampled from this model.

    Exit status: 0 ("go") if there is no fault, else 1. A fault is a model that cannot be used, problems that cannot be loaded or rendered
    as prompts, or rollouts that cannot be read or were sampled from other weights. Features that do not work are limits, not faults.

    If you report a problem with the toolkit, include the output.

    Example: [bold]toolkit check Qwen/Qwen3-4B --dtype bfloat16 --problems gsm8k[/bold]
    """
    from toolkit import jobs
    from toolkit.lm import UnsupportedModelError

    try:
        lm = load_model(model, think, dtype, device, trust_remote_code, template)
        findings = jobs.check(lm, problems=problems, rollouts=rollouts)
    except UnsupportedModelError as error:
        findings = jobs.Findings(faults=[str(error)])
    if as_json:
        print_json({"go": findings.go, "facts": findings.facts, "limits": findings.limits, "faults": findings.faults})
    else:
        for section, facts in findings.facts.items():
            table = Table(title=section, title_justify="left", show_header=False)
            table.add_column(overflow="fold")
            table.add_column(overflow="fold")
            for name, value in facts.items():
                # As text: in a string, rich would take a tag such as [THINK] for its own markup and leave it out.
                table.add_row(Text(name), Text(repr(value) if "\n" in value else value))
            out.print(table)
        for limit in findings.limits:
            out.print(f"limit: {limit}", markup=False, highlight=False)
        for fault in findings.faults:
            out.print(f"fault: {fault}", markup=False, highlight=False)
        out.print("go" if findings.go else "no go", style="bold green" if findings.go else "bold red")
        if findings.go:
            sampled = ("--task", problems) if problems else ()
            next_steps(sample_responses=same_options("rollouts", "-n", 20, "-k", 4, "-o", "runs/rollouts", *sampled))
    if not findings.go:
        log.print(f"{len(findings.faults)} reason(s) not to go on.", highlight=False)
        raise typer.Exit(1)
