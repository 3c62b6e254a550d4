"""Correctness, the outcome reward every other is measured against, and the naive length penalty it is often given (ours).

Equations:

    correctness       r = c
    length penalty    r = c - alpha L / L_max        for every response, right or wrong

The naive penalty is here to be compared with: it pays a wrong answer for being short too, and has no notion of how hard a problem is,
so on problems that the model gets wrong the only gradient is towards shorter wrong answers.

Deviations: none; there is no paper. Units and signs: L in tokens, + is paid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from toolkit.rewards.batch import RewardBatch, Scored


@dataclass(frozen=True)
class Correctness:
    """1 for a right answer, 0 for a wrong one."""

    name: ClassVar[str] = "correctness"
    needs: ClassVar[frozenset[str]] = frozenset({"correct"})

    def __call__(self, batch: RewardBatch) -> Scored:
        batch.check(self)
        return Scored.sum(correctness=batch["correct"].astype(np.float64))
