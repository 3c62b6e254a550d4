"""The commands ``steer`` and ``dose``: steer a model along a direction, and measure it at several strengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.columns import Columns
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from toolkit.cli.common import (
    AllowOverlap,
    AsJson,
    BatchSize,
    Budget,
    Command,
    Device,
    EngineAddress,
    Loaded,
    Model,
    Problems,
    Samples,
    Seed,
    Temperature,
    Template,
    Think,
    Trust,
    Type,
    app,
    load_model,
    name_files,
    next_steps,
    out,
    parse_numbers,
    print_json,
    reject_unread,
    result_directory,
    same_options,
    say,
    show,
)

if TYPE_CHECKING:  # imported by the commands themselves, so that `toolkit --help` is quick
    import pandas as pd

    from toolkit.edits import Steering
    from toolkit.lm import LM
    from toolkit.types import Rollout

Vector = Annotated[
    Path, typer.Option("--vector", "-v", help="Direction of this model, from `toolkit direction` or `toolkit import`.")
]
Alphas = Annotated[
    str | None,
    typer.Option(
        "--alpha",
        "-a",
        help="Steering strengths separated by commas, e.g. -1,0,1. + lengthens thinking, - shortens it. Default: strengths that fit the model and the vector, found on a handful of prompts.",
    ),
]
Layers = Annotated[str | None, typer.Option(help="Layers to steer: 3, 2-5 or 1,4,7. Default: all.")]
During = Annotated[
    str,
    typer.Option(
        help="When to steer: all (at every position), newest (from the last token of the prompt on), or phases joined by +, from prompt, think and answer, e.g. think+answer."
    ),
]


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Return the layer numbers in a text such as ``"3"``, ``"2-5"`` or ``"1,4,7"``. ``None``, for all layers, is returned unchanged.

    >>> parse_layers("2-5")
    (2, 3, 4, 5)
    """
    if text is None:
        return None
    try:
        ends = [[int(n) for n in part.split("-", 1)] for part in text.split(",")]  # [3] or [2, 5]
        if backwards := [end for end in ends if end[0] > end[-1]]:
            raise ValueError(f"no layer from {backwards[0][0]} to {backwards[0][-1]}")
        return tuple(layer for end in ends for layer in range(end[0], end[-1] + 1))
    except ValueError as error:
        raise typer.BadParameter(f"--layers {text}: give layers such as 3, 2-5 or 1,4,7.") from error


