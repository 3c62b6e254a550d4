"""Target lengths of LASER-D and LASER-DE (arXiv:2505.15612): one for easy, one for medium and one for hard problems.

A right response earns the bonus of these rewards if it is at most as long as the target length for its problem's difficulty.

The idea: a length is *sufficient* for a difficulty if a problem of this difficulty can be expected to get at least one response that is
right and no longer than this length. The target length is the least sufficient length, but at most the longest response.

Equations (a: accuracy of a problem, the share of its responses that are right; d: difficulty; *bucket* d: the problems of difficulty d;
l: a candidate length; K: responses per problem; P_{l,d}: share of the responses to the problems of bucket d that have at most l tokens;
|C_d|: least number of right responses, out of K, of a problem in bucket d; ECR: expected number of correct responses of at most l tokens
to a problem; S: sufficient length; L_A: target length; L_T: first candidate length):

    easy a >= 2/3, medium 1/3 <= a < 2/3, hard a < 1/3
    ECR_d(l) = P_{l,d} |C_d|
    S(d)     = least l of {L_T, L_T + 1024, ..., 16384} with ECR_d(l) >= 1; infinity if there is none
    L_A(d)   = min(S(d), length of the longest response of the training batch)

|C_d| is 2K/3 for easy and K/3 for medium problems, rounded to an integer. For hard problems, |C_d| is set to 1. For K = 8, |C_d| is
6, 3, 1 (easy, medium, hard) with ``rounding="ceil"``, as in the paper's text. It is 5, 2, 1 with ``"floor"`` (``SCRIPT_ROUNDING``), as in
the released scripts of LASER-D and LASER-DE.

S(d) is measured on a *monitoring set* of 500 training problems. For each of them K = 8 extra responses are sampled, which are not trained
on. This happens before the first generation and every 20 generations after it. (A generation is one batch of training rollouts, however
many optimizer steps use it.) The trainer of ``toolkit.grpo`` samples the responses and calls ``TargetState.monitor``; until then S(d) is
L_T in every bucket. When a training batch is scored, the bucket of a problem depends on its accuracy in this batch.

Deviations: ``monitor`` may never be called, as in a plain TRL script, or if rollouts are scored without training. Then, once per
``TargetSettings.every`` generations, S(d) is set from the training rollouts of these generations (ours). A bucket without responses keeps
its S(d) (ours; the released code takes the length of the longest response instead).

The bounds on a above hold when a batch is scored. When S(d) is measured, an accuracy of exactly 2/3 counts as medium, and one of exactly
1/3 as hard. The paper does the same: see ``difficulty``.

Units and signs: lengths in tokens. In a run of several processes, give every process the rollouts of all processes.
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
SCRIPT_ROUNDING = "floor"  # released scripts of LASER-D and LASER-DE


@dataclass(frozen=True)
class TargetSettings:
    """Settings for the target lengths of LASER-D and LASER-DE. There is one target length for easy, one for medium, one for hard problems.

    >>> targets = TargetSettings()
    >>> targets.least_right, list(targets.grid)[:3]
    ((6, 3, 1), [4096, 5120, 6144])

    Attributes:
        base: L_T, tokens: the first candidate length, and the target length of every difficulty before the first update.
        step: Distance between candidate lengths, tokens.
        longest: Upper limit of the candidate lengths, tokens.
        every: Number of generations (batches of training rollouts, not optimizer steps) between two updates of the target lengths.
        samples: K, responses per problem of the monitoring set.
        rounding: How 2K/3 and K/3, the least numbers of right responses of an easy and of a medium problem, become integers: ``"ceil"``
            (the paper) or ``"floor"`` (``SCRIPT_ROUNDING``).
        problems: Number of training problems in the monitoring set. If the training set has fewer, all of it is the monitoring set.
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
        """Candidate lengths: ``base, base + step, ...``, at most ``longest``, in tokens."""
        return range(self.base, self.longest + 1, self.step)

    @property
    def least_right(self) -> tuple[int, int, int]:
        """Least number of right responses of an easy, of a medium and of a hard problem, in that order.

        If K is the number of responses per problem (``samples``), these are 2K/3 and K/3, rounded as ``rounding`` says, and 1.
        """
        rounded = math.ceil if self.rounding == "ceil" else math.floor
        return rounded(2 * self.samples / 3), rounded(self.samples / 3), 1

    def expected_right(self, within: Number, bucket: int) -> float:
        """Return the expected number of responses to a problem that are right and at most as long as a candidate length.

        The result is ``within * least_right[bucket]``: the share of responses that are short enough, times the least number of right
        responses of a problem of this difficulty. The candidate length itself is not an argument, because ``within`` depends on it.

        Args:
            within: Share, from 0 to 1, of the responses to problems of this difficulty that are at most as long as the candidate length.
            bucket: Difficulty of the problem, an index in ``BUCKETS``: 0 is easy, 1 medium, 2 hard.
        """
        return float(within * self.least_right[bucket])

    def sufficient_length(self, bucket: int, lengths: Int[ndarray, " responses"]) -> int | None:
        """Return the least sufficient length for problems of one difficulty, in tokens; ``None`` if no candidate length is sufficient.

        A candidate length (one of ``grid``) is sufficient if ``expected_right`` is at least 1 for it: a problem can be expected to get at
        least one response that is right and at most that long.

        Args:
            bucket: Difficulty of the problems, an index in ``BUCKETS``: 0 is easy, 1 medium, 2 hard.
            lengths: Lengths of the responses to problems of this difficulty, tokens; at least one.
        """
        ordered = np.sort(lengths)
        for candidate in self.grid:
            # The tolerance is for rounding errors: in floating point, 1/49 times 49 is a little less than 1.
            if self.expected_right(np.searchsorted(ordered, candidate, side="right") / len(ordered), bucket) >= 1 - 1e-12:
                return candidate
        return None

    def length(self, bucket: int, lengths: Int[ndarray, " responses"], longest: int | None = None) -> int:
        """Return the target length for problems of one difficulty, in tokens.

        It is the least sufficient length (see ``sufficient_length``), or ``longest`` if that is less or if no length is sufficient.

        Args:
            bucket: Difficulty of the problems, an index in ``BUCKETS``: 0 is easy, 1 medium, 2 hard.
            lengths: Lengths of the responses to problems of this difficulty, tokens; at least one.
            longest: Length of the longest response of the training batch, tokens; ``None`` takes the largest of ``lengths``.
        """
        return capped(self.sufficient_length(bucket, lengths), int(np.max(lengths)) if longest is None else longest)


