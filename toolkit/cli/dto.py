"""The command ``dto``: make preference pairs of shorter thinking from sampled responses, and train on them."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
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
    Split,
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
    show,
)


class Segments(StrEnum):
    """Ways to split thinking; the help of ``--segments`` explains them."""

    cues = "cues"
    lines = "lines"
    paragraphs = "paragraphs"


@app.command(cls=Command)
def dto(
    out_dir: Annotated[
        Path, typer.Option("--out", "-o", help="Directory to write to. After a stop, run the same command again to resume.")
    ],
    model: Model = "tiny-reasoner",
    task: Task = "arithmetic",
    split: Split = "train",
    problems: Problems = 200,
    samples: Samples = 4,
    temperature: Temperature = 1.0,
    max_new_tokens: Budget = 1024,
    segments: Annotated[
        Segments,
        typer.Option(help="Where segments of thinking begin. cues: at words such as Wait. lines: at lines, for tiny-reasoner."),
    ] = Segments.cues,
    probes: Annotated[int, typer.Option(min=1, help="Answers sampled after each segment.")] = 8,
    threshold: Annotated[
        float, typer.Option(min=0, max=0.999, help="Thinking may end where the share of right answers is above this.")
    ] = 0.5,
    completions: Annotated[int, typer.Option(min=1, help="Answers sampled for a pair; the shortest right one is chosen.")] = 8,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Token budget of these answers.")] = 256,
    steps: Annotated[int, typer.Option(min=0, help="Steps of training on the pairs, with SimPO; 0 makes the pairs only.")] = 0,
    rate: Annotated[float, typer.Option(help="Highest learning rate of the training. Needs --steps.")] = 1e-4,
    batch_size: BatchSize = 256,
    think: Think = None,
    template: Template = None,
    dtype: Type = Loaded.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Make preference pairs of shorter thinking from sampled responses (DTO, arXiv 2505.21765), and train on them.

    Each response is cut after the first segment of thinking that is enough for a right answer. Segments that contribute nothing are dropped.
    The result is preferred to the response. Writes rollouts/, pairs.jsonl (prompt, chosen, rejected) and, with --steps, trained/model.

    Example: [bold]toolkit dto -m tiny-reasoner -n 100 --segments lines --steps 40 -o runs/dto[/bold]
    """
    from toolkit import jobs, preferences, store, tasks
    from toolkit.generate import Sampling
    from toolkit.methods.thinking_optimization import DTOSettings

    tasks.check(task, split)
    if steps == 0:
        reject_unread("without --steps", "rate")
    store.writable(out_dir)
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    chosen = tasks.load(task, split, problems, seed, lm=lm, max_new_tokens=max_new_tokens)
    sampling = Sampling(n=samples, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, batch_size=batch_size)
    settings = DTOSettings(
        probes=probes,
        threshold=threshold,
        completions=completions,
        answering=replace(sampling, n=1, max_new_tokens=answer_tokens),
    )
    pairs, table = jobs.make_pairs(
        lm, chosen, sampling, settings, out_dir, segments=segments.value, about=jobs.origin(task, split, seed)
    )
    if steps:
        jobs.train_on_pairs(lm, pairs, preferences.Settings(steps=steps, rate=rate, seed=seed), out_dir)
    with_path = table[table["path_tokens"].notna()]
    summary = {
        "responses": len(table),
        "pairs": len(pairs),
        "tokens": float(with_path["tokens"].mean()),
        "path_tokens": float(with_path["path_tokens"].mean()),
    }
    if as_json:
        print_json({"out": str(out_dir), **summary})
        return
    by_problem = with_path.groupby("correct")[["segments", "exit", "dropped", "tokens", "path_tokens"]].mean().round(1)
    show(by_problem, f"{len(pairs)} pairs from {len(table)} responses of {lm.name}: means by correctness of the response")
    name_files("The pairs are in {}.", out_dir / "pairs.jsonl")
    if steps:
        next_steps(
            compare_before_and_after=same_options(
                "compare", f"base={model}", f"dto={out_dir / 'trained' / 'model'}", "-o", out_dir / "compare"
            )
        )
