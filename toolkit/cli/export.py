"""The commands ``export``, ``import`` and ``push``: to other tools, from other tools, and to the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.markup import escape

from toolkit import exports
from toolkit.cli.common import (
    AsJson,
    Budget,
    Command,
    Device,
    Force,
    Loaded,
    Model,
    Problems,
    Seed,
    Split,
    Task,
    Template,
    Think,
    Trust,
    Type,
    app,
    check_file,
    load_model,
    name_files,
    next_steps,
    out,
    print_json,
    reject_unread,
    same_options,
    show,
)
from toolkit.cli.steer import During, Layers, parse_layers

OPTIONS = ("strength", "layers", "during", "drop_layer_0", "doses", "base", "think", "max_new_tokens")
"""Parameters of ``export`` that are fields of ``exports.base.Settings``. ``Format.options`` lists those that a format reads."""
SOURCES = {
    "direction": ("vector", "model", "template", "dtype", "device", "trust_remote_code", "think"),
    "plan": ("plan", "model", "template", "dtype", "device", "trust_remote_code", "think"),
    "problems": ("task", "split", "problems", "seed"),
}
"""Kind of content of a format (``Format.takes``) -> parameters of ``export`` from which this content is loaded."""


def list_formats() -> None:
    """Print all formats, by what they take."""
    for takes in SOURCES:
        out.print(f"[bold]From {'a ' if takes != 'problems' else ''}{takes}[/bold]")
        for row in (row for row in exports.FORMATS if row.takes == takes):
            out.print(f"  [bold]{row.name}[/bold]: {escape(row.reader)}. Writes {escape(row.files)}.", highlight=False)
            out.print(f"    Checked: {escape(row.checked)}.", style="dim", highlight=False)


@app.command(cls=Command)
def export(
    out_path: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write, or new directory; --list says which.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(help=f"Format: {', '.join(row.name for row in exports.FORMATS)}. --list describes them.")
    ] = None,
    vector: Annotated[
        Path | None,
        typer.Option("--vector", "-v", help="Direction of this model, from `toolkit direction` or `toolkit import`."),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Plan of head edits: plan.safetensors in the directory of `toolkit thinkedit`.")
    ] = None,
    model: Model = "tiny-reasoner",
    strength: Annotated[
        float,
        typer.Option(
            help="Steering strength; + lengthens thinking, - shortens it. Multiplied into the vectors where a format has no scale of its own."
        ),
    ] = 1.0,
    layers: Layers = None,
    during: During = "all",
    drop_layer_0: Annotated[
        bool, typer.Option("--drop-layer-0", help="Leave out the vector of the first layer (block), which GGUF cannot steer.")
    ] = False,
    doses: Annotated[
        Path | None, typer.Option(help="For folder: directory of `toolkit dose`, whose numbers and figures go into the card.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="For gguf-lora: the base model's GGUF file, against which names and shapes are checked. For ollama: that file, or the base model's name in Ollama."
        ),
    ] = None,
    task: Task = "arithmetic",
    split: Split = "test",
    problems: Problems = 200,
    max_new_tokens: Budget = 1024,
    seed: Seed = 0,
    think: Think = None,
    template: Template = None,
    dtype: Type = Loaded.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    force: Force = False,
    show_list: Annotated[
        bool, typer.Option("--list", help="List all formats, and exit: what they take, what reads them, how they were checked.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a direction, a plan of head edits or problems in the format of another tool.

    A direction (--vector) makes the other tool steer. A plan (--plan) becomes an edit of weights, which every tool runs at full speed.
    Problems (--task) become a task of an evaluation tool. If a format cannot express the export, the command refuses it: most tools can
    only steer all positions, at the output of a block.

    For problems, --think OPEN,CLOSE names the think tags in the responses. What comes before the first CLOSE is not graded, and a response
    without CLOSE is wrong. Default: the whole response is the answer.

    Examples:

    [bold]toolkit export -v runs/efficiency.safetensors --to gguf --strength -0.5 --drop-layer-0 -o runs/shorter.gguf[/bold]

    [bold]toolkit export --plan runs/edited/plan.safetensors --to gguf-lora -o runs/edit.gguf[/bold]

    [bold]toolkit export --task arithmetic -n 50 --to inspect -o runs/arithmetic[/bold]
    """
    if show_list:
        fields = ("name", "takes", "reader", "files", "checked")
        print_json([{name: getattr(row, name) for name in fields} for row in exports.FORMATS]) if as_json else list_formats()
        return
    if out_path is None or to is None:
        raise typer.BadParameter(
            "Give the format with --to and the file or directory with --out (or list the formats with --list)."
        )
    from toolkit import jobs, lm, store
    from toolkit.exports.base import Settings, check
    from toolkit.types import Direction

    row = exports.find(to)
    read = {*SOURCES[row.takes], *row.options}
    reject_unread(f"by --to {to}", *sorted({*sum(SOURCES.values(), ()), *OPTIONS} - read))
    if doses is not None:
        jobs.read_doses(doses)
    value = _value(row, vector, plan, (task, split, problems, seed))
    settings = Settings(
        strength=strength,
        layers=parse_layers(layers),
        during=during,
        drop_layer_0=drop_layer_0,
        doses=doses,
        base=base,
        think=lm.ThinkTags.parse(think) if think and row.takes == "problems" else None,
        max_new_tokens=max_new_tokens,
    )
    if to != "folder" and isinstance(value, Direction):
        check(value, settings, to)
    if row.files == exports.ONE_FILE:
        check_file(out_path, force)
    else:
        if force and out_path.exists():
            raise typer.BadParameter(f"--force overwrites files only: remove the directory {out_path} yourself, or choose another.")
        store.new_directory(out_path)
    loaded = None if row.takes == "problems" else load_model(model, think, dtype, device, trust_remote_code, template)
    written = row.write(loaded, value, out_path, settings)
    if as_json:
        print_json({"out": str(written), "to": to})
        return
    name_files("Wrote {}.", written)


