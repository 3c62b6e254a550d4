"""The code that a trained policy passes through: sampling, the trainer, its task, and its own reward; no other reward."""

from __future__ import annotations

from typing import Any

from toolkit import identity, rewards, store, tasks
from toolkit.grpo.recipes import Recipe

JUDGE = "toolkit.grpo.judge"  # trains the head that CRF asks


def modules(recipe: Recipe, task: str | None = None, reward: Any = None) -> dict[str, str]:
    """Modules and hashes of their code: see ``store.modules_of``.

    Args:
        task: Task trained on; ``None`` leaves it out.
        reward: A reward object of one's own instead of the recipe's.
    """
    others = {entry.make.__module__ for entry in rewards.ALL.values()}
    paying = rewards.ALL[recipe.reward].make(**recipe.options) if reward is None else reward
    own = identity.of(paying, strict=False).modules | identity.of(recipe, strict=False).modules
    judged = "conciseness" in getattr(paying, "needs", ())
    without = (*sorted(others), *(() if judged else (JUDGE,)))
    trained = store.modules_of("toolkit.grpo.run", *tasks.modules(task or ""), without=without)
    return trained | store.modules_of("toolkit.grpo.policies:train_policy", *own)
