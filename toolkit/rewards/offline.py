"""Score existing rollouts with rewards, without training, and compare the rewards.

Some rewards have a state that training updates, such as the length of the shortest right response to each problem. By default
(``split="eval"``), scoring does not change this state, so a new reward object scores all rollouts as in the first step of training. With
``split="train"`` each call of ``score`` updates the state, as a training step does.
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

ROLLOUT_COLUMNS = ("problem_id", "correct", "tokens", "think_tokens", "finish")


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
    """Return a table with the reward of each rollout, one row per rollout in the given order.

    Columns: ``problem_id``, ``sample`` (index of the response among those to the problem), ``correct``, ``tokens`` (of the response),
    ``think_tokens``, ``finish``, ``reward``, and ``component.NAME`` for each component of the reward. The components add up to ``reward``.

    The example is one right response of 4 tokens. Its reward is 1 minus a penalty of 4/16.

    >>> from toolkit.rewards.correctness import LengthPenalty
    >>> from toolkit.types import Span
    >>> right = Rollout("q", 0, (7, 8, 9, 4, 2), 1, Span(2, 3), Span(4, 5), "stop", "<think>x</think>4", correct=True)
    >>> score([right], LengthPenalty(longest=16))["reward"].tolist()
    [0.75]

    Args:
        rollouts: Responses to score.
        reward: Any reward of ``rewards.ALL``, or one of your own.
        problems: The problems of the rollouts; needed only by rewards that read ``difficulty`` or target lengths from ``Problem.meta``.
        columns: Column name -> values, for columns that rollouts do not have (``budget``, ``mode``, ``conciseness``, ...): one value per
            rollout, or a single value for all.
        step: Number of optimizer steps done so far; rewards with a schedule depend on it.
        split: ``"eval"``, or ``"train"`` to update the state of a stateful reward after scoring.
        close: Closing think tag of the model that wrote the rollouts; ``None`` if the model has none.

    Raises:
        MissingColumnError: The reward needs a column that is neither in the rollouts nor in ``columns``.
    """
    batch = RewardBatch.from_rollouts(rollouts, problems, step=step, split=split, close=close).with_columns(**(columns or {}))
    scored = reward(batch)
    table = pd.DataFrame({name: batch[name] for name in ROLLOUT_COLUMNS})
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
    """Score the same rollouts with several rewards, and return one table with one row per reward and rollout. No state changes.

    Columns: ``name`` (key of ``rewards``), and the columns of ``score`` without the components: ``problem_id``, ``sample``, ``correct``,
    ``tokens``, ``think_tokens``, ``finish`` and ``reward``.

    Args:
        rollouts: Responses to score.
        rewards: Name -> reward. The names are yours; they appear in the column ``name``.
        problems: The problems of the rollouts; needed only by rewards that read ``difficulty`` or target lengths from ``Problem.meta``.
        columns: Column name -> values, for columns that rollouts do not have: one value per rollout, or a single value for all.
        step: Number of optimizer steps done so far; rewards with a schedule depend on it.
        close: Closing think tag of the model that wrote the rollouts; ``None`` if the model has none.
    """
    tables = {name: score(rollouts, reward, problems, columns=columns, step=step, close=close) for name, reward in rewards.items()}
    totals = {name: table[[c for c in table if not c.startswith("component.")]] for name, table in tables.items()}
    return pd.concat(totals, names=["name"]).reset_index(level="name").reset_index(drop=True)


def mean_advantages(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with one row per reward: the mean GRPO advantage of right and wrong, shorter and longer responses.

    Responses of positive advantage become more likely in training. The index is the name of the reward. The columns are:

    - ``right, shorter``, ``right, longer``, ``wrong, shorter``, ``wrong, longer``: mean advantage of the right or wrong responses that are
      shorter or longer, in tokens, than the median response to the same problem. NaN if there are none. Responses of exactly the median
      length are in no column.
    - ``no push``: share of problems, from 0 to 1, whose responses all get the same reward. All their advantages are 0, so training on
      these problems has no effect.

    The advantage of a response with reward r is ``(r - mean) / (std + 1e-4)``, as in TRL. Mean and standard deviation (with Bessel's
    correction) are those of the rewards of all responses to the same problem.

    >>> table = pd.DataFrame({"name": "naive", "problem_id": "q", "correct": [True] * 4, "tokens": [10, 20, 30, 40]})
    >>> mean_advantages(table.assign(reward=1 - table["tokens"] / 100)).round(2).loc["naive", ["right, shorter", "right, longer"]].tolist()
    [0.77, -0.77]

    Args:
        table: The table that ``compare`` returns.
    """
    rows = {}
    for name, part in table.groupby("name", sort=False):
        g, r = pd.factorize(part["problem_id"])[0], part["reward"].to_numpy(float)
        n, centred = groups.count(g), r - groups.mean(r, g)
        # n / (n - 1): Bessel's correction.
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
        # One value of varies per problem: that of its first row.
        rows[name] = means | {"no push": 1 - varies[np.unique(g, return_index=True)[1]].mean()}
    return pd.DataFrame(rows).T.rename_axis("name")
