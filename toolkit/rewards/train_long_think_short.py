"""Train long, think short: curriculum learning for efficient reasoning, arXiv:2508.08940.

Equations (c: 1 if right, else 0; L: length; B: the budget stated in the prompt, tokens; R: the highest R_len; t: optimizer step):

    r = w_c c + w_l R_len(L, B) + w_f R_fmt
    R_len    triangle  R L/B up to B, R (1 - (L - B)/B) up to 2B, 0 beyond
             band      R up to B, then as the triangle
    R_fmt    a_think 1[think span closed] + a_answer 1[an answer follows]
    B(t)     max(1, B_0 gamma^floor(t / T)), stated in whole tokens: 256, 179, 125, 87 in the paper

Deviations: the weights of the main run, R, a_think and a_answer were not found. The defaults are the weights w_c = 0.6 and w_l = 0.3 of an
ablation that stresses correctness, w_f = 0.1, R = 1, and a_think = a_answer = 1/2 (the last three are ours: ``assumed_...``). A fixed
``budget`` can replace the column, for example offline.

Units and signs: lengths in tokens; higher is better. The length part does not depend on correctness: a wrong answer at the budget earns
w_l R. The triangle penalises short responses. The budget has to be the one *in the prompt*, so the reward reads it from a column and never
computes it from the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.rewards.l1 import budget_columns, row_budgets
from toolkit.stats import Number

PUBLISHED_START, PUBLISHED_EVERY = 256, 150  # B_0 in tokens, and steps between drops (600 steps in all)
PUBLISHED_GAMMA = 0.698  # (87 / 256)^(1/3): 0.7 would end at 88
PUBLISHED_WEIGHTS = (0.6, 0.3)  # correctness, length: an ablation
assumed_format_weight = 0.1
assumed_most = 1.0  # R
assumed_format_parts = (0.5, 0.5)  # a_think, a_answer

SHAPES = ("triangle", "band")


def budget_at(
    step: int, *, start: Number = PUBLISHED_START, gamma: Number = PUBLISHED_GAMMA, every: int = PUBLISHED_EVERY
) -> float:
    """Return the budget at an optimizer step, B(t), in tokens and not rounded.

    >>> [stated_budget(budget_at(step)) for step in (0, 150, 300, 450)]
    [256, 179, 125, 87]

    Args:
        step: Optimizer step t.
        start: B_0, the first budget, tokens.
        gamma: Factor by which each drop multiplies the budget.
        every: Optimizer steps between drops, T.
    """
    return budget_after(step // every, start=start, factor=gamma)


def budget_after(drops: int, *, start: Number, factor: Number) -> float:
    """Return the budget after a number of drops, in tokens, at least 1 and not rounded.

    Args:
        drops: Number of drops so far.
        start: First budget, tokens.
        factor: Factor by which each drop multiplies the budget.
    """
    return max(1.0, float(start * factor**drops))


def stated_budget(budget: Number) -> int:
    """Return a budget rounded to whole tokens, as a prompt states it."""
    return round(budget)


def budget_stages(start: Number, final: Number, drops: int, steps: int, kind: str = "exponential") -> list[tuple[int, float]]:
    """Return ``(first step, budget)`` of each stage of a curriculum from ``start`` to ``final`` tokens.

    Exponential: each drop multiplies the budget by ``(final / start)^(1 / drops)``. Linear: each drop lowers it by the same number of
    tokens. A stage lasts ``steps / (drops + 1)`` steps. Budgets are not rounded; ``stated_budget`` does that.

    Args:
        start: First budget, tokens.
        final: Last budget, tokens.
        drops: Number of drops.
        steps: Optimizer steps in total.
        kind: ``"exponential"`` or ``"linear"``.
    """
    if drops < 1 or start <= 0 or final <= 0 or kind not in ("exponential", "linear"):
        raise ValueError(
            f"start={start}, final={final}, drops={drops}, kind={kind!r}: need positive budgets, at least one drop, and kind exponential or linear."
        )
    if kind == "exponential":
        values = [budget_after(k, start=start, factor=(final / start) ** (1 / drops)) for k in range(drops + 1)]
    else:
        values = [float(start + (final - start) * k / drops) for k in range(drops + 1)]
    return [(k * steps // (drops + 1), v) for k, v in enumerate(values)]


def length_reward(L: ndarray, budget: ndarray, shape: str, most: Number = assumed_most) -> Float[ndarray, " n"]:
    """Return R_len, the closeness to the budget, of each response.

    Args:
        L: Lengths, tokens.
        budget: Budget of each response, tokens.
        shape: ``"triangle"``, which falls on both sides of the budget, or ``"band"``, which falls only above it.
        most: R, the value at the budget.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r}: choose one of {', '.join(SHAPES)}.")
    below = most * L / budget if shape == "triangle" else np.full(len(L), float(most))
    return np.where(budget >= L, below, most * np.maximum(0.0, 2.0 - L / budget))


@dataclass(frozen=True)
class TrainLongThinkShort:
    """Weighted sum of correctness, closeness to the budget, and format.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[256, 128, 256], budget=256, closed=True, formatted=True)
    >>> TrainLongThinkShort()(batch).values.round(2).tolist()
    [1.0, 0.85, 0.4]

    Attributes:
        correctness: w_c, weight of correctness.
        length: w_l, weight of the closeness to the budget.
        format: w_f, weight of the format: a closed think span, and an answer after it.
        shape: Shape of the closeness as a function of the length: ``"triangle"``, which falls on both sides of the budget, or ``"band"``,
            which falls only above it.
        budget: One budget for all rows, tokens; ``None`` reads the column ``budget``, the budget stated in each prompt.
    """

    correctness: Number = PUBLISHED_WEIGHTS[0]
    length: Number = PUBLISHED_WEIGHTS[1]
    format: Number = assumed_format_weight
    shape: str = "triangle"
    budget: Number | None = None

    name: ClassVar[str] = "train_long_think_short"

    @property
    def needs(self) -> frozenset[str]:
        return budget_columns(self.budget) | {"closed", "formatted"}

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        length = length_reward(batch["tokens"], row_budgets(batch, self.budget), self.shape)
        think, answer = assumed_format_parts
        form = think * batch["closed"] + answer * batch["formatted"]
        return RewardValues.sum(
            correctness=self.correctness * batch["correct"], length=self.length * length, format=self.format * form
        )
