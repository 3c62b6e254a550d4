"""The command ``giraffe``: change a model's rotary frequencies, and measure it inside and beyond its trained length."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.common import (
    AsJson,
    Command,
    Device,
    Dtype,
    Model,
    Seed,
    Template,
    Think,
    Trust,
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


class Form(StrEnum):
    """Forms of changed frequencies; the help of the command explains them."""

    linear = "linear"
    parts = "parts"
    power = "power"
    truncated = "truncated"


class LengthTask(StrEnum):
    """Tasks whose prompts can have any length."""

    lines = "lines"
    lookup = "lookup"
    needle = "needle"


@app.command(cls=Command)
def giraffe(
    out_dir: Annotated[
        Path, typer.Option("--out", "-o", help="Directory to write to. After a stop, run the same command again to resume.")
    ],
    lengths: Annotated[
        str,
        typer.Option(
            help="Lengths of the prompts that are measured, such as 4096,12288: tokens for lines and needle, characters before the question for lookup."
        ),
    ],
    model: Model = "tiny-reasoner",
    form: Annotated[Form, typer.Option(help="Which frequencies change, and how; see above.")] = Form.parts,
    scale: Annotated[float, typer.Option(help="Factor by which the context grows; read by linear and parts.")] = 4.0,
    exponent: Annotated[float, typer.Option(help="Exponent k of power; 0 changes nothing.")] = 0.5,
    trained: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Length of the model's training texts in tokens; read by parts and truncated. Default: the config's context.",
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Context of the saved model in tokens. Default: the old one times --scale.")
    ] = None,
    task: Annotated[
        LengthTask,
        typer.Option(
            "--task",
            "-t",
            help="lines: records of names and numbers, for language models. needle: one fact in a long text, easier. lookup: for the tiny reasoner.",
        ),
    ] = LengthTask.lines,
    instances: Annotated[int, typer.Option("--instances", "-n", min=1, help="Number of problems per length.")] = 20,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text whose perplexity is measured too: a file, or python for Python's language reference, which comes with Python. Default: none."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Token budget of a response.")] = 60,
    think: Think = None,
    template: Template = None,
    dtype: Annotated[Dtype, typer.Option(help="Number type of the weights.")] = Dtype.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Change a model's rotary frequencies to extend its context (Giraffe, arXiv 2308.10882), save it, and measure it by prompt length.

    No weight changes and nothing is trained. The saved directory is an ordinary one, with other rope_parameters in its config. transformers
    loads it; compare log-probabilities before you use another tool.

    Forms: [bold]linear[/bold] divides all frequencies by --scale, which is the same as dividing positions. [bold]parts[/bold] divides
    only low frequencies (NTK by parts). [bold]power[/bold] multiplies frequency i of n by (1 - i/n)^k. [bold]truncated[/bold] lowers those that make less than one turn within
    the trained length, to one value or to 0.

    Measured for the trained and for the changed model, at each length: the share of right greedy responses (recall), and the negative
    log-probability per token of a right response (nll, in nats; its exponential is the perplexity). Intervals are 95 %, from resampling
    problems. Writes model/, giraffe.json and report.html.

    Examples:

    [bold]toolkit giraffe -m tiny-reasoner -t lookup --trained 640 --lengths 640,1280,2560 -o runs/giraffe[/bold]

    [bold]toolkit giraffe -m HuggingFaceTB/SmolLM2-1.7B-Instruct --think response --form linear --scale 2 --lengths 4096,12288 --text python
    --dtype bfloat16 -o runs/giraffe-smollm2[/bold]
    """
    from toolkit import jobs, report, store

    if form not in (Form.linear, Form.parts) and context is not None:
        reject_unread(f"by --form {form.value} with --context", "scale")
    if form is not Form.power:
        reject_unread(f"by --form {form.value}", "exponent")
    if form not in (Form.parts, Form.truncated):
        reject_unread(f"by --form {form.value}", "trained")
    study = jobs.LengthStudy(parse_numbers(lengths, "--lengths", int), task.value, instances, max_new_tokens, seed)
    if text is not None:
        jobs.perplexity_text(text)
    store.writable(out_dir)
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    changed = jobs.stretched(lm, form.value, scale=scale, exponent=exponent, context=context, trained=trained)
    tables = jobs.giraffe_report(lm, changed, study, out_dir, text=text, say=say, command=Command.line)
    if as_json:
        print_json({"out": str(out_dir), **{name: report.json_records(table) for name, table in tables.items()}})
        return
    shown = ["length", "tokens", "recall", "recall_low", "recall_high", "nll", "nll_change", "nll_change_low", "nll_change_high"]
    show(tables["lengths"].set_index("condition")[shown], f"{lm.name}, by prompt length, with 95 % intervals")
    if "text" in tables:
        show(tables["text"].set_index("condition"), "The text, by position")
    name_files("Open {}; the model is in {}.", out_dir / "report.html", out_dir / "model")
    next_steps(check_what_works_with_it=same_options("check", out_dir / "model", model=None))
