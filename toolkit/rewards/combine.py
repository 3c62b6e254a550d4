"""Rewards that combine other rewards: a weighted sum, a product with gates, a mean of advantages. Also schedules for the weights.

Equations (r_k: the k-th of the combined rewards, called parts; w_k: its weight; t: optimizer step; mean_g, std_g: mean and standard
deviation of r_k in a group, the responses to one problem; r_inner: any reward; g_k: a gate, a reward with values in [0, 1]; eps: a small
constant):

    WeightedSum        r = sum_k w_k(t) r_k
    Gated              r = r_inner g_1 g_2 ...
    MeanOfAdvantages   A = sum_k w_k z_k / sum_k w_k,   z_k = (r_k - mean_g) / (std_g + eps)     LongWriter-Zero, arXiv:2506.18841

In a weighted sum, the part whose values differ most within a group dominates the advantages. In a mean of advantages the scale of a part
has no effect. The values of ``MeanOfAdvantages`` *are* advantages: train on them without normalising again (TRL's
``scale_rewards="none"``).

Our choices: std_g is the population standard deviation, and z_k is 0 in a group in which r_k does not vary.

Each combination is itself a reward. It saves and restores the states of its parts. If a part needs a *monitoring set* (training problems
whose sampled responses measure the policy and are not trained on: see ``batch``), the combination requests the set, and passes the
responses to that part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit.rewards import groups
from toolkit.rewards.batch import (
    Reward,
    RewardBatch,
    RewardValues,
    has_state_by_problem,
    load_state_by_name,
    monitor_parts,
    monitoring_size,
    state_by_name,
)
from toolkit.stats import Number

Weight = float | int | Callable[[int], float]
"""A fixed weight, or a function from optimizer step to weight."""


@dataclass(frozen=True)
class Schedule:
    """A weight that changes from ``start`` to ``end`` between the optimizer steps ``first`` and ``last``, and is constant before and after.

    >>> Schedule(0.5, 0.0, first=0, last=100)(50)
    0.25

    Attributes:
        start: Weight up to step ``first``.
        end: Weight from step ``last`` on.
        first: Optimizer step at which the change begins, counted from 0. It has no effect if ``kind`` is ``"step"``.
        last: Optimizer step at which the change ends.
        kind: Shape of the change: ``"linear"``, ``"cosine"`` (slow at both ends), or ``"step"`` (a jump from ``start`` to ``end`` at step
            ``last``).
    """

    start: Number
    end: Number
    first: int
    last: int
    kind: str = "linear"

    def __post_init__(self) -> None:
        if self.last <= self.first:
            raise ValueError(f"first={self.first}, last={self.last}: a schedule has to end after it begins, last > first.")
        if self.kind not in ("linear", "cosine", "step"):
            raise ValueError(f"kind={self.kind!r}: choose linear, cosine or step.")

    def __call__(self, step: int) -> float:
        """Return the weight at ``step``, the number of optimizer steps done so far."""
        # x: share of the change that is done, from 0 at step first to 1 at step last.
        x = min(1.0, max(0.0, (step - self.first) / (self.last - self.first)))
        if self.kind == "cosine":
            x = (1 - math.cos(math.pi * x)) / 2
        elif self.kind == "step":
            x = float(x >= 1)
        return float(self.start + (self.end - self.start) * x)


class Combined:
    """A reward that is made of others, ``rewards``: it saves and restores their states, and passes monitoring sets on to them."""

    @property
    def rewards(self) -> tuple[Reward, ...]:
        """The rewards of which this one is made."""
        raise NotImplementedError

    @property
    def needs(self) -> frozenset[str]:
        """Columns that the rewards need."""
        return frozenset().union(*(r.needs for r in self.rewards))

    @property
    def state_by_problem(self) -> bool:
        """True if one of the rewards stores its state by problem id. Problems must then keep their ids throughout training."""
        return has_state_by_problem(self.rewards)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the rewards: name of the reward -> state. Rewards without a state have no entry.

        The dict can be written as JSON.
        """
        return state_by_name(self.rewards)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore the states of the rewards from ``saved``, the result of ``state_dict``."""
        load_state_by_name(self.rewards, saved)

    def monitoring(self) -> tuple[int, int] | None:
        """Return the size of a monitoring set for the rewards, or ``None`` if none of them needs new responses now.

        The size is ``(number of problems, responses per problem)``, each the largest that one of them requests. A monitoring set consists
        of training problems whose sampled responses measure the policy and are not trained on.
        """
        return monitoring_size(self.rewards)

    def monitor(self, batch: RewardBatch) -> None:
        """Pass new responses to the rewards, each only if it needs new responses now.

        Args:
            batch: Responses of the policy to the problems of the monitoring set, which ``monitoring`` describes.
        """
        monitor_parts(self.rewards, batch)


@dataclass(frozen=True)
class WeightedSum(Combined):
    """Weighted sum of rewards, in which a weight may change during training.

    The result also holds components, named summands of the reward. They are the components of the combined rewards, each times the weight
    of its reward. Their names are ``REWARD.COMPONENT``, for example ``length_penalty.length``.

    >>> from toolkit.rewards.correctness import Correctness, Format
    >>> batch = RewardBatch.from_columns(correct=[1, 0], formatted=[1, 1])
    >>> WeightedSum(((1.0, Correctness()), (0.1, Format())))(batch).values.tolist()
    [1.1, 0.1]

    Attributes:
        parts: Pairs ``(weight, reward)``; a weight may be a function of the optimizer step. The names of the rewards must differ.
    """

    parts: tuple[tuple[Weight, Reward], ...]

    def __post_init__(self) -> None:
        check_names(self.rewards)

    @property
    def rewards(self) -> tuple[Reward, ...]:
        return tuple(reward for _, reward in self.parts)

    @property
    def name(self) -> str:
        return " + ".join(f"{'w(t)' if callable(w) else format(w, 'g')} {r.name}" for w, r in self.parts)

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        components: dict[str, np.ndarray] = {}
        for weight, reward in self.parts:
            w = weight(batch.step) if callable(weight) else weight
            components |= {f"{reward.name}.{name}": w * values for name, values in reward(batch).components.items()}
        return RewardValues.sum(**components)


@dataclass(frozen=True)
class Gated(Combined):
    """Product of a reward and one or more gates, rewards with values in [0, 1]: ``inner * gate * ...``.

    The result also holds components, named summands of the reward: those of the inner reward, each multiplied by all gates.

    >>> from toolkit.rewards.correctness import Correctness, LengthPenalty
    >>> batch = RewardBatch.from_columns(correct=[1, 0], tokens=[1024, 1024])
    >>> Gated(LengthPenalty(longest=4096), (Correctness(),))(batch).values.tolist()
    [0.75, 0.0]

    Attributes:
        inner: The reward that is multiplied.
        gates: Rewards with values in [0, 1], such as ``Correctness``, ``Format``, ``repetition.Distinct``.
    """

    inner: Reward
    gates: tuple[Reward, ...]

    def __post_init__(self) -> None:
        check_names(self.rewards)

    @property
    def rewards(self) -> tuple[Reward, ...]:
        return (self.inner, *self.gates)

    @property
    def name(self) -> str:
        return " x ".join(r.name for r in self.rewards)

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        gate = np.prod([gate(batch).values for gate in self.gates], axis=0)
        return RewardValues.sum(**{name: values * gate for name, values in self.inner(batch).components.items()})


@dataclass(frozen=True)
class MeanOfAdvantages(Combined):
    """Weighted mean of the advantages of several rewards. These values are advantages: train on them without normalising again.

    The advantage of a response is its reward minus the mean reward of its group (the responses to the same problem), divided by the
    group's standard deviation. The function ``advantage`` has the formula.

    >>> from toolkit.rewards.correctness import Correctness, Format
    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0, 0], formatted=[1, 0, 1, 0])
    >>> MeanOfAdvantages(((3.0, Correctness()), (1.0, Format())))(batch).values.round(3).tolist()
    [1.0, 0.5, -0.5, -1.0]

    Attributes:
        parts: Pairs ``(weight, reward)``. Weights are at least 0, not all are 0, and they need not add up to 1. The names of the rewards
            must differ.
        epsilon: A small constant that is added to each standard deviation.
    """

    parts: tuple[tuple[Number, Reward], ...]
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        check_names(self.rewards)
        if any(w < 0 for w, _ in self.parts) or not sum(w for w, _ in self.parts) > 0:
            raise ValueError(f"Weights {[w for w, _ in self.parts]}: no weight may be negative, and at least one must be positive.")

    @property
    def rewards(self) -> tuple[Reward, ...]:
        return tuple(reward for _, reward in self.parts)

    @property
    def name(self) -> str:
        return f"mean of advantages({', '.join(r.name for r in self.rewards)})"

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        total = sum(w for w, _ in self.parts)
        return RewardValues.sum(
            **{r.name: w / total * advantage(r(batch).values, batch.groups, self.epsilon) for w, r in self.parts}
        )


def advantage(values: groups.Values, group: groups.Groups, epsilon: float = 1e-6) -> groups.Values:
    """Return the advantage of each row, ``(r - mean_g) / (std_g + epsilon)``; 0 in groups whose rewards r are all equal.

    ``mean_g`` and ``std_g`` are the mean and the population standard deviation of the group's rewards.

    Args:
        values: Rewards, ``[n]``.
        group: Group index of each row, ``[n]``.
        epsilon: A small constant that is added to the standard deviation.
    """
    centred = values - groups.mean(values, group)
    # Compared directly: rounding can give equal values a tiny standard deviation, and dividing by it large advantages.
    varies = groups.highest(values, group) > groups.lowest(values, group)
    return np.where(varies, centred / (np.sqrt(groups.mean(np.square(centred), group)) + epsilon), 0.0)


def check_names(parts: Sequence[Reward]) -> None:
    """Raise ValueError if there are no rewards to combine, or if two have the same name.

    The names must differ because components and states are stored by name.
    """
    names = [r.name for r in parts]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Parts named {names}: give at least one, with names that differ.")
