"""The command ``grpo``: train a policy with a length reward."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from toolkit.cli.common import (
    AsJson,
    Command,
    Device,
    Dtype,
    EngineAddress,
    Model,
    Seed,
    Stopped,
    Task,
    Template,
    Think,
    ToolName,
    Track,
    Trust,
    app,
    connect_engine,
    find_toolbox,
    load_model,
    name_files,
    next_steps,
    print_json,
    reject_unread,
    same_options,
    say,
    show,
    weight_type,
)

Setting = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="NAME=VALUE; may be repeated. NAME is a number of the recipe: problems (per batch, not the training problems of --problems), samples (per problem), updates (optimizer steps per batch), max_tokens (per response) or learning_rate; or reward.OPTION; or a field of TRL's GRPOConfig.",
    ),
]
Scale = Annotated[
    str,
    typer.Option(
        help="Sizes of the recipe. tiny: scaled down to the tiny models. paper: the paper's numbers. auto: tiny for tiny-reasoner and tiny-searcher, else paper."
    ),
]
Rank = Annotated[int | None, typer.Option(min=1, help="Rank of the adapter (default 16). Needs --train adapter.")]
OF_A_PLAN = ("heads", "head-scales")  # parts that a plan names
RATELESS = ("vector", *OF_A_PLAN)  # parts for which no recipe has a learning rate


def parse_part(
    train: str,
    rank: int | None,
    settings: Collection[str],
    *,
    plan: Path | None = None,
    parts: Sequence[str] = ("all", "adapter", *RATELESS),
) -> Any:
    """Return the part of the model to train, as ``Extras.train`` takes it.

    Args:
        train: Name of the part.
        rank: Rank of the adapter; ``None`` means 16.
        settings: Names of the settings that replace those of the recipe, such as ``learning_rate``.
        plan: File of the plan whose heads are trained.
        parts: Names of the parts that the running command can train.

    Raises:
        BadParameter: the name is not among ``parts``, an option belongs to another part, or the part has no learning rate.
    """
    from toolkit import store
    from toolkit.types import Plan

    if train not in parts:
        raise typer.BadParameter(f"--train {train}: choose {', '.join(parts[:-1])} or {parts[-1]}.")
    if rank is not None and train != "adapter":
        raise typer.BadParameter(f"--rank needs --train adapter, not --train {train}.")
    if (plan is not None) != (train in OF_A_PLAN):
        raise typer.BadParameter(
            "--train heads and --train head-scales need --plan FILE, from toolkit thinkedit; no other part takes a plan."
        )
    if train in RATELESS and "learning_rate" not in settings:
        raise typer.BadParameter(
            f"--train {train} needs --set learning_rate=RATE: the recipe's rate is for all weights. The papers' rate was not found; 0.1 moves the "
            "tiny reasoner."
        )
    if train == "all":
        return None
    from toolkit.grpo import parts as trainable  # imports peft

    if plan is not None:
        return trainable.plan_heads(store.load(plan, Plan), scale=train == "head-scales")
    return trainable.Vectors() if train == "vector" else trainable.adapter(rank or 16)


def parse_settings(texts: list[str] | None) -> dict[str, str]:
    """Parse texts ``NAME=VALUE`` into a dict from name to value (as text).

    Raises:
        BadParameter: a text is not of the form ``NAME=VALUE``.
    """
    pairs = [text.partition("=") for text in texts or []]
    if wrong := [name + sign + value for name, sign, value in pairs if not (name and value)]:
        raise typer.BadParameter(f"--set {wrong[0]}: give NAME=VALUE, such as --set learning_rate=1e-5.")
    return {name: value for name, _, value in pairs}


@app.command()
def grpo(
    out_dir: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory of the run: log, checkpoints, and the finished model.")
    ] = None,
    model: Model = "tiny-reasoner",
    reward: Annotated[
        str, typer.Option("--reward", "-r", help="Name of a reward or recipe (a reward with its paper's numbers); see --list.")
    ] = "correctness",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 60,
    show_list: Annotated[bool, typer.Option("--list", help="List all rewards and recipes with their papers, and exit.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last complete checkpoint in --out, if there is one.")
    ] = False,
    train: Annotated[
        str,
        typer.Option(
            help="Part to train. all: every weight. adapter: a LoRA on every linear layer; saved in OUT/adapter, and merged in OUT/model. vector: one vector per layer, added to the output of each block; saved in OUT/vector. heads: the columns of W_O of the heads of --plan. head-scales: one factor per head of --plan."
        ),
    ] = "all",
    rank: Rank = None,
    plan: Annotated[
        Path | None, typer.Option(help="Plan of the model, from `toolkit thinkedit`. Needs --train heads or head-scales.")
    ] = None,
    scale: Scale = "auto",
    settings: Setting = None,
    task: Task = "arithmetic",
    tool: ToolName = None,
    problems: Annotated[
        int,
        typer.Option(
            "--problems", "-n", min=2, help="Number of different training problems. For those per batch: --set problems=N."
        ),
    ] = 256,
    micro_batch: Annotated[
        int,
        typer.Option(
            min=1,
            help="Responses in each forward and backward pass, on each process. Changes memory, not the result, except for drpo with several updates, loss_type=bnpo, an entropy bonus, top_entropy_quantile below 1, or a mixture of experts.",
        ),
    ] = 16,
    evaluate_every: Annotated[int, typer.Option(min=0, help="Steps between evaluations on held-out problems; 0 for never.")] = 10,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 20,
    training_engine: Annotated[
        str, typer.Option(help="Code that generates responses: toolkit, or trl (for vLLM add --set use_vllm=true).")
    ] = "toolkit",
    engine: EngineAddress = "ours",
    track: Track = None,
    think: Think = None,
    template: Template = None,
    dtype: Annotated[
        Dtype,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="float32, or bfloat16 to load and compute in bfloat16 (autocast). Trained weights are always fp32. float16 is refused.",
        ),
    ] = Dtype.float32,
    save_dtype: Annotated[
        Dtype,
        typer.Option(
            metavar="TYPE",
            help="Number type of the saved model: float32, bfloat16 or float16. A type narrower than float32 rounds the trained weights; the rounding error is printed, and saved in grpo.json.",
        ),
    ] = Dtype.float32,
    device: Device = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train with GRPO and a length reward, with one log line per step and regular evaluations on held-out problems.

    A recipe is the training setup of a paper: its reward, its loss, and numbers such as batch size and learning rate. A reward that has no
    recipe is used with plain GRPO.

    After a stop, run the same command with [bold]--resume[/bold]. It continues from the last checkpoint, with the saved optimizer, order of
    problems and state of the reward. On several GPUs: accelerate launch $(which toolkit) grpo ...

    Memory, besides activations: 20 bytes per weight. Training takes 16: 4 each for the fp32 weight, its gradient and Adam's two moments.
    A copy of the model is trained; the initial model stays in memory and takes 4. With --dtype bfloat16 the sum is the same: the initial
    model takes 2, and the bfloat16 copy of the trained weights for autocast takes 2. Recipes with a KL penalty (beta not 0) need 4
    more, for a reference model.

    Memory if only a part is trained: 16 bytes per weight of the part. In addition, 8 bytes per weight of the model: 4 for the frozen
    weight, 4 for the initial model. With --dtype bfloat16 they are 2 each.

    The learning rates of recipes are for all weights. For a vector or heads, choose one with --set learning_rate=RATE.

    With --engine, a server samples the responses for the evaluations before and after training. For evaluations during training, no server
    is used: responses are sampled from the policy in training. The server is given the trained adapter. So --train adapter is needed, and a server
    that loads adapters while it runs (vLLM, SGLang).

    To use less memory: --set gradient_checkpointing=true, or --set optim=adamw_bnb_8bit (needs bitsandbytes).

    Examples:

    [bold]toolkit grpo --list[/bold]

    [bold]toolkit grpo --reward grpo_lambda --steps 60 --out runs/lambda[/bold]

    [bold]toolkit grpo -m Qwen/Qwen3-4B -t gsm8k -r pear --train adapter --set problems=32 --dtype bfloat16 -o runs/pear[/bold]
    """
    from toolkit.grpo import recipes

    if show_list:  # before the other imports, which take seconds
        listed = recipes.catalogue()
        print_json(listed.reset_index().to_dict("records")) if as_json else show(listed, "Rewards and recipes")
        return
    if out_dir is None:
        raise typer.BadParameter("Give the directory of the run with --out DIR (or list the rewards with --list).")
    if scale not in ("auto", "tiny", "paper"):
        raise typer.BadParameter(f"--scale {scale}: choose auto, tiny or paper.")
    from toolkit import pages, rewards, shipped, store, tasks
    from toolkit.grpo import curves, saved
    from toolkit.jobs import grpo as jobs
    from toolkit.types import Direction

    if engine != "ours" and not evaluate_every:
        raise typer.BadParameter("--engine samples for evaluations, and --evaluate-every 0 asks for none: leave one of them out.")
    if train == "vector":
        reject_unread("with --train vector, which saves a vector and no model", "save_dtype")
    chosen = parse_settings(settings)
    part = parse_part(train, rank, chosen, plan=plan)
    box = find_toolbox(tool)
    tasks.check(task, "train", *(("dev",) if evaluate_every else ()))
    store.writable(out_dir)
    tiny = scale == "tiny" or (scale == "auto" and model in shipped.COMPLETE)
    base = recipes.find(reward)
    recipe, overrides = jobs.adjust_recipe(base.scaled() if tiny else base, chosen)
    if box is None and "calls" in rewards.ALL[recipe.reward].make(**recipe.options).needs:
        raise typer.BadParameter(
            f"--reward {reward} pays for tool calls: name the tool that responses may call, such as --tool search."
        )
    study = jobs.Study(task, problems, max_new_tokens=recipe.max_tokens, seed=seed)
    run = jobs.Run(
        out_dir, steps, seed, save_every, evaluate_every=evaluate_every, micro_batch=micro_batch, overrides=overrides,
        evaluate=jobs.Sampling(n=4, max_new_tokens=recipe.max_tokens), save_dtype=weight_type(save_dtype),
    )  # fmt: skip
    extras = jobs.Extras(engine=training_engine, train=part, track=track, tools=box)
    lm = load_model(model, think, dtype, device, trust_remote_code, template)
    run = replace(run, evaluation_engine=connect_engine(engine, lm, out_dir))
    try:
        done = jobs.grpo(lm, recipe, study, run, extras=extras, resume=resume, say=say)
    except Stopped as stopped:
        stopped.remedy = f"checkpoints are in {out_dir}: run the same command again with --resume"
        raise
    if not done.main:
        return
    table, folder = jobs.before_and_after(done), saved.folder_of(out_dir, part)
    if train == "vector":
        vector = folder / saved.DIRECTION
        strength = store.load(vector, Direction).provenance.notes["strength"]
        judging = {
            "measure_other_strengths": same_options(
                "dose", "--vector", vector, "--alpha", f"0,{strength / 2:g},{strength:g}", "-o", out_dir / "doses"
            )
        }
    else:
        judging = {"compare_on_held_out_problems": same_options("compare", f"base={model}", f"trained={folder}")}
    page = jobs.training_page(done, recipe, model, judging=next(iter(judging.values())), command=Command.line)
    pages.write(page, out_dir / "report.html")
    if as_json:
        print_json({"out": str(folder), "recipe": recipe, "fingerprint": done.lm.fingerprint, "log": curves.steps(done.log)})
        return
    show(table, f"{recipe.name} on {lm.name}, {jobs.compared(done)}; the result is in {folder}")
    name_files("Open {}; the log, with one line per step, is in {}.", out_dir / "report.html", out_dir / "log.jsonl")
    next_steps(**judging)
