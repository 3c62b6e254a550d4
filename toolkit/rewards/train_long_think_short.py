"""Train long, think short: curriculum learning for efficient reasoning, arXiv:2508.08940.

The prompt states a budget of tokens, which drops in stages during training. The reward is a weighted sum of correctness, closeness of the
length to this budget, and format.

Equations (c: 1 if right, else 0; L: length; B: the budget, tokens; R: largest R_len; w_c, w_l, w_f, a_think, a_answer: weights; t:
optimizer step; B_0: first budget; gamma: factor by which each drop multiplies the budget; T: steps between drops):

    r = w_c c + w_l R_len + w_f R_fmt
    R_len    closeness to the budget, of one of two shapes:
             triangle  R L/B if L <= B, R (1 - (L - B)/B) if B < L <= 2B, 0 if L > 2B
             band      R if L <= B, the same as the triangle if L > B
    R_fmt    format: a_think 1[think span closed] + a_answer 1[an answer follows it]
    B(t)     max(1, B_0 gamma^floor(t / T)), rounded to whole tokens in the prompt; the four budgets of the paper are 256, 179, 125, 87

Deviations: we did not find the weights of the paper's main run, nor R, a_think and a_answer. The defaults w_c = 0.6 and w_l = 0.3 are those
of an ablation that stresses correctness. The defaults w_f = 0.1, R = 1 and a_think = a_answer = 1/2 are ours (``assumed_...``). A fixed
``budget`` can replace the column ``budget``, for example if rollouts are scored without training.

Units and signs: lengths in tokens; higher is better. R_len does not depend on correctness: a wrong response of length B also earns
w_l R. The triangle penalises short responses. The reward reads B from a column and never computes it from the step, since B has to be the
budget *in the prompt*.
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
PUBLISHED_GAMMA = 0.698  # about (87 / 256)^(1/3), so that three drops end at 87 tokens; 0.7 would end at 88
PUBLISHED_WEIGHTS = (0.6, 0.3)  # w_c and w_l, from an ablation of the paper
assumed_format_weight = 0.1
assumed_most = 1.0  # R
assumed_format_parts = (0.5, 0.5)  # a_think, a_answer

SHAPES = ("triangle", "band")


def budget_at(
    step: int, *, start: Number = PUBLISHED_START, gamma: Number = PUBLISHED_GAMMA, every: int = PUBLISHED_EVERY
) -> float:
    """Return the token budget at an optimizer step of the curriculum, before ``stated_budget`` rounds it for the prompt.

    The budget is ``max(1, start * gamma**k)`` after k drops, and there is one drop after every ``every`` steps.

    >>> [stated_budget(budget_at(step)) for step in (0, 150, 300, 450)]
    [256, 179, 125, 87]

    Args:
        step: Number of optimizer steps done so far.
        start: The first budget, tokens.
        gamma: Factor by which each drop multiplies the budget, below 1.
        every: Optimizer steps between drops.
    """
    return budget_after(step // every, start=start, factor=gamma)


def budget_after(drops: int, *, start: Number, factor: Number) -> float:
    """Return the token budget after a number of drops, ``max(1, start * factor**drops)``, before ``stated_budget`` rounds it.

    Args:
        drops: Number of drops so far.
        start: First budget, tokens.
        factor: Factor by which each drop multiplies the budget.
    """
    return max(1.0, float(start * factor**drops))


def stated_budget(budget: Number) -> int:
    """Return a token budget rounded to a whole number. The prompt states this number."""
    return round(budget)


def budget_stages(start: Number, final: Number, drops: int, steps: int, kind: str = "exponential") -> list[tuple[int, float]]:
    """Return one pair ``(first optimizer step, budget in tokens)`` per stage of a curriculum that lowers the budget in drops.

    There are ``drops + 1`` stages. Their lengths differ by at most one step, and steps count from 0. Budgets are not rounded to whole
    tokens: ``stated_budget`` does that.

    Args:
        start: First budget, tokens.
        final: Last budget, tokens.
        drops: Number of drops, at least 1.
        steps: Optimizer steps of the whole curriculum.
        kind: ``"exponential"``: each drop multiplies the budget by the same factor, ``(final / start)^(1 / drops)``. ``"linear"``: each
            drop changes the budget by the same number of tokens.
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
    """Return the closeness of each response's length to its budget, from 0 to ``most``.

    The closeness is ``most`` at the budget, and falls linearly above it to 0 at twice the budget.

    Args:
        L: Length of each response, tokens.
        budget: Budget of each response, tokens.
        shape: Closeness below the budget. ``"triangle"``: it rises linearly from 0 at length 0; ``"band"``: it is ``most``.
        most: The largest closeness.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r}: choose one of {', '.join(SHAPES)}.")
    below = most * L / budget if shape == "triangle" else np.full(len(L), float(most))
    # Above the budget both shapes fall by most / B per token, to 0 at 2B.
    return np.where(budget >= L, below, most * np.maximum(0.0, 2.0 - L / budget))


@dataclass(frozen=True)
class TrainLongThinkShort:
    """Weighted sum of correctness, closeness of the length to the budget, and format.

    Each of the three is between 0 and 1. The closeness is 1 at the budget; ``length_reward`` has its formula.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[256, 128, 256], budget=256, think_closed=True, formatted=True)
    >>> TrainLongThinkShort()(batch).values.round(2).tolist()
    [1.0, 0.85, 0.4]

    Attributes:
        correctness: Weight of correctness.
        length: Weight of the closeness to the budget.
        format: Weight of the format: half of it is earned by a closed think span, half by an answer after it.
        shape: ``"triangle"``: the closeness falls on both sides of the budget; ``"band"``: it falls only above the budget.
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
        return budget_columns(self.budget) | {"think_closed", "formatted"}

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        length = length_reward(batch["tokens"], row_budgets(batch, self.budget), self.shape)
        think, answer = assumed_format_parts
        form = think * batch["think_closed"] + answer * batch["formatted"]
        return RewardValues.sum(
            correctness=self.correctness * batch["correct"], length=self.length * length, format=self.format * form
        )
