"""Find, edit, prove: demo, thinkedit, rollouts, direction, compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    Split,
    Task,
    TaskOfRollouts,
    Temperature,
    Template,
    Think,
    Trust,
    Type,
    app,
    kept_in,
    load_model,
    out,
    print_json,
    say,
    show,
    unread,
)

if TYPE_CHECKING:
    from toolkit.jobs import Finding, Given, Settings, Study
    from toolkit.lm import LM


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Where to write.")] = Path("runs/demo"),
    model: Model = "tiny-reasoner",
    task: Task = "arithmetic",
    problems: Problems = 200,
    samples: Samples = 8,
    template: Template = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """The main job, end to end: rollouts, direction, heads, edit, saved checkpoint, steering, and a verdict with controls.

    Writes report.json, report.html, direction.safetensors, heads.json and the edited checkpoint. On the tiny reasoner it
    takes a few minutes on two cores. Everything sampled is kept in --out: given again after a stop, it goes on.

    Example: [bold]toolkit demo[/bold]
    """
    from toolkit import jobs, report, store, tasks

    tasks.check(task, "train", "dev", "test")
    study = jobs.Study(task=task, problems=problems, samples=samples, seed=seed)
    store.writable(out_dir)
    result = jobs.demo(load_model(model, None, Dtype.float32, None, template=template), study, out_dir, say=say)
    if as_json:
        print_json(store.read_json(out_dir / "report.json"))
        return
    show(report.board(result), f"Test split of {task}: mean, and paired difference to base with its 95 % interval")
    out.print(f"Open [bold]{out_dir / 'report.html'}[/bold]; the edited model is in [bold]{out_dir / 'edited'}[/bold].")


@app.command(cls=Command)
def thinkedit(
    model: Model,
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Directory of the edited checkpoint (new or empty).")],
    rollouts: Annotated[
        Path | None, typer.Option(help="Rollouts of this model, from `toolkit rollouts`. Default: sampled now, of the train split.")
    ] = None,
    partial: Partial = False,
    task: TaskOfRollouts = None,
    allow_overlap: AllowOverlap = False,
    fraction: Annotated[float, typer.Option(help="Share of heads to edit (paper: about 0.04).")] = 0.04,
    strength: Annotated[float, typer.Option(help="lambda; 1 removes the direction from the heads' output.")] = 1.0,
    short_below: Annotated[float | None, typer.Option(help="Short class: fewer think tokens than this (paper: 100).")] = None,
    long_above: Annotated[float | None, typer.Option(help="Long class: more think tokens than this (paper: 1000).")] = None,
    share: Annotated[float, typer.Option(help="Without thresholds: share of rollouts in each class.")] = 0.2,
    variant: Annotated[
        str, typer.Option(help="Form of ThinkEdit: published, or ours (line starts, contrast, the heads' own direction).")
    ] = "published",
    adapter: Annotated[
        Path | None, typer.Option(help="Also write the edit as a rank-1 PEFT adapter of a few kilobytes (new directory).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write no checkpoint.")] = False,
    problems: Problems = 200,
    samples: Samples = 4,
    max_new_tokens: Budget = 1024,
    batch_size: BatchSize = 256,
    think: Think = None,
    template: Template = None,
    dtype: Type = Dtype.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Edit any checkpoint so that it thinks less briefly (ThinkEdit, arXiv 2503.22048).

    The result is an ordinary Hugging Face directory with a model card that says what was edited, why, and how base, edited
    and random-head control measured on the test split of the task (that of --rollouts, unless --task says otherwise).

    OUT.work, beside --out, keeps the rollouts, report.json and rows.parquet: the same command goes on after a stop, and given again
    once finished samples nothing. It stays when the edit is written; remove it when you need neither.

    Examples:

    [bold]toolkit thinkedit -m tiny-reasoner -o runs/edited[/bold]

    [bold]toolkit thinkedit -m deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --task gsm8k --short-below 100 --long-above 1000
    --dtype bfloat16 -o runs/r1-edited[/bold]
    """
    from toolkit import jobs, report, store, tasks

    if dry_run:
        unread("with --dry-run, which writes nothing", "adapter", "allow_overlap")
    if rollouts is None:
        unread("without --rollouts", "partial")
    if short_below is not None:
        unread("with --short-below and --long-above", "share")
    form, settings = jobs.form_named(variant), jobs.Settings(fraction, strength, share, short_below, long_above, seed)
    again = (out_dir / "edit.json").is_file()  # whether of this very edit is seen when it is made
    for target in () if dry_run or again else filter(None, (out_dir, adapter)):
        store.new_directory(target)
    given = jobs.given(rollouts, partial=partial) if rollouts else None
    task = given.task(task) if given else task or "arithmetic"
    tasks.check(task, *(() if given else ("train",)), *(() if dry_run else ("test",)))
    study = jobs.Study(task, problems, samples, max_new_tokens, batch_size, seed, allow_overlap)
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    work = out_dir.with_name(f"{out_dir.name}.work")
    finding = _found(lm, given, study, settings, form, work)
    done = not dry_run and jobs.is_saved(lm, finding, out_dir)
    plan = jobs.plan_table(finding)
    if not as_json:
        show(plan, f"Plan: {finding.plan.name}")
    if dry_run:
        if as_json:
            print_json({"plan": plan.reset_index().to_dict("records"), "provenance": finding.plan.provenance})
        return
    summary, measured = jobs.edit_and_measure(lm, finding, study, settings, out=store.writable(work), say=say)
    if done:
        say(f"{out_dir} holds this very edit already: it is left as it is")
    else:
        jobs.save_edited(lm, finding, measured, summary, out_dir)
    if adapter is not None:
        _write_adapter(lm, finding, adapter, work)
    if as_json:
        print_json(report.as_json(measured, summary, plan=plan.reset_index().to_dict("records")))
        return
    out.print(report.judged_on(measured), markup=False, highlight=False, soft_wrap=True)
    show(report.board(summary), "Mean, and paired difference to base with its 95 % interval")
    out.print(f"Saved to [bold]{out_dir}[/bold]; rollouts and numbers are in [bold]{work}[/bold].")


