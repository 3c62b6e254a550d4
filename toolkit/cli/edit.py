"""The commands ``demo``, ``thinkedit``, ``rollouts``, ``direction`` and ``compare``: sample rollouts, find heads, edit, compare models."""

from __future__ import annotations

from dataclasses import replace
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
    EngineAddress,
    Force,
    Loaded,
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
    ToolName,
    Trust,
    Type,
    app,
    check_file,
    command_line,
    connect_engine,
    find_toolbox,
    load_model,
    name_files,
    next_steps,
    out,
    print_json,
    reject_unread,
    result_directory,
    same_options,
    say,
    show,
)

if TYPE_CHECKING:
    from toolkit.engines import Engine
    from toolkit.jobs import EditSettings, Finding, RolloutDirectory, Study
    from toolkit.lm import LM


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Directory to write to.")] = Path("runs/demo"),
    model: Model = "tiny-reasoner",
    task: Task = "arithmetic",
    problems: Problems = 200,
    samples: Samples = 8,
    think: Think = None,
    template: Template = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Run the whole demo: sample rollouts, compute a length direction, edit heads that shorten thinking, steer, and compare with controls.

    The length direction is the mean activation in long thinking minus the mean activation in short thinking; adding it to activations
    lengthens thinking. Writes report.html, report.json, direction.safetensors, heads.json and the edited model.

    On the tiny reasoner this takes a few minutes on two cores. After a stop, run the same command again to resume.

    Example: [bold]toolkit demo[/bold]
    """
    from toolkit import jobs, report, store, tasks

    tasks.check(task, "train", "dev", "test")
    study = jobs.Study(task=task, problems=problems, samples=samples, seed=seed)
    store.writable(out_dir)
    lm = load_model(model, think, Dtype.float32, None, trust_remote_code, template)
    jobs.check_thinking(lm)
    result = jobs.demo(lm, study, out_dir, settings=replace(jobs.DEMO, seed=seed), say=say, command=Command.line)
    if as_json:
        print_json({"out": str(out_dir), **store.read_json(out_dir / "report.json")})
        return
    show(report.headline_table(result), f"Test split of {task}: mean, and paired difference from base with its 95 % interval")
    name_files("Open {}; the edited model is in {}.", out_dir / "report.html", out_dir / "edited")
    edited, vector = out_dir / "edited", out_dir / "direction.safetensors"
    next_steps(
        watch_the_direction_lengthen_and_shorten_thinking=same_options("steer", "-v", vector, "-p", "17+5-9+23=?"),
        compare_on_more_problems=same_options("compare", f"base={model}", f"edited={edited}", "--problems", 400),
    )


@app.command(cls=Command)
def thinkedit(
    model: Model,
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Directory of the edited model (new or empty).")],
    rollouts: Annotated[
        Path | None,
        typer.Option(help="Rollouts of this model, from `toolkit rollouts`. Default: sampled now from the train split."),
    ] = None,
    partial: Partial = False,
    task: TaskOfRollouts = None,
    allow_overlap: AllowOverlap = False,
    fraction: Annotated[float, typer.Option(help="Share of heads to edit, 0 to 1 (paper: about 0.04).")] = 0.04,
    strength: Annotated[
        float, typer.Option(help="lambda of the edit; 1 removes the direction from the heads' output, 2 reverses it.")
    ] = 1.0,
    short_below: Annotated[float | None, typer.Option(help="Short class: fewer think tokens than this (paper: 100).")] = None,
    long_above: Annotated[float | None, typer.Option(help="Long class: more think tokens than this (paper: 1000).")] = None,
    share: Annotated[
        float,
        typer.Option(
            help="Share of the rollouts in the short class and in the long class, without --short-below and --long-above."
        ),
    ] = 0.2,
    form: Annotated[
        str,
        typer.Option(
            help="Form of ThinkEdit. published: all think positions. ours: only positions where a line of thinking begins; heads are ranked by short minus long thinking; the part of the direction that these heads write is removed."
        ),
    ] = "published",
    adapter: Annotated[
        Path | None, typer.Option(help="Also write the edit as a rank-1 PEFT adapter (a few kilobytes) into this new directory.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Find the heads and print the plan of the edit, but edit and write no model.")
    ] = False,
    problems: Problems = 200,
    samples: Samples = 4,
    max_new_tokens: Budget = 1024,
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
    """Edit a model's weights so that short thinking becomes rarer (ThinkEdit, arXiv 2503.22048).

    Writes an ordinary Hugging Face directory, OUT, with a model card that lists the edited heads. The command also compares base, the
    edited model and random controls (edits of random heads or along random directions). It compares them on the test split of --task
    (default: the task of --rollouts).

    Rollouts, report.json and rows.parquet are saved in a second directory, OUT.work, so after a stop the same command resumes. You may
    remove OUT.work when the command has finished.

    Examples:

    [bold]toolkit thinkedit -m tiny-reasoner --form ours --fraction 0.06 -o runs/edited[/bold]

    [bold]toolkit thinkedit -m deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --task gsm8k --short-below 100 --long-above 1000
    --dtype bfloat16 -o runs/r1-edited[/bold]
    """
    from toolkit import jobs, report, store, tasks

    if dry_run:
        reject_unread("with --dry-run, which writes nothing", "adapter", "allow_overlap")
    if rollouts is None:
        reject_unread("without --rollouts", "partial")
    elif dry_run:
        reject_unread(
            "with --dry-run and --rollouts, which are sampled already",
            "problems",
            "samples",
            "max_new_tokens",
            "engine",
            "batch_size",
        )
    if short_below is not None:
        reject_unread("with --short-below and --long-above", "share")
    chosen, settings = jobs.form_named(form), jobs.EditSettings(fraction, strength, share, short_below, long_above, seed)
    again = (out_dir / "edit.json").is_file()  # is_saved checks later whether it is the same edit
    for target in () if dry_run or again else filter(None, (out_dir, adapter)):
        store.new_directory(target)
    source = jobs.read_rollouts(rollouts, partial=partial) if rollouts else None
    task = source.task(task) if source else task or "arithmetic"
    tasks.check(task, *(() if source else ("train",)), *(() if dry_run else ("test",)))
    study = jobs.Study(task, problems, samples, max_new_tokens, batch_size, seed, allow_overlap)
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    jobs.check_thinking(lm)
    work = out_dir.with_name(f"{out_dir.name}.work")
    sampler = connect_engine(engine, lm, work, batch_size)
    finding = _find_heads(lm, source, study, settings, chosen, sampler, work)
    done = not dry_run and jobs.is_saved(lm, finding, out_dir)
    plan = jobs.plan_table(finding)
    if not as_json:
        show(plan, f"Plan: {finding.plan.name}")
    if dry_run:
        if as_json:
            print_json({"plan": plan.reset_index().to_dict("records"), "provenance": finding.plan.provenance})
        else:
            next_steps(edit_and_measure="the same command without --dry-run")
        return
    summary, measured = jobs.edit_and_measure(lm, finding, study, settings, engine=sampler, out=store.writable(work), say=say)
    if done:
        say(f"{out_dir} already holds exactly this edited model: nothing written")
    else:
        jobs.save_edited(lm, finding, measured, summary, out_dir)
    if adapter is not None:
        _write_adapter(lm, finding, adapter, work)
    if as_json:
        print_json(report.as_json(measured, summary, plan=plan.reset_index().to_dict("records"), out=out_dir))
        return
    out.print(report.judged_on(measured), markup=False, highlight=False, soft_wrap=True)
    show(report.headline_table(summary), "Mean, and paired difference from base with its 95 % interval")
    name_files("Saved to {}; rollouts and numbers are in {}.", out_dir, work)
    found = {"task": task} if source else {}
    next_steps(
        compare_on_more_problems=same_options("compare", f"base={model}", f"edited={out_dir}", "--problems", 400, **found),
        see_what_would_be_uploaded=command_line("push", out_dir, "USER/NAME", "--dry-run"),
    )


def _find_heads(
    lm: LM, source: RolloutDirectory | None, study: Study, settings: EditSettings, chosen: str, engine: Engine, work: Path
) -> Finding:
    """Return the heads to edit as a ``Finding``: the length direction, the scores of all heads, and the plan of the edit.

    The length direction is the mean activation in long thinking minus that in short thinking.

    Args:
        lm: Model whose heads are scored.
        source: Rollouts from which the direction and the scores are computed. ``None`` samples new ones, which are saved in ``work``.
        study: Task, and numbers of problems and samples, of new rollouts.
        settings: Share of heads to edit, strength of the edit, and classes of short and long thinking.
        chosen: Form of ThinkEdit, published or ours, as a key of ``jobs.FORMS``.
        engine: Program that samples new rollouts.
        work: Directory of new rollouts.
    """
    from toolkit import jobs

    if source is not None:
        source.check(lm)
    rollouts = (
        source.rollouts if source else jobs.extraction_rollouts(lm, study, engine=engine, out=work / "rollouts" / "train", say=say)
    )
    about = source.origin if source else study.origin("train")
    return jobs.find_heads(lm, rollouts, settings, chosen, origin=about)


def _write_adapter(lm: LM, finding: Finding, directory: Path, work: Path) -> None:
    """Write the edit as a PEFT adapter, unless the directory already holds exactly this adapter.

    Args:
        lm: The base model.
        finding: Head scores and plan of the edit.
        directory: Directory of the adapter.
        work: Directory for a temporary copy of the adapter, to compare with an existing one.

    Raises:
        FileExistsError: the directory holds something else.
    """
    from toolkit import store, vectors

    # Into an existing directory nothing is written: the adapter is made elsewhere, and its metadata and tensors are compared.
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
    say(f"{directory} already holds exactly this adapter: nothing written")


@app.command()
def rollouts(
    out_dir: Annotated[
        Path, typer.Option("--out", "-o", help="Directory of the rollouts. After a stop, run the same command again to resume.")
    ],
    model: Model = "tiny-reasoner",
    task: Task = "arithmetic",
    tool: ToolName = None,
    split: Split = "train",
    problems: Problems = 200,
    samples: Samples = 8,
    temperature: Temperature = 1.0,
    top_p: Annotated[float, typer.Option(help="Probability mass of nucleus (top-p) sampling; 1 turns it off.")] = 1.0,
    max_new_tokens: Budget = 1024,
    details: Annotated[
        bool,
        typer.Option(
            "--details", help="Also save the log-probability and the entropy of every token (needed by `toolkit entropy`)."
        ),
    ] = False,
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
    """Sample responses, locate their think spans, and grade them.

    Parquet files are saved during the run, so after a stop the same command resumes.

    Example: [bold]toolkit rollouts -m tiny-reasoner -t arithmetic -n 100 -k 8 -o runs/rollouts[/bold]
    """
    from toolkit import evaluate, jobs, store, tasks
    from toolkit.generate import Sampling
    from toolkit.generate import rollouts as sample
    from toolkit.lm import Condition

    tasks.check(task, split)
    box = find_toolbox(tool)
    sampling = Sampling(samples, temperature, top_p, 0, max_new_tokens, seed, details, batch_size)
    store.writable(out_dir)
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    chosen = tasks.load(task, split, problems, seed, lm=lm, max_new_tokens=max_new_tokens)
    sampler = connect_engine(engine, lm, out_dir, batch_size)
    about = jobs.origin(task, split, seed)
    responses = sample(Condition(lm, tools=box), chosen, sampling, engine=sampler, out=out_dir, about=about)
    by_difficulty = evaluate.rollout_table(responses, chosen, lm.tags).groupby(["task", "difficulty"])
    columns = ["correct", "think_tokens", "response_tokens", "closed", "leaking"]
    table = by_difficulty[columns].mean().astype(float).assign(rollouts=by_difficulty.size()).reset_index()
    if as_json:
        print_json({"out": str(out_dir), "rollouts": len(responses), "by_difficulty": table.to_dict("records")})
        return
    show(table.set_index("task"), f"{len(responses)} rollouts of {lm.name} to {len(chosen)} problems ({split}) in {out_dir}")
    if lm.tags is None:  # neither a direction nor scores of heads can be computed from responses without thinking
        next_steps(count_whole_responses_as_thinking="the same command with --think response and a new --out")
        return
    next_steps(
        compute_a_direction_of_thinking_length=same_options("direction", "-r", out_dir, "-o", "runs/direction.safetensors"),
        score_the_attention_heads=same_options("heads", "-r", out_dir),
    )


@app.command(cls=Command)
def direction(
    rollouts: Annotated[Path, typer.Option("--rollouts", "-r", help="Rollouts of this model, from `toolkit rollouts`.")],
    out_file: Annotated[Path, typer.Option("--out", "-o", help="File to write, such as direction.safetensors.")],
    model: Model = "tiny-reasoner",
    partial: Partial = False,
    method: Annotated[str, typer.Option(help="thinkedit, efficiency, probe or pca; see above.")] = "thinkedit",
    site: Annotated[
        str | None,
        typer.Option(
            help="Where in a layer the residual stream is read: resid_mid (after attention) or resid_post (after the block). Default: resid_post for efficiency, else resid_mid."
        ),
    ] = None,
    estimator: Annotated[
        str,
        typer.Option(
            help="For thinkedit and efficiency: mean_difference (published), or whitened (ours: times the inverse covariance within classes)."
        ),
    ] = "mean_difference",
    positions: Annotated[
        str,
        typer.Option(
            help="Positions that are averaged over: think (published: all of thinking) or step_starts (ours: where a line of thinking begins)."
        ),
    ] = "think",
    short_below: Annotated[float | None, typer.Option(help="Short class: fewer think tokens than this.")] = None,
    long_above: Annotated[float | None, typer.Option(help="Long class: more think tokens than this.")] = None,
    share: Annotated[
        float,
        typer.Option(
            help="Share of the rollouts in the short class and in the long class, without --short-below and --long-above."
        ),
    ] = 0.2,
    think: Think = None,
    template: Template = None,
    dtype: Type = Loaded.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Compute a direction of thinking length and save it with its provenance. Adding the direction lengthens thinking.

    Methods: [bold]thinkedit[/bold], mean activation in long thinking minus that in short thinking (arXiv 2503.22048).
    [bold]efficiency[/bold], mean activation of the longest minus that of the shortest correct response to a problem, averaged over problems
    (arXiv 2506.15647).
    [bold]probe[/bold], weights of a logistic regression that separates long from short thinking, scored by AUC on held-out problems.
    [bold]pca[/bold], first principal component of the activations of long and short thinking together, pointing towards long thinking.

    Examples:

    [bold]toolkit direction -m tiny-reasoner -r runs/rollouts -o runs/direction.safetensors[/bold]

    [bold]toolkit direction -m tiny-reasoner -r runs/rollouts --method efficiency -o runs/efficiency.safetensors[/bold]
    """
    from toolkit import jobs, origins, store

    if method == "efficiency":
        reject_unread("by --method efficiency, which pairs responses of a problem", "share", "short_below", "long_above")
    if method in ("probe", "pca"):
        reject_unread(f"by --method {method}", "estimator")
    if short_below is not None:
        reject_unread("with --short-below and --long-above", "share")
    settings = jobs.EditSettings(share=share, short_below=short_below, long_above=long_above)
    recipe = jobs.DirectionRecipe(method, site, estimator, positions)
    source = jobs.read_rollouts(rollouts, partial=partial)
    check_file(out_file, force)
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    source.check(lm)
    jobs.check_thinking(lm)
    v, table = jobs.extract_direction(lm, source.rollouts, settings, recipe, origin=source.origin)
    store.save(v, out_file)
    if as_json:
        print_json({"out": str(out_file), "layers": table.reset_index().to_dict("records"), "provenance": v.provenance})
        return
    made_from = f"{v.n_pos} long, {v.n_neg} short, of {origins.describe(v.provenance.notes)}"
    show(table.round(3), f"{v.estimator} at {v.kind} over {v.positions}: {made_from}; saved to {out_file}")
    next_steps(
        see_what_it_does=same_options("steer", "-v", out_file, "-p", "YOUR PROMPT"),
        measure_it=same_options("dose", "-v", out_file, "-o", "runs/doses"),
    )