def capped(length: int | None, longest: int) -> int:
    """Return the target length, in tokens: ``length``, or ``longest`` if that is less or if ``length`` is ``None``.

    Args:
        length: The least sufficient length, as ``TargetSettings.sufficient_length`` returns it, tokens; ``None`` if there is none.
        longest: Length of the longest response of the training batch, tokens.
    """
    return longest if length is None else min(length, longest)


class TargetState:
    """The current target lengths of LASER-D, for easy, medium and hard problems, and the data from which the next ones are computed.

    The data are three histograms, one per difficulty. Each counts the lengths of the responses to problems of its difficulty.

    Args:
        targets: Settings of the target lengths.
    """

    def __init__(self, targets: TargetSettings) -> None:
        self.targets = targets
        self._sufficient: list[int | None] = [targets.base] * len(BUCKETS)  # None: no candidate length is sufficient
        self._longest = targets.longest  # longest response of the newest training batch, once there is one
        self._generations = self._set_at = 0  # generations so far, and their number when target lengths were last set
        self._monitored = False  # True once monitor was called
        self._counts: list[Counter[int]] = [Counter() for _ in BUCKETS]  # per bucket: response length -> number of responses

    @property
    def lengths(self) -> list[int]:
        """Target lengths for easy, medium and hard problems, in that order, in tokens.

        No target length is above the length of the longest response of the newest training batch. Before the first batch, no target length
        is above ``TargetSettings.longest``.
        """
        return self.lengths_for(self._longest)

    def lengths_for(self, longest: int) -> list[int]:
        """Return the target lengths for easy, medium and hard problems, in that order, in tokens: each at most ``longest``.

        Args:
            longest: Length of the longest response of the batch that is scored, tokens.
        """
        return [capped(length, longest) for length in self._sufficient]

    @property
    def due(self) -> bool:
        """True if new responses to the monitoring set are needed before the next batch of training rollouts.

        They are needed before the first batch, and then once per ``TargetSettings.every`` batches. A monitoring set consists of training
        problems whose sampled responses measure the policy and are not trained on.
        """
        return not self._monitored or self._generations - self._set_at >= self.targets.every

    def observe(self, batch: RewardBatch) -> None:
        """Update the state with a batch of training rollouts, called a generation.

        This counts the generation and stores the length of its longest response. If ``monitor`` was never called, new target lengths are
        also set, once per ``TargetSettings.every`` generations, from the rollouts of these generations.

        Args:
            batch: The rollouts. Nothing happens if the split of the batch is not ``"train"``.
        """
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
        """Set the target lengths from responses to a monitoring set. From then on, ``observe`` no longer sets them.

        A monitoring set consists of training problems whose sampled responses measure the policy and are not trained on.

        Args:
            batch: Responses to the problems of the monitoring set. ``batch.split`` has no effect here.
        """
        self._monitored = True
        self._counts = [Counter() for _ in BUCKETS]
        self._count(batch)
        self._set()

    def _count(self, batch: RewardBatch) -> None:
        """Add the response lengths of a batch to the histograms, one for each difficulty of the problems."""
        bucket = difficulty(batch, "monitor")
        for d, counts in enumerate(self._counts):
            lengths, times = np.unique(batch["tokens"][bucket == d], return_counts=True)
            counts.update(dict(zip(lengths.tolist(), times.tolist(), strict=True)))

    def _set(self) -> None:
        """Set the least sufficient length for each difficulty from its histogram of response lengths, then clear the histograms.

        If a difficulty has no responses, its sufficient length stays as it was. ``TargetSettings.sufficient_length`` has the rule.
        """
        for d, counts in enumerate(self._counts):
            if counts:
                self._sufficient[d] = self.targets.sufficient_length(d, np.repeat(np.array(list(counts)), list(counts.values())))
        self._counts, self._set_at = [Counter() for _ in BUCKETS], self._generations

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a dict that can be written as JSON.

        The state consists of the target lengths, the histograms of response lengths, and counts of training batches.
        """
        return {
            "enough": list(self._sufficient),
            "longest": self._longest,
            "generations": self._generations,
            "set_at": self._set_at,
            "monitored": self._monitored,
            "seen": [[list(pair) for pair in sorted(counts.items())] for counts in self._counts],
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore the state from ``saved``, the result of ``state_dict``."""
        self._sufficient, self._longest = list(saved["enough"]), saved["longest"]
        self._generations, self._set_at, self._monitored = saved["generations"], saved["set_at"], saved["monitored"]
        self._counts = [Counter({length: times for length, times in pairs}) for pairs in saved["seen"]]


