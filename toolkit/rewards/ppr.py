"""PPR, principle process reward, and ReNorm, arXiv:2509.25598.

Equation (r_p in [0, 1]: how good a step or response is by its process; r_o in {0, 1}: the outcome):

    r = r_p + r_o - 1

so that nothing is paid below 0 when the outcome is right, nor above 0 when it is wrong.

Deviations: the formula is put together from reviews. As a reward (:class:`ReNorm`) r_p is one number a response; :func:`renorm`
also takes steps.

Units and signs: + is paid. A constant shift drops out of any advantage; what counts is that r_p and r_o are tied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from toolkit.rewards.batch import (
    Reward,
    RewardBatch,
    RewardValues,
    load_state_by_name,
    monitor_parts,
    monitoring_size,
    state_by_name,
)


def renorm(process: ndarray, outcome: ndarray) -> Float[ndarray, " steps"]:
    """``r_p + r_o - 1`` of each step (or response). Raises ValueError for scores outside [0, 1]."""
    p, o = np.asarray(process, float), np.asarray(outcome, float)
    for what, values in (("process", p), ("outcome", o)):
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"A {what} score of {values[~((values >= 0) & (values <= 1))][0]}: scores are between 0 and 1.")
    return p + o - 1.0


@dataclass(frozen=True)
class ReNorm:
    """A process reward in [0, 1] tied to correctness.

    Attributes:
        process: Any reward with values in [0, 1].
    """

    process: Reward

    @property
    def name(self) -> str:
        return f"renorm({self.process.name})"

    @property
    def needs(self) -> frozenset[str]:
        return self.process.needs | {"correct"}

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        c = batch["correct"].astype(float)
        tied = renorm(self.process(batch).values, c)
        return RewardValues.sum(process=tied - (c - 1.0), outcome=c - 1.0)

    def state_dict(self) -> dict[str, Any]:
        """State of the process reward."""
        return state_by_name([self.process])

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        load_state_by_name([self.process], saved)

    def monitoring(self) -> tuple[int, int] | None:
        """Problems and samples of the monitoring set that the process reward wants to see now."""
        return monitoring_size([self.process])

    def monitor(self, batch: RewardBatch) -> None:
        """Show the process reward a monitoring set."""
        monitor_parts([self.process], batch)
