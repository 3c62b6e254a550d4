"""Train policies once and read them back from disk later.

Each policy has a folder. The folder's name ends in a hash of everything that the policy depends on: model, recipe, seed, settings, code.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from toolkit import identity, store, tasks
from toolkit.generate import Sampling
from toolkit.grpo import code, saved
from toolkit.grpo.extras import Extras
from toolkit.grpo.log import LOG, read
from toolkit.grpo.plan import TrainingPlan
from toolkit.grpo.recipes import Recipe
from toolkit.grpo.run import Run, Trained, micro_batch_counts, policy_identity, process_of, train
from toolkit.lm import LM
from toolkit.types import Problem


def train_policy(
    lm: LM,
    recipe: Recipe,
    seed: int,
    plan: TrainingPlan,
    runs: Path,
    *,
    reward: Any = None,
    say: Callable[[str], None] = lambda text: None,
) -> Trained:
    """Train a copy of ``lm`` with a recipe and a seed, and return the policy with its log.

    If the policy's folder in ``runs`` (see ``folder_of``) holds the finished policy, it is read from there instead. If it holds a stopped
    run, training is resumed. Checkpoints are removed at the end.

    If several processes need the same policy, one trains it and the others wait. Processes that ``accelerate`` started together train it
    together.

    Args:
        lm: The initial model.
        recipe: Recipe with its paper's numbers. If ``plan.tiny`` is True, it is scaled to the tiny reasoner (see ``Recipe.scaled``); then
            ``plan.changes`` is applied.
        seed: Seed of the training.
        plan: Training settings.
        runs: Directory that holds one folder per policy.
        reward: Reward object that replaces the recipe's; ``None`` means the recipe's. Training uses a copy, so the object does not change.
            The hash in the folder's name covers its class and fields.
        say: Function that is called with one line of progress or warning at a time.

    Raises:
        identity.UnknownIdentityError: the reward has a field that cannot be hashed by its value, such as a lock.
    """
    depends_on = basis(lm, recipe, seed, plan, reward=reward)
    folder = runs / f"{_name(recipe, seed)}-{depends_on.key}"
    recipe = plan.sized(recipe)
    run, extras = _run(lm, recipe, seed, plan, folder), _extras(plan, reward)
    main = process_of(run)[0] == 0
    # Of processes that train together (accelerate), only the main one locks: the others would wait for it, and it for them.
    with store.locked(folder, wait=True) if main else nullcontext():
        # What the main process finds decides for all, since the policy may be finished at any time by a process that trains by itself.
        (whole,) = broadcast_object_list([saved.is_finished(folder, plan.train)])
        if whole:
            if main:
                _remove_checkpoints(folder)  # left behind if a process was killed just after it saved the policy
            policy = saved.read_policy(lm, folder, plan.train, f"{lm.name}, {recipe.name}")
            return Trained(policy, pd.DataFrame(read(folder / LOG) if main else []), main)
        if main and not (folder / store.MADE_BY).exists():
            changed = depends_on.changed(store.records(runs, f"{glob.escape(_name(recipe, seed))}-*"))
            if changed:
                say(
                    f"{recipe.name}, seed {seed}, was trained by other code ({', '.join(sorted(changed))} changed): training it again"
                )
            depends_on.write(folder)  # before training, so that a stopped run has its record too
        done = train(lm, recipe, _pool(lm, recipe, plan), run, extras=extras, resume=True, say=say)
        if done.main:
            _remove_checkpoints(folder)
    return done


def _remove_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        store.remove(checkpoint)
    store.tidy(folder)  # removes what a process left that was killed while it removed a checkpoint


def _run(lm: LM, recipe: Recipe, seed: int, plan: TrainingPlan, folder: Path) -> Run:
    evaluate = Sampling(n=4, max_new_tokens=max(200, recipe.max_tokens))
    dev = tasks.load(plan.task, "dev", plan.held_out, lm=lm, max_new_tokens=evaluate.max_new_tokens)
    return Run(
        folder, plan.steps, seed, save_every=20, held_out=tuple(dev), evaluate_every=plan.evaluate_every, micro_batch=plan.micro_batch,
        evaluate=evaluate, overrides=dict(plan.overrides),
    )  # fmt: skip


def _extras(plan: TrainingPlan, reward: Any) -> Extras:
    return Extras(reward=deepcopy(reward), engine=plan.engine, train=plan.train, track=plan.track)


def folder_of(lm: LM, recipe: Recipe, seed: int, plan: TrainingPlan, runs: Path, *, reward: Any = None) -> Path:
    """Return the path of a policy's folder in ``runs``. The folder's name ends in a hash of everything that the policy depends on.

    ``basis`` computes the hash. The folder need not exist yet. The arguments are those of ``train_policy``.
    """
    return runs / f"{_name(recipe, seed)}-{basis(lm, recipe, seed, plan, reward=reward).key}"


def _name(recipe: Recipe, seed: int) -> str:
    return f"{store.safe_name(recipe.name)}-seed{seed}"


def _pool(lm: LM, recipe: Recipe, plan: TrainingPlan) -> list[Problem]:
    return tasks.load(plan.task, "train", plan.pool, lm=lm, max_new_tokens=recipe.max_tokens)


def basis(lm: LM, recipe: Recipe, seed: int, plan: TrainingPlan, *, reward: Any = None) -> store.Basis:
    """Return a record of everything that a trained policy depends on: model, recipe, problems, seed, plan, reward and code.

    The record's ``key`` is a hash of all these values. A saved policy is used again only if it has the same key. The arguments are those of
    ``train_policy``.
    """
    recipe = plan.sized(recipe)
    own_reward = {} if reward is None else {"reward": identity.of(reward).body}
    part = {"train": identity.of(plan.train).body}
    rows = {"micro_batch": plan.micro_batch} if micro_batch_counts(recipe, dict(plan.overrides), lm.model.config) else {}
    depends = {**policy_identity(lm, recipe, _pool(lm, recipe, plan)), "seed": seed, **plan.identity, **own_reward, **part, **rows}
    return store.Basis(json.loads(json.dumps(depends, default=str)), code.modules(recipe, plan.task, reward))