def _found(lm: LM, given: Given | None, study: Study, settings: Settings, form: str, work: Path) -> Finding:
    """Direction, heads and plan, from the rollouts given or from ones of the train split that are kept in ``work``."""
    from toolkit import jobs

    if given is not None:
        given.check(lm)
    rollouts = given.rollouts if given else jobs.extraction_rollouts(lm, study, out=work / "rollouts" / "train", say=say)
    about = given.origin if given else study.origin("train")
    return jobs.find(lm, rollouts, settings, form, origin=about)


def _write_adapter(lm: LM, finding: Finding, directory: Path, work: Path) -> None:
    """Write the edit as an adapter. One that is there already is left, if it is this very one; else FileExistsError."""
    from toolkit import store, vectors

    if not directory.is_dir() or not any(directory.iterdir()):
        vectors.save_adapter(lm, finding.plan, directory)
        return
    name = "adapter_model.safetensors"
    store.remove(work / "adapter")
    made = store.read_tensors(vectors.save_adapter(lm, finding.plan, work / "adapter") / name)
    store.remove(work / "adapter")
    there = store.read_tensors(directory / name) if (directory / name).is_file() else ({}, {})
    if made[1] != there[1] or made[0].keys() != there[0].keys() or any(not v.equal(there[0][k]) for k, v in made[0].items()):
        raise FileExistsError(f"{directory} is not empty and holds another adapter: choose another directory, or remove it first.")
    say(f"{directory} holds this very adapter already: it is left as it is")


