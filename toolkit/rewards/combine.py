"""Rewards made of rewards: weighted sums, gates, schedules, and means of normalised advantages.

Equations:

    WeightedSum        r = sum_k w_k(t) r_k
    Gated              r = inner * product of gates
    MeanOfAdvantages   A = sum_k w_k z_k / sum_k w_k,   z_k = (r_k - mean_g) / (std_g + eps)     LongWriter-Zero, arXiv:2506.18841

In a sum the part with the largest spread decides; in a mean of advantages every part has a say, whatever its scale. Its values
*are* advantages: train on them without normalising again (``scale_rewards="none"``).

Deviations: the mean of advantages divides by the population deviation; a part that does not vary in a group adds 0 there.

Each of them is a reward like another, with the states and the monitoring sets of its parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit.rewards import groups
from toolkit.rewards.batch import (
    Reward,
    RewardBatch,
    RewardValues,
    load_state_by_name,
    monitor_parts,
    monitoring_size,
    state_by_name,
)
from toolkit.stats import Number

Weight = float | int | Callable[[int], float]
"""A weight, or a function of the optimizer step."""


@dataclass(frozen=True)
class Schedule:
    """A weight that goes from one value to another between two steps.

    Attributes:
        kind: ``"linear"``, ``"cosine"`` (slow, fast, slow), or ``"step"`` (at ``last``).
    """

    start: Number
    end: Number
    first: int
    last: int
    kind: str = "linear"

    def __post_init__(self) -> None:
        if self.last <= self.first:
            raise ValueError(f"first={self.first}, last={self.last}: a schedule ends after it begins.")
        if self.kind not in ("linear", "cosine", "step"):
            raise ValueError(f"kind={self.kind!r}: choose linear, cosine or step.")

    def __call__(self, step: int) -> float:
        """The weight at a step."""
        x = min(1.0, max(0.0, (step - self.first) / (self.last - self.first)))
        if self.kind == "cosine":
            x = (1 - math.cos(math.pi * x)) / 2
        elif self.kind == "step":
            x = float(x >= 1)
        return float(self.start + (self.end - self.start) * x)


@dataclass(frozen=True)
class WeightedSum:
    """``sum_k w_k(t) r_k``; components are named ``reward.component``.

    Attributes:
        parts: ``(weight, reward)``; names must differ.
    """

    parts: tuple[tuple[Weight, Reward], ...]

    def __post_init__(self) -> None:
        check_names([reward for _, reward in self.parts])

    @property
    def name(self) -> str:
        return " + ".join(f"{'w(t)' if callable(w) else format(w, 'g')} {r.name}" for w, r in self.parts)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(r.needs for _, r in self.parts))

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        found: dict[str, np.ndarray] = {}
        for weight, reward in self.parts:
            w = weight(batch.step) if callable(weight) else weight
            found |= {f"{reward.name}.{name}": w * values for name, values in reward(batch).components.items()}
        return RewardValues.sum(**found)

    def state_dict(self) -> dict[str, Any]:
        """States of the stateful parts, by name."""
        return state_by_name([r for _, r in self.parts])

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        load_state_by_name([r for _, r in self.parts], saved)

    def monitoring(self) -> tuple[int, int] | None:
        """Problems and samples of the monitoring set that a part wants to see now."""
        return monitoring_size([r for _, r in self.parts])

    def monitor(self, batch: RewardBatch) -> None:
        """Show a monitoring set to the parts that want one now."""
        monitor_parts([r for _, r in self.parts], batch)


@dataclass(frozen=True)
class Gated:
    """``inner * gate * ...``: paid only as far as every gate lets it; each component of the inner reward is multiplied.

    Attributes:
        inner: What is paid.
        gates: Rewards with values in [0, 1], such as ``Correctness``, ``Format``, ``repetition.Distinct``.
    """

    inner: Reward
    gates: tuple[Reward, ...]

    def __post_init__(self) -> None:
        check_names([self.inner, *self.gates])

    @property
    def name(self) -> str:
        return " x ".join(r.name for r in (self.inner, *self.gates))

    @property
    def needs(self) -> frozenset[str]:
        return self.inner.needs.union(*(g.needs for g in self.gates))

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        through = np.prod([gate(batch).values for gate in self.gates], axis=0)
        return RewardValues.sum(**{name: values * through for name, values in self.inner(batch).components.items()})

    def state_dict(self) -> dict[str, Any]:
        """States of the stateful parts, by name."""
        return state_by_name([self.inner, *self.gates])

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        load_state_by_name([self.inner, *self.gates], saved)

    def monitoring(self) -> tuple[int, int] | None:
        """Problems and samples of the monitoring set that a part wants to see now."""
        return monitoring_size([self.inner, *self.gates])

    def monitor(self, batch: RewardBatch) -> None:
        """Show a monitoring set to the parts that want one now."""
        monitor_parts([self.inner, *self.gates], batch)


@dataclass(frozen=True)
class MeanOfAdvantages:
    """Weighted mean of the group-normalised rewards.

    Attributes:
        parts: ``(weight, reward)``; names must differ.
        epsilon: Added to each deviation.
    """

    parts: tuple[tuple[Number, Reward], ...]
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        check_names([reward for _, reward in self.parts])
        if any(w < 0 for w, _ in self.parts) or not sum(w for w, _ in self.parts) > 0:
            raise ValueError(f"Weights {[w for w, _ in self.parts]}: none may be negative, and one must be positive.")

    @property
    def name(self) -> str:
        return f"mean of advantages({', '.join(r.name for _, r in self.parts)})"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(r.needs for _, r in self.parts))

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        total = sum(w for w, _ in self.parts)
        return RewardValues.sum(
            **{r.name: w / total * advantage(r(batch).values, batch.groups, self.epsilon) for w, r in self.parts}
        )

    def state_dict(self) -> dict[str, Any]:
        """States of the stateful parts, by name."""
        return state_by_name([r for _, r in self.parts])

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        load_state_by_name([r for _, r in self.parts], saved)

    def monitoring(self) -> tuple[int, int] | None:
        """Problems and samples of the monitoring set that a part wants to see now."""
        return monitoring_size([r for _, r in self.parts])

    def monitor(self, batch: RewardBatch) -> None:
        """Show a monitoring set to the parts that want one now."""
        monitor_parts([r for _, r in self.parts], batch)


def advantage(values: groups.Values, of: groups.Groups, epsilon: float = 1e-6) -> groups.Values:
    """``(r - mean_g) / (std_g + epsilon)`` with the population deviation; 0 where a group does not vary."""
    centred = values - groups.mean(values, of)
    varies = groups.highest(values, of) > groups.lowest(values, of)
    return np.where(varies, centred / (np.sqrt(groups.mean(np.square(centred), of)) + epsilon), 0.0)


def check_names(parts: list[Reward]) -> None:
    """Raise ValueError without parts, or if two have one name: their components and states could not be told apart."""
    names = [r.name for r in parts]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Parts named {names}: give at least one, with names that differ.")
