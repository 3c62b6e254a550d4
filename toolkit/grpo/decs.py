"""DECS: decoupled rewards and curriculum data scheduling, arXiv:2509.25827; released code pixas/DECS. Token-level advantages.

Only tokens after the first right answer in the thinking are charged for length. The others have the reward of their response.

Equations of the code (s: score of the response, 1 if right, else 0; b: bonus; L: length; Lmax: length limit; j: token position; G: rollouts
of the group)::

    r_ij = s_i + b (1 - L_i / Lmax)         tokens of right responses from after the first right answer to the end of the thinking
    r_ij = s_i (1 + b)                      all other tokens, also beyond the end of the response
    A_ij = (r_ij - mean_j) / (std_j + 1e-6)

``mean_j`` and ``std_j`` are over the G rollouts at position j, with Bessel's correction. For a group of one they are 0 and 1.

Deviations: the paper's notes have another sign and range for the charged tokens; we follow the code. The code finds the first right answer
with a trained judge, chunk by chunk. ``redundant.redundant_span`` compares the results of lines with the right answer; see there. The curriculum, which
adds all-correct problems to the batch, is left out.

Units and signs: lengths and positions in tokens; a higher reward or advantage makes a token likelier.

Cost: one decoding of each thinking span per step of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from toolkit.types import Span

PUBLISHED_BONUS, PUBLISHED_EPSILON = 0.1, 1e-6


@dataclass(frozen=True)
class DECS:
    """Settings of the token-level advantages of DECS (arXiv:2509.25827).

    Attributes:
        bonus: b, the largest bonus of a token.
        longest: Lmax, the length limit, tokens; ``None`` means the run's token limit (``max_completion_length``).
    """

    bonus: float = PUBLISHED_BONUS
    longest: int | None = None

    def __post_init__(self) -> None:
        if self.bonus <= 0 or (self.longest is not None and self.longest <= 0):
            raise ValueError(f"{self}: give a bonus and a length above 0.")


def token_rewards(
    correct: Bool[ndarray, " n"], tokens: Int[ndarray, " n"], spans: Sequence[Span | None], width: int, bonus: float, longest: int
) -> Float[ndarray, "n width"]:
    """Return the reward of every token, also of positions beyond the end of a response.

    >>> token_rewards(np.array([True]), np.array([5]), [Span(2, 4)], width=6, bonus=0.1, longest=10).round(2).tolist()
    [[1.1, 1.1, 1.05, 1.05, 1.1, 1.1]]

    Args:
        correct: True for right responses.
        tokens: Length of each response.
        spans: Charged tokens of each response, as positions in the response; ``None`` if there are none. Ignored for wrong responses.
        width: Number of positions.
        bonus: b.
        longest: Lmax.
    """
    scores = correct.astype(float)
    rewards = np.repeat((scores * (1 + bonus))[:, None], width, axis=1)
    for i in np.flatnonzero(correct):
        if (span := spans[int(i)]) is not None:
            rewards[i, span.start : span.stop] = scores[i] + bonus * (1 - tokens[i] / longest)
    return rewards


def token_advantages(rewards: Float[ndarray, "n width"], groups: Int[ndarray, " n"]) -> Float[ndarray, "n width"]:
    """Return the advantage of every token: its reward relative to the rewards of the group at the same position.

    >>> token_advantages(np.array([[1.0, 1.0], [0.0, 1.0]]), np.array([0, 0])).round(3).tolist()
    [[0.707, 0.0], [-0.707, 0.0]]

    Args:
        rewards: Reward of every token.
        groups: Group of each rollout, as an integer.
    """
    advantages = np.empty_like(rewards)
    for group in np.unique(groups):
        rows = groups == group
        part = rewards[rows]
        if len(part) == 1:
            advantages[rows] = part / (1 + PUBLISHED_EPSILON)
            continue
        # Rounding, as in ``advantages.group_std``: equal rewards must not get a tiny standard deviation.
        std = part.std(axis=0, ddof=1).round(12)
        advantages[rows] = np.where(std > 0, part - part.mean(axis=0), 0.0) / (std + PUBLISHED_EPSILON)
    return advantages