def _value(row: exports.Format, vector: Path | None, plan: Path | None, problems: tuple[str, str, int, int]) -> Any:
    """Load the content to export, according to ``Format.takes``: a ``Direction``, a ``Plan`` or a list of ``Problem``.

    Args:
        row: The format.
        vector: File of a direction, or ``None``.
        plan: File of a plan, or ``None``.
        problems: Task, split, number of problems and seed.

    Raises:
        BadParameter: the format needs a file that was not given, or the task's prompts depend on a model.
    """
    from toolkit import store, tasks
    from toolkit.types import Direction, Plan

    if row.takes == "problems":
        if problems[0] == "needle":
            raise typer.BadParameter(
                "--task needle: its prompts are fitted to one model's context. Export another task, or a JSONL file."
            )
        tasks.check(problems[0], problems[1])
        return tasks.load(*problems)
    kind: Any = {"direction": Direction, "plan": Plan}[row.takes]
    path, option = {"direction": (vector, "--vector"), "plan": (plan, "--plan")}[row.takes]
    if path is None:
        raise typer.BadParameter(f"--to {row.name} needs a {row.takes}: give its file with {option}.")
    return store.load(path, kind)


class Source(StrEnum):
    """File formats that ``import`` can read."""

    gguf = "gguf"
    safetensors = "safetensors"
    thinkedit = "thinkedit"
    svec = "svec"
    hidden_directions = "hidden-directions"


@app.command("import", cls=Command)
def import_(
    source: Annotated[Path, typer.Argument(help="The file of the other tool.")],
    out_file: Annotated[
        Path, typer.Option("--out", "-o", help="File to write the direction to, for `toolkit steer` and `toolkit dose`.")
    ],
    of: Annotated[Source, typer.Option("--from", help="Format of the file that is read.")],
    model: Model = "tiny-reasoner",
    layer: Annotated[int | None, typer.Option(help="For hidden-directions: layer of a file that holds a single vector.")] = None,
    flip: Annotated[
        bool, typer.Option("--flip", help="Reverse the sign of the vector; needed if adding it shortens thinking.")
    ] = False,
    think: Think = None,
    template: Template = None,
    dtype: Type = Loaded.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Read a steering vector in the format of another tool, check that it fits the model, and save it as a direction.

    Adding a direction must lengthen thinking: use --flip if adding the vector shortens it.

    A file is refused if its vectors do not fit the model in width or number of layers. It is also refused if its header contradicts itself,
    or names a site in a layer (such as resid_mid) at which vectors of this format do not act.

    Example: [bold]toolkit import vector.gguf --from gguf -m tiny-reasoner -o runs/imported.safetensors[/bold]
    """
    from toolkit import store, vectors

    if of is not Source.hidden_directions:
        reject_unread(f"with --from {of}", "layer")
    container = {Source.gguf: store.read_gguf, Source.safetensors: store.read_tensors, Source.svec: store.read_json}
    container.get(of, store.read_pt)(source)  # raises for a damaged file before a model is loaded
    check_file(out_file, force)
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    match of:
        case Source.gguf:
            v = vectors.load_gguf(source, lm)
        case Source.safetensors:
            v = vectors.load(source, lm)
        case Source.thinkedit:
            v = vectors.load_thinkedit(source, lm)
        case Source.svec:
            v = vectors.load_svec(source, lm)
        case Source.hidden_directions:
            v = vectors.load_hidden_directions(source, lm, layer=layer)
    v = replace(v, vector=-v.vector) if flip else v
    store.save(v, out_file)
    if as_json:
        norms = [{"layer": layer, "norm": float(norm)} for layer, norm in enumerate(v.norms)]
        print_json({"out": str(out_file), "kind": v.kind, "layers": norms, "provenance": v.provenance})
        return
    name_files(f"{v.estimator} at {v.kind}, {int((v.norms > 0).sum())} of {len(v.norms)} layers; saved to {{}}.", out_file)
    next_steps(see_whether_it_lengthens_thinking=same_options("steer", "-v", out_file, "-p", "YOUR PROMPT"))


@app.command()
def push(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder with a card: from `toolkit thinkedit`, or `toolkit export --to folder`, plan, adapter or merged."
        ),
    ],
    repo: Annotated[str, typer.Argument(help="Repository on the Hugging Face Hub: USER/NAME.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print files, sizes and card, and send nothing. Needs no network.")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="Create a public repository. Default: private.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a direction, plan, adapter or edited model with its card to the Hugging Face Hub, into a private repository.

    Before it uploads, the command prints a list of files, and it sends only these. No other command sends anything to the hub. The token
    is that of `hf auth login`.

    Example: [bold]toolkit push runs/edited me/edited-model --dry-run[/bold]
    """
    from toolkit.exports import hub

    upload = hub.plan_upload(folder, repo)
    table = pd.DataFrame(upload.files, columns=["file", "bytes"]).set_index("file")
    if as_json:
        address = None if dry_run else hub.push(upload, public=public)
        files = table.reset_index().to_dict("records")
        print_json({"sent": not dry_run, "address": address, "repo": repo, "public": public, "files": files, "card": upload.card})
        return
    show(table, f"{len(table)} files")
    where = f"{'public' if public else 'private'} repository {repo}"
    out.print(f"{sum(table['bytes']):,} bytes for the {where}", markup=False, highlight=False, soft_wrap=True)
    if dry_run:
        out.print(upload.card, markup=False, highlight=False)
        out.print("Nothing was sent (--dry-run).")
        return
    name_files("Uploaded to {}.", hub.push(upload, public=public))
