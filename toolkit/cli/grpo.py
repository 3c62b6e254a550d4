"""Training: grpo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.common import (
    AsJson,
    Device,
    Dtype,
    Model,
    Seed,
    Stopped,
    Task,
    Template,
    Think,
    Trust,
    app,
    load_model,
    out,
    print_json,
    say,
    show,
    weight_type,
)

Setting = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="NAME=VALUE, several times: problems, samples, updates, max_tokens, learning_rate; reward.NAME; any field of TRL's GRPOConfig.",
    ),
]
Scale = Annotated[
    str,
    typer.Option(
        help="tiny: the recipe in the size of the tiny reasoner. paper: its paper's numbers. auto: tiny for tiny-reasoner, else paper."
    ),
]


def parse_settings(given: list[str] | None) -> dict[str, str]:
    """``NAME=VALUE`` texts as a mapping."""
    pairs = [text.partition("=") for text in given or []]
    if wrong := [name + sign + value for name, sign, value in pairs if not (name and value)]:
        raise typer.BadParameter(f"--set {wrong[0]}: give NAME=VALUE, such as --set learning_rate=1e-5.")
    return {name: value for name, _, value in pairs}


@app.command()
def grpo(
    out_dir: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory of the run: log, checkpoints, and the model when finished.")
    ] = None,
    model: Model = "tiny-reasoner",
    reward: Annotated[str, typer.Option("--reward", "-r", help="A reward or recipe; see --list.")] = "correctness",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 60,
    show_list: Annotated[
        bool, typer.Option("--list", help="Print every reward and recipe with its paper and one line, and stop.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last whole checkpoint in --out, if there is one.")
    ] = False,
    lora: Annotated[
        bool,
        typer.Option("--lora", help="Train a LoRA adapter on every linear layer; left in OUT/adapter, and merged in OUT/model."),
    ] = False,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="Rank of the adapter; 16 unless given. Needs --lora.")] = None,
    scale: Scale = "auto",
    settings: Setting = None,
    task: Task = "arithmetic",
    problems: Annotated[int, typer.Option("--problems", "-n", min=2, help="Size of the pool of training problems.")] = 256,
    micro_batch: Annotated[
        int,
        typer.Option(
            min=1, help="Rows per forward and backward pass and process; steps are the same, except for drpo with updates."
        ),
    ] = 16,
    evaluate_every: Annotated[int, typer.Option(min=0, help="Steps between looks at held-out problems; 0 for never.")] = 10,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 20,
    engine: Annotated[str, typer.Option(help="toolkit, or trl: TRL generates (for vLLM: --set use_vllm=true).")] = "toolkit",
    think: Think = None,
    template: Template = None,
    dtype: Annotated[
        Dtype,
        typer.Option(
            "--dtype",
            help="Type the model is loaded in and, for bfloat16, computes in (autocast). Weights that are trained are fp32 in any case. Not float16.",
        ),
    ] = Dtype.float32,
    save_dtype: Annotated[
        Dtype,
        typer.Option(
            help="Type of the saved model. Narrower than float32 it rounds what was learned; how much is printed, and in grpo.json."
        ),
    ] = Dtype.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train with GRPO and a length reward; a log line a step, held-out accuracy and length as it goes on.

    A reward without a recipe of its own trains with plain GRPO. Killed at any moment, [bold]--resume[/bold] goes on with the same
    optimizer, problems and reward state. On several GPUs: accelerate launch $(which toolkit) grpo ...

    Memory: 16 bytes per trained weight (fp32 weight, gradient, Adam's two moments), with --dtype bfloat16 4 more (the model as given, the
    autocast copy), with --lora 4 per frozen weight in bfloat16 or 8 in float32. Less: --set gradient_checkpointing=true, --set
    optim=adamw_bnb_8bit (needs bitsandbytes).

    Examples:

    [bold]toolkit grpo --list[/bold]

    [bold]toolkit grpo --reward grpo_lambda --steps 60 --out runs/lambda[/bold]

    [bold]toolkit grpo -m Qwen/Qwen3-4B -t gsm8k -r pear --lora --set problems=32 --dtype bfloat16 -o runs/pear[/bold]
    """
    from toolkit import store, tasks
    from toolkit.grpo import curves, policies
    from toolkit.jobs import grpo as jobs

    if show_list:
        listed = jobs.catalogue()
        print_json(listed.reset_index().to_dict("records")) if as_json else show(listed, "Rewards and recipes")
        return
    if out_dir is None:
        raise typer.BadParameter("Say where the run goes: --out DIR (or --list for the rewards).")
    if scale not in ("auto", "tiny", "paper"):
        raise typer.BadParameter(f"--scale {scale}: choose auto, tiny or paper.")
    if lora_rank is not None and not lora:
        raise typer.BadParameter("--lora-rank needs --lora: without it every weight is trained.")
    tasks.check(task, "train", *(("dev",) if evaluate_every else ()))
    store.writable(out_dir)
    tiny = scale == "tiny" or (scale == "auto" and model == "tiny-reasoner")
    found = jobs.recipes.find(reward)
    recipe, overrides = jobs.adjust_recipe(found.scaled() if tiny else found, parse_settings(settings))
    study = jobs.Study(task, problems, max_new_tokens=recipe.max_tokens, seed=seed)
    run = jobs.Run(
        out_dir, steps, seed, save_every, evaluate_every=evaluate_every, micro_batch=micro_batch, overrides=overrides,
        evaluate=jobs.Sampling(n=4, max_new_tokens=recipe.max_tokens), save_dtype=weight_type(save_dtype),
    )  # fmt: skip
    extras = jobs.Extras(engine=engine, lora=policies.lora_config(lora_rank or 16) if lora else None)
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    try:
        done = jobs.grpo(lm, recipe, study, run, extras=extras, resume=resume, say=say)
    except Stopped as stopped:
        stopped.remedy = f"checkpoints are in {out_dir}: give the same command again with --resume"
        raise
    if not done.main:
        return
    table = jobs.before_and_after(done)
    if as_json:
        print_json(
            {"out": str(out_dir / jobs.MODEL), "recipe": recipe, "fingerprint": done.lm.fingerprint, "log": curves.steps(done.log)}
        )
        return
    show(table, f"{recipe.name} on {lm.name}; the model is in {out_dir / jobs.MODEL}")
    out.print(f"A line a step: [bold]{out_dir / 'log.jsonl'}[/bold].")
