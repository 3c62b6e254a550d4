"""The target lengths of LASER-D and -DE: how long a response of each difficulty may be, arXiv:2505.15612.

Equations (bucket d of problems, by their share of right answers a):

    easy a >= 2/3, medium 1/3 <= a < 2/3, hard a < 1/3
    ECR_d(l) = P_{l,d} |C_d|       P: share of all responses of the bucket with L <= l
    L_A(d)   = least l of {L_T, L_T + 1024, ..., 16384} with ECR_d(l) >= 1 that is below the longest response of the training batch;
               without one, that longest response

|C_d| is the least number of right responses that a problem of the bucket has among K: 6, 3, 1 for K = 8.

K = 8 responses to 500 training problems are drawn before the first generation and every 20 generations from then on (a step of
the released trainer is a generation, whatever number of updates it serves). The trainer of ``toolkit.grpo`` draws them and calls
:meth:`TargetState.monitor`; until then every bucket has L_T.

``rounding="floor"`` takes |C_d| = 5, 2, 1: the released scripts of LASER-D and -DE run with it (``SCRIPT_ROUNDING``), the paper's
text has ``"ceil"``.

Deviations: where nobody calls ``monitor`` (a plain TRL script, an offline question) the training rollouts of the last ``every``
generations serve, from generation ``every`` on (ours). A bucket without responses keeps its length (ours; the released code falls
back to the longest response). The paper's monitor sets the boundaries of its buckets a hair differently from its reward (exactly
1/3 and 2/3); both are kept.

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
SCRIPT_ROUNDING = "floor"  # of the released scripts of LASER-D and -DE


@dataclass(frozen=True)
class TargetSettings:
    """How target lengths are set.

    Attributes:
        base: L_T, tokens: what every bucket starts with, and the first of the grid.
        step: Between lengths of the grid, tokens.
        longest: Last of the grid, tokens.
        every: Generations between settings: batches of training rollouts, not optimizer steps.
        samples: K, responses per problem.
        rounding: ``"ceil"`` (the paper) or ``"floor"`` (``SCRIPT_ROUNDING``).
        problems: Size of the monitoring set, which is drawn from the training problems; fewer if there are fewer.
    """

    base: int = 4096
    step: int = 1024
    longest: int = 16384
    every: int = 20
    samples: int = 8
    rounding: str = "ceil"
    problems: int = 500

    def __post_init__(self) -> None:
        if not 0 < self.base <= self.longest or min(self.step, self.every, self.samples, self.problems) < 1:
            raise ValueError(f"{self}: need 0 < base <= longest, and step, every, samples and problems of at least 1.")
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

    def sufficient_length(self, bucket: int, lengths: Int[ndarray, " responses"]) -> int | None:
        """Least length of the grid with ECR >= 1, where a bucket's responses have these lengths, one or more; ``None`` if none has."""
        ordered = np.sort(lengths)
        for candidate in self.grid:
            # A sixth, six times, is a little less than 1.
            if self.expected_right(np.searchsorted(ordered, candidate, side="right") / len(ordered), bucket) >= 1 - 1e-12:
                return candidate
        return None

    def length(self, bucket: int, lengths: Int[ndarray, " responses"], longest: int | None = None) -> int:
        """L_A of a bucket whose responses have these lengths, one or more.

        Args:
            longest: Longest response of the training batch, tokens; by default that of ``lengths``.
        """
        return capped(self.sufficient_length(bucket, lengths), int(np.max(lengths)) if longest is None else longest)


def capped(enough: int | None, longest: int) -> int:
    """L_A from the least length of the grid that is enough: never more than the longest response of the training batch."""
    return longest if enough is None else min(enough, longest)


class TargetState:
    """The lengths now, and the responses seen since they were set."""

    def __init__(self, targets: TargetSettings) -> None:
        self.targets = targets
        self._enough: list[int | None] = [targets.base] * len(BUCKETS)
        self._longest = targets.longest
        self._generations = self._set_at = 0
        self._monitored = False
        self._counts: list[Counter[int]] = [Counter() for _ in BUCKETS]

    @property
    def lengths(self) -> list[int]:
        """L_A of easy, medium and hard problems in the newest training batch, tokens."""
        return self.lengths_for(self._longest)

    def lengths_for(self, longest: int) -> list[int]:
        """L_A of easy, medium and hard problems in a batch whose longest response has so many tokens."""
        return [capped(enough, longest) for enough in self._enough]

    @property
    def due(self) -> bool:
        """Whether new responses to the monitoring set are due before the next generation."""
        return not self._monitored or self._generations - self._set_at >= self.targets.every

    def observe(self, batch: RewardBatch) -> None:
        """Take a generation into account: a batch of training rollouts. Without a monitoring set they set the lengths."""
        if batch.split != "train":
            return
        self._generations += 1
        self._longest = int(batch["tokens"].max(initial=0))
        if self._monitored:
            return
        self._count(batch)
        if self._generations - self._set_at >= self.targets.every:
            self._set()

    def monitor(self, batch: RewardBatch) -> None:
        """Set the lengths from responses to a monitoring set, whatever their split; from now on training rollouts set none."""
        self._monitored = True
        self._counts = [Counter() for _ in BUCKETS]
        self._count(batch)
        self._set()

    def _count(self, batch: RewardBatch) -> None:
        bucket = difficulty(batch, "monitor")
        for d, counts in enumerate(self._counts):
            lengths, times = np.unique(batch["tokens"][bucket == d], return_counts=True)
            counts.update(dict(zip(lengths.tolist(), times.tolist(), strict=True)))

    def _set(self) -> None:
        for d, counts in enumerate(self._counts):
            if counts:
                self._enough[d] = self.targets.sufficient_length(d, np.repeat(np.array(list(counts)), list(counts.values())))
        self._counts, self._set_at = [Counter() for _ in BUCKETS], self._generations

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON."""
        return {
            "enough": list(self._enough),
            "longest": self._longest,
            "generations": self._generations,
            "set_at": self._set_at,
            "monitored": self._monitored,
            "seen": [[list(pair) for pair in sorted(counts.items())] for counts in self._counts],
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._enough, self._longest = list(saved["enough"]), saved["longest"]
        self._generations, self._set_at, self._monitored = saved["generations"], saved["set_at"], saved["monitored"]
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
