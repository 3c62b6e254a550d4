"""What would a reward have paid these responses? Rewards asked about rollouts that exist, without training anything.

Scoring is in the ``"eval"`` split unless said otherwise, so a stateful reward keeps its state: without any history it pays what
it would pay in the first step of training. Show it the rollouts in the ``"train"`` split first to ask about the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from toolkit.rewards import groups
from toolkit.rewards.answers import CLOSE
from toolkit.rewards.batch import Reward, RewardBatch
from toolkit.types import Problem, Rollout

KEPT = ("problem_id", "correct", "tokens", "think_tokens", "finish")


def score(
    rollouts: Sequence[Rollout],
    reward: Reward,
    problems: Sequence[Problem] | None = None,
    *,
    columns: Mapping[str, Any] | None = None,
    step: int = 0,
    split: str = "eval",
    close: str | None = CLOSE,
) -> pd.DataFrame:
    """What a reward pays rollouts: one row each, with ``reward`` and a column ``component.NAME`` for each of its parts.

    Other columns: ``problem_id, sample, correct, tokens, think_tokens, finish``.

    Args:
        problems: Those of the rollouts, for rewards that need ``difficulty`` or targets from their ``meta``.
        columns: Columns that rollouts do not carry (``budget``, ``mode``, ``conciseness``, ...): one value a row, or one for all.
        step: The step to ask about.
        close: Closing think tag of the model that wrote the rollouts.

    Raises:
        MissingColumnError: the reward needs a column that neither has.
    """
    batch = RewardBatch.from_rollouts(rollouts, problems, step=step, split=split, close=close).with_columns(**(columns or {}))
    scored = reward(batch)
    table = pd.DataFrame({name: batch[name] for name in KEPT})
    table.insert(1, "sample", [r.sample for r in rollouts])
    table["reward"] = scored.values
    return table.assign(**{f"component.{name}": values for name, values in scored.components.items()})


def compare(
    rollouts: Sequence[Rollout],
    rewards: Mapping[str, Reward],
    problems: Sequence[Problem] | None = None,
    *,
    columns: Mapping[str, Any] | None = None,
    step: int = 0,
    close: str | None = CLOSE,
) -> pd.DataFrame:
    """:func:`score` for several rewards on the same rollouts, one under the other: a column ``name`` first, components left out."""
    tables = {name: score(rollouts, reward, problems, columns=columns, step=step, close=close) for name, reward in rewards.items()}
    kept = {name: table[[c for c in table if not c.startswith("component.")]] for name, table in tables.items()}
    return pd.concat(kept, names=["name"]).reset_index(level="name").reset_index(drop=True)


def mean_advantages(table: pd.DataFrame) -> pd.DataFrame:
    """What each reward of :func:`compare` would push: the mean GRPO advantage of four kinds of responses, a row a reward.

    Columns: ``right, shorter``, ``right, longer``, ``wrong, shorter``, ``wrong, longer`` (than the median of the responses to the
    problem; those of exactly that length count in none), and ``no push``, the share of problems whose responses are all paid the
    same. Advantages are ``(r - mean_g) / (std_g + 1e-4)`` with Bessel's correction, as TRL's: + makes such responses more likely.
    """
    rows = {}
    for name, part in table.groupby("name", sort=False):
        g, r = pd.factorize(part["problem_id"])[0], part["reward"].to_numpy(float)
        n, centred = groups.count(g), r - groups.mean(r, g)
        std = np.sqrt(groups.mean(np.square(centred), g) * n / np.maximum(n - 1, 1))
        varies = groups.highest(r, g) > groups.lowest(r, g)
        advantage = np.where(varies, centred / (std + 1e-4), 0.0)
        median = part.groupby("problem_id")["tokens"].transform("median")
        right, shorter, longer = part["correct"].to_numpy(bool), part["tokens"] < median, part["tokens"] > median
        kinds = {
            "right, shorter": right & shorter,
            "right, longer": right & longer,
            "wrong, shorter": ~right & shorter,
            "wrong, longer": ~right & longer,
        }
        means = {kind: advantage[rows_of].mean() if rows_of.any() else np.nan for kind, rows_of in kinds.items()}
        rows[name] = means | {"no push": 1 - varies[np.unique(g, return_index=True)[1]].mean()}
    return pd.DataFrame(rows).T.rename_axis("name")