@app.command()
def compare(
    models: Annotated[
        list[str], typer.Argument(help="Models with the names to show; the first is the base.", metavar="NAME=MODEL...")
    ],
    task: Task = "arithmetic",
    tool: ToolName = None,
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
            help="Directory of report.html, report.json, rows.parquet and rollouts. Default: runs/compare/KEY, where KEY depends on models and options.",
        ),
    ] = None,
    allow_overlap: AllowOverlap = False,
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
    """Compare models on the same problems, sampled with the same random numbers.

    The first model is the base. Differences in accuracy, length and other metrics are a model's value minus that of the base, paired by
    problem.

    A model that was edited or trained with this toolkit records the problems that were used for it. A comparison on any of these problems
    is refused (unless --allow-overlap). After a stop, run the same command again to resume.

    Example: [bold]toolkit compare base=tiny-reasoner edited=runs/demo/edited -t arithmetic[/bold]
    """
    from toolkit import evaluate, identity, pages, report, store, tasks
    from toolkit.generate import Sampling
    from toolkit.lm import Condition

    pairs = [text.partition("=") for text in models]
    if len({name for name, _, _ in pairs}) < len(pairs) or not all(name and model for name, _, model in pairs):
        raise typer.BadParameter(f"Got {' '.join(models)}: give each model once as NAME=MODEL, the base first.")
    tasks.check(task, split)
    box = find_toolbox(tool)
    sampling = Sampling(samples, temperature, max_new_tokens=max_new_tokens, seed=seed, batch_size=batch_size)
    if out_dir is not None:
        store.writable(out_dir)
    loaded = {name: load_model(model, think, dtype, device, trust_remote_code, template) for name, _, model in pairs}
    chosen = tasks.load(task, split, problems, seed, lm=loaded[pairs[0][0]], max_new_tokens=max_new_tokens)
    # The default directory is named by a hash of all that the rollouts depend on, so that other models or options get another directory.
    depends = [{name: identity.of_lm(lm) for name, lm in loaded.items()}, identity.of_problems(chosen), sampling.identity]
    depends += [pairs[0][0]]  # the base; the order of the models is lost above, where a hash sorts the names
    depends += [identity.describe_tools(box)] if box else []
    base = loaded[pairs[0][0]]
    sampler = connect_engine(engine, base, out_dir or Path("runs/compare"), batch_size)
    directory = result_directory(out_dir, "compare", *depends, *sampler.header.items())
    conditions = {name: Condition(lm, tools=box) for name, lm in loaded.items()}
    measured = evaluate.compare(
        conditions, chosen, sampling, base=pairs[0][0], engine=sampler, out=directory / "rollouts", allow_overlap=allow_overlap
    )
    summary = report.write(directory, measured)
    shown = [report.transcripts(loaded, measured, chosen, directory / "rollouts")]
    heading = f"{', '.join(name for name in loaded if name != measured.base)} compared with {measured.base}"
    page = report.comparison_page(heading, measured, summary, sections=shown, command=Command.line)
    pages.write(page, directory / "report.html")
    if as_json:
        print_json(report.as_json(measured, summary, out=directory))
        return
    out.print(report.judged_on(measured), markup=False, highlight=False, soft_wrap=True)
    title = "Mean, and paired difference from the first model with its 95 % interval"
    show(report.headline_table(summary, base=measured.base), title)
    name_files("Open {}; rollouts and numbers are beside it.", directory / "report.html")
    next_steps(narrower_intervals="the same command with more --problems and a new --out")
