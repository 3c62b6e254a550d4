"""DOT: dynamic outlier truncation, arXiv:2601.03969; released code U-rara/DOT.

Equations (mean, std: of the lengths L of the responses to a problem, its group, std with Bessel's correction; rho: share of right responses
of the group; all lengths in tokens):

    T = floor(mean + alpha std)              in groups with rho >= least
    a response is cut at T if L - T >= m     m = margin, or max(16, margin L) if margin < 1
    r = 0 if it is cut, else correctness

Only outliers in groups that are all right lose their reward; length costs nothing otherwise.

Deviations: the code cuts the response at T, grades the rest again, and leaves the tokens after T out of the loss. Here a cut response
counts as wrong (``assumed_lost``), since its answer stands at the end, and all its tokens stay in the loss.

Units and signs: lengths in tokens; higher is better. In a sample of G lengths, no length is more than (G - 1) / sqrt(G) standard deviations
above the mean. With the published alpha of 3, nothing is cut for G up to 10: see ``can_fire``. The trainer then says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from toolkit.rewards import groups
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

PUBLISHED_ALPHA, PUBLISHED_MARGIN, PUBLISHED_LEAST = 3, 32, 1.0
LEAST_TOKENS = 16  # least margin in tokens if the margin is a share of the length (code)


def can_fire(samples: int, alpha: Number) -> bool:
    """Return True if some response in a group of ``samples`` responses can be longer than mean + alpha std.

    >>> can_fire(10, 3), can_fire(11, 3)
    (False, True)
    """
    return samples > 1 and (samples - 1) / math.sqrt(samples) > alpha


@dataclass(frozen=True)
class DOT:
    """Correctness, except that a response which is much longer than the others to the same problem earns 0, if all of them are right.

    >>> batch = RewardBatch.from_columns(correct=[1] * 5, tokens=[20, 20, 20, 20, 200])
    >>> DOT(alpha=1.5, margin=8)(batch).values.tolist()
    [1.0, 1.0, 1.0, 1.0, 0.0]

    Attributes:
        alpha: Standard deviations above the mean length at which an outlier begins.
        margin: m, tokens by which an outlier must exceed this length; below 1, the share of its own length, at least 16 tokens.
        least: Least share of right responses in a group with outliers, 0 to 1.
        assumed_lost: Reward of a right response that is cut. Ours.
    """

    alpha: Number = PUBLISHED_ALPHA
    margin: Number = PUBLISHED_MARGIN
    least: Number = PUBLISHED_LEAST
    assumed_lost: Number = 0.0

    name: ClassVar[str] = "dot"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens"})

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.margin <= 0 or not 0 <= self.least <= 1:
            raise ValueError(f"{self}: need alpha of at least 0, a margin above 0, and least from 0 to 1.")

    def warning(self, samples: int) -> str | None:
        """Return a sentence if no response can ever be cut in groups of ``samples`` responses, else ``None``."""
        if can_fire(samples, self.alpha):
            return None
        most = (samples - 1) / math.sqrt(samples)
        return (
            f"dot cuts nothing: of {samples} lengths, none is more than {most:.2f} standard deviations above the mean, and alpha is "
            f"{self.alpha}. Sample more responses, or lower reward.alpha."
        )

    def limits(self, batch: RewardBatch) -> Float[ndarray, " n"]:
        """Return T for each response, ``[n]``, in tokens; infinity in groups with too few right responses."""
        tokens, g = batch["tokens"].astype(float), batch.groups
        n, average = groups.count(g), groups.mean(tokens, g)
        std = np.sqrt(groups.mean(np.square(tokens - average), g) * n / np.maximum(n - 1, 1))
        # Rounding must not lower a whole number: 30 may be computed as 29.999999999999996.
        limit = np.floor(average + self.alpha * std + 1e-9)
        return np.where(groups.mean(batch["correct"], g) >= self.least - 1e-9, limit, np.inf)

    def cut(self, batch: RewardBatch) -> Bool[ndarray, " n"]:
        """Return a mask ``[n]``, True for the responses that are cut."""
        tokens = batch["tokens"].astype(float)
        margin = np.maximum(LEAST_TOKENS, self.margin * tokens) if self.margin < 1 else self.margin
        return tokens - self.limits(batch) >= margin

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        c = batch["correct"].astype(float)
        return RewardValues.sum(correctness=c, truncation=np.where(self.cut(batch), (self.assumed_lost - 1) * c, 0.0))
