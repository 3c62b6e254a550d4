"""Train long, think short: curriculum learning for efficient reasoning, arXiv:2508.08940.

Equations (B: the budget that the prompt stated, tokens):

    r = w_c c + w_l R_len(L, B) + w_f R_fmt
    R_len    triangle  R L/B up to B, R (1 - (L - B)/B) up to 2B, 0 beyond
             band      R up to B, then the same
    R_fmt    a_think 1[think span closed] + a_answer 1[an answer follows]
    B(t)     max(1, B_0 gamma^floor(t / T)), stated in whole tokens: 256, 179, 125, 87 in the paper

Deviations: main-run weights, R_max and the two format weights were not found: the defaults are those of the correctness-heavy
ablation (.6, .3), 1, and half each (``assumed_...``). A fixed ``budget`` can stand in for the column, to ask offline.

Units and signs: tokens; + is paid. Not gated by correctness: a wrong answer at the budget earns w_l R, and the triangle costs
being short. The budget has to be the one that was *in the prompt*, so it is a column, never computed from the step when scoring.
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

PUBLISHED_START, PUBLISHED_EVERY = 256, 150  # B_0 tokens, and a drop every 150 of 600 steps
PUBLISHED_GAMMA = 0.698  # (87 / 256)^(1/3): 0.7 would end at 88
PUBLISHED_WEIGHTS = (0.6, 0.3)  # correctness, length: an ablation
assumed_format_weight = 0.1
assumed_most = 1.0  # R_max
assumed_format_parts = (0.5, 0.5)  # a_think, a_answer

SHAPES = ("triangle", "band")


def budget_at(
    step: int, *, start: Number = PUBLISHED_START, gamma: Number = PUBLISHED_GAMMA, every: int = PUBLISHED_EVERY
) -> float:
    """B(t), tokens, not rounded."""
    return budget_after(step // every, start=start, factor=gamma)


def budget_after(drops: int, *, start: Number, factor: Number) -> float:
    """The budget after some drops, tokens, not rounded; at least 1."""
    return max(1.0, float(start * factor**drops))


def stated_budget(budget: Number) -> int:
    """A budget as a prompt states it: whole tokens, rounded to the nearest."""
    return round(budget)


def budget_stages(start: Number, final: Number, drops: int, steps: int, kind: str = "exponential") -> list[tuple[int, float]]:
    """``(first step, budget)`` of each stage when ``drops`` drops in ``steps`` steps lead from ``start`` to ``final`` tokens.

    ``S_k = S_0 d^k`` with ``d = (S_f / S_0)^(1/n)``, or equal subtractions; a stage lasts ``steps / (n + 1)``. Budgets are not
    rounded: :func:`stated_budget` does that.
    """
    if drops < 1 or start <= 0 or final <= 0 or kind not in ("exponential", "linear"):
        raise ValueError(
            f"start={start}, final={final}, drops={drops}, kind={kind!r}: need positive budgets, at least one drop, exponential or linear."
        )
    if kind == "exponential":
        values = [budget_after(k, start=start, factor=(final / start) ** (1 / drops)) for k in range(drops + 1)]
    else:
        values = [float(start + (final - start) * k / drops) for k in range(drops + 1)]
    return [(k * steps // (drops + 1), v) for k, v in enumerate(values)]


def length_reward(L: ndarray, budget: ndarray, shape: str, most: Number = assumed_most) -> Float[ndarray, " n"]:
    """R_len of each response."""
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r}: choose one of {', '.join(SHAPES)}.")
    below = most * L / budget if shape == "triangle" else np.full(len(L), float(most))
    return np.where(budget >= L, below, most * np.maximum(0.0, 2.0 - L / budget))


@dataclass(frozen=True)
class TrainLongThinkShort:
    """Correctness, closeness to the budget, and format, in a weighted sum.

    Attributes:
        correctness: w_c.
        length: w_l.
        format: w_f.
        shape: ``"triangle"`` or ``"band"``.
        budget: Tokens; ``None`` reads the column ``budget``, what each prompt stated.
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