@app.command()
def rollouts(
    out_dir: Annotated[
        Path, typer.Option("--out", "-o", help="Directory of the rollouts; given again after a kill, the run goes on.")
    ],
    model: Model = "tiny-reasoner",
    task: Task = "arithmetic",
    split: Split = "train",
    problems: Problems = 200,
    samples: Samples = 8,
    temperature: Temperature = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus; 1 keeps everything.")] = 1.0,
    max_new_tokens: Budget = 1024,
    details: Annotated[bool, typer.Option("--details", help="Keep log-probabilities and entropies.")] = False,
    batch_size: BatchSize = 256,
    think: Think = None,
    template: Template = None,
    dtype: Type = Dtype.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Sample responses, find their think spans, grade them. Streamed to parquet, resumable.

    Example: [bold]toolkit rollouts -m tiny-reasoner -t arithmetic -n 100 -k 8 -o runs/rollouts[/bold]
    """
    from toolkit import evaluate, jobs, tasks
    from toolkit.generate import Sampling
    from toolkit.generate import rollouts as sample

    tasks.check(task, split)
    sampling = Sampling(samples, temperature, top_p, 0, max_new_tokens, seed, details, batch_size)
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    chosen = tasks.load(task, split, problems, seed, lm=lm)
    found = sample(lm, chosen, sampling, out=out_dir, about=jobs.origin(task, split, seed))
    by_difficulty = evaluate.table(found, chosen).groupby(["task", "difficulty"])
    columns = ["correct", "think_tokens", "response_tokens", "closed"]
    table = by_difficulty[columns].mean().astype(float).round(3).assign(rollouts=by_difficulty.size()).reset_index()
    if as_json:
        print_json({"out": str(out_dir), "rollouts": len(found), "by_difficulty": table.to_dict("records")})
        return
    show(table.set_index("task"), f"{len(found)} rollouts of {lm.name} to {len(chosen)} problems ({split}) in {out_dir}")


@app.command(cls=Command)
def direction(
    rollouts: Annotated[Path, typer.Option("--rollouts", "-r", help="Rollouts of this model, from `toolkit rollouts`.")],
    out_file: Annotated[Path, typer.Option("--out", "-o", help="File to write, e.g. direction.safetensors.")],
    model: Model = "tiny-reasoner",
    partial: Partial = False,
    method: Annotated[str, typer.Option(help="thinkedit, efficiency, probe or pca.")] = "thinkedit",
    site: Annotated[
        str | None, typer.Option(help="resid_mid (attn) or resid_post (mlp, block output). Default: the method's own.")
    ] = None,
    estimator: Annotated[
        str, typer.Option(help="Of thinkedit and efficiency: mean_difference (published) or whitened (ours).")
    ] = "mean_difference",
    positions: Annotated[str, typer.Option(help="think (published) or step_starts (ours).")] = "think",
    short_below: Annotated[float | None, typer.Option(help="Short class: fewer think tokens than this.")] = None,
    long_above: Annotated[float | None, typer.Option(help="Long class: more think tokens than this.")] = None,
    share: Annotated[float, typer.Option(help="Without thresholds: share of rollouts in each class.")] = 0.2,
    think: Think = None,
    template: Template = None,
    dtype: Type = Dtype.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Extract a thinking-length direction (+ is longer) and save it with its provenance.

    [bold]thinkedit[/bold]: long minus short thinking (arXiv 2503.22048). [bold]efficiency[/bold]: a problem's longest minus its
    shortest correct response (arXiv 2506.15647). [bold]probe[/bold]: a logistic probe between the classes, scored on problems it
    has not seen. [bold]pca[/bold]: their first principal component.

    Examples:

    [bold]toolkit direction -m tiny-reasoner -r runs/rollouts -o runs/direction.safetensors[/bold]

    [bold]toolkit direction -m tiny-reasoner -r runs/rollouts --method efficiency -o runs/efficiency.safetensors[/bold]
    """
    from toolkit import jobs, origins, store

    if method == "efficiency":
        unread("by --method efficiency, which pairs responses of a problem", "share", "short_below", "long_above")
    if method in ("probe", "pca"):
        unread(f"by --method {method}", "estimator")
    if short_below is not None:
        unread("with --short-below and --long-above", "share")
    settings = jobs.Settings(share=share, short_below=short_below, long_above=long_above)
    recipe = jobs.Recipe(method, site, estimator, positions)
    given = jobs.given(rollouts, partial=partial)
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    given.check(lm)
    v, table = jobs.extract(lm, given.rollouts, settings, recipe, origin=given.origin)
    store.save(v, out_file)
    if as_json:
        print_json({"out": str(out_file), "layers": table.reset_index().to_dict("records"), "provenance": v.provenance})
        return
    made_from = f"{v.n_pos} long, {v.n_neg} short, of {origins.describe(v.provenance.notes)}"
    show(table.round(3), f"{v.estimator} at {v.kind} over {v.positions}: {made_from}; saved to {out_file}")


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="NAME=MODEL, the base first.", metavar="NAME=MODEL...")],
    task: Task = "arithmetic",
    split: Split = "test",
    problems: Problems = 200,
    samples: Samples = 8,
    temperature: Temperature = 1.0,
    max_new_tokens: Budget = 1024,
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Where rollouts, report.json and rows.parquet are kept. Default: runs/compare/KEY, a key of all that is asked.",
        ),
    ] = None,
    allow_overlap: AllowOverlap = False,
    batch_size: BatchSize = 256,
    think: Think = None,
    template: Template = None,
    dtype: Type = Dtype.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Compare models on the same problems and seeds, with paired intervals to the first. Given again after a stop, it goes on.

    A model that was edited or trained with this toolkit knows the problems it was made from: it is not judged on them.

    Example: [bold]toolkit compare base=tiny-reasoner edited=runs/demo/edited -t arithmetic[/bold]
    """
    from toolkit import evaluate, identity, report, tasks
    from toolkit.generate import Sampling

    pairs = [text.partition("=") for text in models]
    if len({name for name, _, _ in pairs}) < len(pairs) or not all(name and model for name, _, model in pairs):
        raise typer.BadParameter(f"Got {' '.join(models)}: give each model once as NAME=MODEL, the base first.")
    tasks.check(task, split)
    sampling = Sampling(samples, temperature, max_new_tokens=max_new_tokens, seed=seed, batch_size=batch_size)
    loaded = {name: load_model(model, think, dtype, device, trust_remote_code, template) for name, _, model in pairs}
    chosen = tasks.load(task, split, problems, seed, lm=loaded[pairs[0][0]])
    asked = [{name: identity.of_lm(lm) for name, lm in loaded.items()}, identity.of_problems(chosen), sampling.identity]
    kept = kept_in(out_dir, "compare", *asked)
    measured = evaluate.compare(
        loaded, chosen, sampling, base=pairs[0][0], out=kept / "rollouts", allow_overlap=allow_overlap
    )  # fmt: skip
    summary = report.write(kept, measured)
    if as_json:
        print_json(report.as_json(measured, summary))
        return
    out.print(report.judged_on(measured), markup=False, highlight=False, soft_wrap=True)
    show(report.board(summary, base=measured.base), "Mean, and paired difference to base with its 95 % interval")
    out.print(f"Rollouts and numbers are in [bold]{kept}[/bold].")
