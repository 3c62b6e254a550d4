"""The target lengths of LASER-D and -DE: how long a response of each difficulty may be, arXiv:2505.15612.

Equations (bucket d of problems, by their share of right answers a):

    easy a >= 2/3, medium 1/3 <= a < 2/3, hard a < 1/3
    ECR_d(l) = P_{l,d} |C_d|       P: share of all responses of the bucket with L <= l
    L_A(d)   = least l of {L_T, L_T + 1024, ..., 16384} with ECR_d(l) >= 1

|C_d| is the least number of right responses that a problem of the bucket has among K: 6, 3, 1 for K = 8.

Deviations: the paper samples K = 8 responses to 500 problems every 20 steps; :meth:`TargetState.monitor` takes such a batch.
Without one the training rollouts of the last ``every`` steps serve (ours, at no extra sampling). A bucket without responses keeps
its length (ours). ``rounding="floor"`` is the released script's other form: |C_d| = 5, 2, 1, whole expected responses, and a grid
length is taken only below the longest response, which is what it falls back to. The paper's monitor sets the boundaries of its
buckets a hair differently from its reward (exactly 1/3 and 2/3); both are kept.

Units and signs: tokens. In several processes every one of them is given the rollouts of all.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from toolkit.rewards import groups
from toolkit.rewards.batch import RewardBatch
from toolkit.stats import Number

BUCKETS = ("easy", "medium", "hard")


@dataclass(frozen=True)
class Targets:
    """How target lengths are set.

    Attributes:
        base: L_T, tokens: what every bucket starts with, and the first of the grid.
        step: Between lengths of the grid, tokens.
        longest: Last of the grid, tokens; what a bucket gets when no length is enough.
        every: Optimizer steps between settings.
        samples: K, responses a problem.
        rounding: ``"ceil"`` (the paper) or ``"floor"`` (the released script's other form).
    """

    base: int = 4096
    step: int = 1024
    longest: int = 16384
    every: int = 20
    samples: int = 8
    rounding: str = "ceil"

    def __post_init__(self) -> None:
        if not 0 < self.base <= self.longest or min(self.step, self.every, self.samples) < 1:
            raise ValueError(f"{self}: need 0 < base <= longest, and step, every and samples of at least 1.")
        if self.rounding not in ("ceil", "floor"):
            raise ValueError(f"rounding={self.rounding!r}: choose ceil or floor.")

    @property
    def grid(self) -> range:
        """Lengths to choose from, tokens."""
        return range(self.base, self.longest + 1, self.step)

    @property
    def least_right(self) -> tuple[int, int, int]:
        """|C_d| of easy, medium and hard problems."""
        rounded = math.ceil if self.rounding == "ceil" else math.floor
        return rounded(2 * self.samples / 3), rounded(self.samples / 3), 1

    def expected_right(self, within: Number, bucket: int) -> float:
        """ECR: right responses to expect within a length that a share of the bucket's responses does not exceed."""
        return float(within * self.least_right[bucket])

    def length(self, bucket: int, lengths: Int[ndarray, " responses"]) -> int:
        """L_A of a bucket whose responses have these lengths, one or more."""
        ordered = np.sort(lengths)
        longest = int(ordered[-1])
        for candidate in self.grid:
            expected = self.expected_right(np.searchsorted(ordered, candidate, side="right") / len(ordered), bucket)
            if self.rounding == "floor" and candidate >= longest:
                return longest
            if expected >= 1 - 1e-12:  # a sixth, six times
                return candidate
        return self.longest if self.rounding == "ceil" else longest


class TargetState:
    """The lengths now, and the responses seen since they were set.

    Attributes:
        lengths: L_A of easy, medium and hard problems, tokens.
    """

    def __init__(self, targets: Targets) -> None:
        self.targets = targets
        self.lengths: list[int] = [targets.base] * len(BUCKETS)
        self._set_at = 0
        self._counts: list[Counter[int]] = [Counter() for _ in BUCKETS]

    def seen(self, batch: RewardBatch) -> None:
        """Take a batch of training rollouts into account; every ``targets.every`` steps the lengths are set anew."""
        if batch.split != "train":
            return
        self._count(batch)
        if batch.step + 1 - self._set_at >= self.targets.every:
            self._set(batch.step + 1)

    def monitor(self, batch: RewardBatch) -> None:
        """Set the lengths from responses to a monitoring set, as in the paper, whatever their split; forget training rollouts."""
        self._counts = [Counter() for _ in BUCKETS]
        self._count(batch)
        self._set(batch.step)

    def _count(self, batch: RewardBatch) -> None:
        bucket = difficulty(batch, "monitor")
        for d, counts in enumerate(self._counts):
            lengths, times = np.unique(batch["tokens"][bucket == d], return_counts=True)
            counts.update(dict(zip(lengths.tolist(), times.tolist(), strict=True)))

    def _set(self, step: int) -> None:
        for d, counts in enumerate(self._counts):
            if counts:
                self.lengths[d] = self.targets.length(d, np.repeat(np.array(list(counts)), list(counts.values())))
        self._counts, self._set_at = [Counter() for _ in BUCKETS], step

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON."""
        seen = [sorted(counts.items()) for counts in self._counts]
        return {"lengths": list(self.lengths), "set_at": self._set_at, "seen": [[list(pair) for pair in pairs] for pairs in seen]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.lengths, self._set_at = list(saved["lengths"]), saved["set_at"]
        self._counts = [Counter({length: times for length, times in pairs}) for pairs in saved["seen"]]


def difficulty(batch: RewardBatch, boundaries: str) -> Int[ndarray, " n"]:
    """Bucket of each row's problem (index in ``BUCKETS``), by the right answers of its group in the batch.

    Args:
        boundaries: ``"reward"``: exactly 2/3 is easy and exactly 1/3 medium; ``"monitor"``: one bucket harder each.
    """
    if boundaries not in ("reward", "monitor"):
        raise ValueError(f"boundaries={boundaries!r}: choose reward or monitor.")
    g = batch.groups
    right, n = groups.count(g, batch["correct"].astype(bool)), groups.count(g)
    # In whole numbers, so that exactly 1/3 and 2/3 are on the side they belong to.
    above = (3 * right >= 2 * n, 3 * right >= n) if boundaries == "reward" else (3 * right > 2 * n, 3 * right > n)
    return np.where(above[0], 0, np.where(above[1], 1, 2))