def difficulty(batch: RewardBatch, boundaries: str) -> Int[ndarray, " n"]:
    """Return the difficulty of each row's problem: 0 is easy, 1 medium, 2 hard (index in ``BUCKETS``).

    The difficulty depends on the share of right responses to the problem in this batch. Above 2/3 the problem is easy, between 1/3 and 2/3
    medium, and below 1/3 hard.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=1)
    >>> difficulty(batch, "reward").tolist(), difficulty(batch, "monitor").tolist()
    ([0, 0, 0], [1, 1, 1])

    Args:
        batch: Rollouts.
        boundaries: The rule for shares of exactly 2/3 and 1/3. ``"reward"``, used to score a batch: 2/3 is easy and 1/3 is medium.
            ``"monitor"``, used to set target lengths: 2/3 is medium and 1/3 is hard.
    """
    if boundaries not in ("reward", "monitor"):
        raise ValueError(f"boundaries={boundaries!r}: choose reward or monitor.")
    g = batch.groups
    right, n = groups.count(g, batch["correct"].astype(bool)), groups.count(g)
    # Integer arithmetic, so that exactly 1/3 and 2/3 fall on the right side.
    # Pair: rows of easy problems, and rows of easy or medium problems.
    above = (3 * right >= 2 * n, 3 * right >= n) if boundaries == "reward" else (3 * right > 2 * n, 3 * right > n)
    return np.where(above[0], 0, np.where(above[1], 1, 2))
