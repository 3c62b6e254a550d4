"""Hashes of the code that a trained policy depends on: sampling, trainer, task and reward.

The hashes are part of a policy's cache key. If that code changes, a saved policy is no longer used, and a new one is trained.
"""

from __future__ import annotations

from typing import Any

from toolkit import identity, rewards, store, tasks
from toolkit.grpo.recipes import Recipe

JUDGE = "toolkit.grpo.judge"  # needed only by the reward CRF: trains the head that scores conciseness


def modules(recipe: Recipe, task: str | None = None, reward: Any = None) -> dict[str, str]:
    """Return a hash of the code of each toolkit module that a trained policy depends on, as a dict ``{module name: hash}``.

    Modules that the policy depends on only through an import in another module are included too (see ``store.modules_of``).

    Args:
        recipe: Recipe that the policy is trained with.
        task: Name of the task that the policy is trained on; ``None`` leaves the task's modules out.
        reward: Reward object that replaces the recipe's; ``None`` means the recipe's.
    """
    # Modules of all rewards are left out first, so that a change of one reward does not affect policies trained with another. Those that
    # this reward uses are added again (``used``).
    others = {entry.make.__module__ for entry in rewards.ALL.values()}
    reward = rewards.ALL[recipe.reward].make(**recipe.options) if reward is None else reward
    used = identity.of(reward, strict=False).modules | identity.of(recipe, strict=False).modules
    needs_judge = "conciseness" in getattr(reward, "needs", ())
    without = (*sorted(others), *(() if needs_judge else (JUDGE,)))
    scaled = (f"toolkit.grpo.policies:{name}" for name in ("_pool", "_run", "_extras"))  # functions that turn a plan into a run
    training = store.modules_of("toolkit.grpo.run", *tasks.modules(task or ""), without=without)
    return training | store.modules_of(*scaled, *used)