@app.command(cls=Command)
def steer(
    vector: Vector,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="User message; may be repeated.")],
    alpha: Alphas = None,
    model: Model = "tiny-reasoner",
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Directory of the responses. Default: runs/steer/KEY, where KEY depends on model and options."
        ),
    ] = None,
    layers: Layers = None,
    during: During = "all",
    op: Annotated[
        str,
        typer.Option(
            help="Operation: add the vector, ablate (project the direction out), or clamp (set the component along the direction to --value)."
        ),
    ] = "add",
    value: Annotated[float, typer.Option(help="For --op clamp: value of the component along the direction.")] = 0.0,
    samples: Samples = 8,
    temperature: Temperature = 1.0,
    max_new_tokens: Budget = 512,
    think: Think = None,
    template: Template = None,
    dtype: Type = Loaded.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Show responses at several steering strengths side by side, with thinking in colour and its length below.

    With --op add, the vector times the strength is added to the activations: positive strengths lengthen thinking, negative ones shorten it.

    Without --alpha, strengths are first tried on a handful of prompts: yours, and problems of the task that the vector was made from. The
    search goes up in steps of the relative dose (norm of the added vector over norm of the activations) until responses begin to loop or
    no longer close their thinking. Then strength 0 is shown, and of the strengths below that limit those that change the length most. With
    --op ablate and --op clamp, strengths 0 and 1 are shown.

    One response per strength is shown, of median length; the table below gives the mean over all samples. All strengths use the same random
    numbers. --json prints every response.

    Examples:

    [bold]toolkit steer -v runs/direction.safetensors -p "17+5-9+23=?"[/bold]

    [bold]toolkit steer -v runs/direction.safetensors -a -0.5,0,0.5 -p "7+8-3=?" --during think --layers 1-3[/bold]
    """
    from toolkit import identity, jobs, store
    from toolkit.edits import steering
    from toolkit.generate import Sampling
    from toolkit.types import Direction

    if op != "clamp":
        reject_unread(f"by --op {op}", "value")
    chosen, v = parse_layers(layers), store.load(vector, Direction)

    def act(strength: float) -> Steering:
        return steering(v, strength, layers=chosen, during=during, op=op, value=value)

    # Ablating and clamping have a natural strength, 1; for adding, a suitable strength depends on the model.
    # None: strengths are searched for below; until then 1 stands for them.
    given = alpha if alpha is not None or op == "add" else "0,1"
    acts = {a: act(a) for a in parse_numbers(given, "--alpha", float)} or {1.0: act(1.0)}
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    sampling = Sampling(samples, temperature, max_new_tokens=max_new_tokens, seed=seed)
    about = [str(a) for a in acts.values()] if given is not None else ["fit", str(act(1.0))]
    directory = result_directory(out_dir, "steer", identity.of_lm(lm), about, prompt, sampling.identity)
    if given is None:
        say("trying strengths on a handful of prompts")
        few = replace(sampling, n=min(samples, 2))
        fit = jobs.fitting_strengths(lm, act, few, prompts=prompt, out=directory / "trial")
        say(str(fit))
        acts = {a: act(a) for a in fit.shown}
    responses = jobs.steered_responses(lm, acts, prompt, sampling, out=directory)
    if as_json:
        names = ("sample", "think_tokens", "response_tokens", "closed", "text")
        print_json([{"prompt": text, "strength": a, **{name: getattr(r, name) for name in names}} for text, a, r in responses])
        return
    for text in prompt:
        out.print(f"\n[bold]{escape(text)}[/bold]", highlight=False)
        panels = [_panel(lm, a, [r for t, b, r in responses if (t, b) == (text, a)]) for a in acts]
        out.print(Columns(panels, expand=True, equal=True))
    if op == "add":
        show(
            _dose_table(lm, acts, responses), "Relative dose: |strength x vector| / |activations|, in the layer where it is largest"
        )
        next_steps(
            measure_length_and_accuracy_at_several_strengths=same_options(
                "dose", "-o", "runs/doses", more=("vector", "layers", "during")
            ),
        )


def _dose_table(lm: LM, acts: Mapping[float, Steering], responses: Sequence[tuple[str, float, Rollout]]) -> pd.DataFrame:
    """Return a table with one row per strength: relative dose, layers steered, mean think tokens, and share of responses that closed."""
    import pandas as pd

    from toolkit import doses, strengths

    least = min(acts, key=abs)  # usually 0: the base model
    typical = doses.typical_norms(lm, [r for _, a, r in responses if a == least], acts[least].site)
    rows = {}
    for a, act in acts.items():
        at_strength = [r for _, b, r in responses if b == a]
        rows[f"{a:+g}"] = {
            "relative dose": strengths.relative_doses(act, typical).max().item(),
            "layers": f"{len(strengths.steered_layers(act))} of {lm.layout.n_layers}",
            "think tokens": sum(r.think_tokens for r in at_strength) / len(at_strength),
            "closed": f"{100 * sum(r.closed for r in at_strength) / len(at_strength):.0f} %",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("strength")


def _panel(lm: LM, strength: float, responses: Sequence[Rollout]) -> Panel:
    """Return the response of median length in a frame, titled with its steering strength."""
    r = sorted(responses, key=lambda r: r.think_tokens)[len(responses) // 2]
    start, stop = (r.think.start, r.think.stop) if r.think else (r.prompt_len, r.prompt_len)
    # Three parts of the response: before the think span, the span, and the rest. Without a think span, all is the rest.
    before, thought, rest = (lm.text(r.token_ids[a:b]) for a, b in pairwise((r.prompt_len, start, stop, len(r.token_ids))))
    body = Text.assemble((before, "dim"), (thought, "cyan"), (rest, "bold" if r.closed else "red"), overflow="fold")
    return Panel(body, title=f"{strength:+g}", subtitle=f"{r.think_tokens} think tokens{'' if r.closed else ', never closed'}")


@app.command()
def dose(
    vector: Vector,
    out_dir: Annotated[
        Path, typer.Option("--out", "-o", help="Directory to write to. After a stop, run the same command again to resume.")
    ],
    alpha: Alphas = None,
    model: Model = "tiny-reasoner",
    layers: Layers = None,
    during: During = "all",
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            "-t",
            help="Task, as for `toolkit rollouts`. Default: the task that the vector was made from if it records one, else arithmetic.",
        ),
    ] = None,
    allow_overlap: AllowOverlap = False,
    problems: Problems = 100,
    samples: Samples = 4,
    max_new_tokens: Budget = 400,
    engine: EngineAddress = "ours",
    batch_size: BatchSize = 256,
    think: Think = None,
    template: Template = None,
    dtype: Type = Loaded.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure length, accuracy and damage at several steering strengths on the dev split, with a random direction as control.

    Damage is shown by three numbers: the share of responses that close their thinking, the share that end in a loop, and the perplexity of
    the base model's responses under the steered model.

    Writes report.html, doses.json, targets.json and the rollouts. targets.json has, for target lengths from 0.5 to 2 times the base model's
    mean think length, the strength that comes closest.

    Example: [bold]toolkit dose -v runs/direction.safetensors -o runs/doses[/bold]
    """
    from toolkit import doses, jobs, store, strengths, tasks
    from toolkit.phases import Scope
    from toolkit.types import Direction

    if engine != "ours":
        raise typer.BadParameter(
            f"--engine {engine}: dose steers inside the network, which only the toolkit's own loop can do. Leave --engine out; to run one strength on "
            "a server, write it in the server's format (toolkit export --vector)."
        )
    plan = doses.DoseSweep(
        parse_numbers(alpha, "--alpha", float), parse_layers(layers), Scope.parse(during), allow_overlap=allow_overlap
    )
    v = store.load(vector, Direction)
    recorded = str(v.provenance.notes.get("task", "arithmetic"))
    if task is None and not tasks.is_built_in(recorded):
        raise typer.BadParameter(
            f"{vector} was made from problems in a file {recorded!r}, of which it records only the name: give the file with --task FILE."
        )
    task = task or recorded
    tasks.check(task, "dev")
    store.writable(out_dir)
    study = jobs.Study(task, problems, samples, max_new_tokens, batch_size, seed)
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    jobs.check_thinking(lm)
    if alpha is None:
        say("trying strengths on a handful of prompts")
        few = replace(study.sampling, n=min(samples, 2))
        fit = jobs.fitting_strengths(
            lm, lambda a: plan.act(v, a), few, problems=study.load("dev", lm)[: strengths.assumed_handful], out=out_dir / "trial"
        )
        say(str(fit))
        plan = replace(plan, strengths=fit.grid)
    wide, dial = jobs.dose_report(lm, v, study, plan, out_dir, say=say, command=Command.line)
    if as_json:
        print_json({"out": str(out_dir), **store.read_json(out_dir / "doses.json")})
        return
    columns = ["think_tokens", "accuracy", "closed", "looping", "perplexity", "relative_dose"]
    for name in wide.index.levels[0]:
        show(wide.loc[name][columns], f"{name}: means at each steering strength")
    out.print(store.read_json(out_dir / "doses.json")["judged_on"], markup=False, highlight=False, soft_wrap=True)
    show(
        dial.set_index("target"),
        "Best strength for each target length (tokens), and percent of responses within 10 % (precise) and 20 % (flexible) of the target",
    )
    name_files("Open {}.", out_dir / "report.html")
    next_steps(
        a_card_with_these_numbers=same_options(
            "export", "--to", "folder", "--doses", out_dir, "-o", "runs/vector", more=("vector",), task=None, max_new_tokens=None
        ),
    )
