"""ReNorm of PPR (principle process reward), arXiv:2509.25598.

Equation (r_p in [0, 1]: process score of a step or response; r_o in {0, 1}: the outcome):

    r = r_p + r_o - 1

The reward is never negative if the outcome is right, and never positive if it is wrong.

Deviations: we reconstructed the formula from reviews. The reward ``ReNorm`` has one r_p per response; ``renorm`` also takes
steps.

Units and signs: higher is better. A constant shift cancels in any advantage; the effect comes from adding r_p and r_o.
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
    """Return ``r_p + r_o - 1`` of each step (or response).

    >>> renorm(np.array([0.25, 0.75]), np.array([1, 0])).tolist()
    [0.25, -0.25]

    Raises:
        ValueError: A score is outside [0, 1].
    """
    p, o = np.asarray(process, float), np.asarray(outcome, float)
    for name, values in (("process", p), ("outcome", o)):
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"A {name} score of {values[~((values >= 0) & (values <= 1))][0]}: scores are between 0 and 1.")
    return p + o - 1.0


@dataclass(frozen=True)
class ReNorm:
    """A process reward in [0, 1], combined with correctness.

    >>> from toolkit.rewards.longwriter import LongWriter
    >>> batch = RewardBatch.from_columns(correct=[1, 0], tokens=[50, 50])
    >>> ReNorm(LongWriter(low=100, high=200, longest=400))(batch).values.tolist()
    [0.5, -0.5]

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
        total = renorm(self.process(batch).values, c)
        return RewardValues.sum(process=total - (c - 1.0), outcome=c - 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the process reward, by name, as JSON."""
        return state_by_name([self.process])

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore the state that ``state_dict`` returned."""
        load_state_by_name([self.process], saved)

    def monitoring(self) -> tuple[int, int] | None:
        """Return ``(problems, samples)`` of the monitoring set that the process reward needs now, or ``None``."""
        return monitoring_size([self.process])

    def monitor(self, batch: RewardBatch) -> None:
        """Pass responses to a monitoring set to the process reward if it needs them now."""
        monitor_parts([self.process], batch)
