"""Measure interventions on models that call tools: calls, tokens and accuracy per response.

``episode_measures`` gives the measures for ``measure_axis``, and ``with_tools`` gives the tools to an intervention and its controls.
``calls_direction`` is a direction of calling, to be compared with the direction of thinking length.

Units: calls and tokens are means per response; accuracies are from 0 to 1. Tokens of tool results do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from toolkit import collect, directions, generate
from toolkit.generate import Sampling
from toolkit.jobs.axes import Arm, Measure
from toolkit.lm import LM, Condition
from toolkit.tools import Toolbox
from toolkit.types import Direction, Problem, Rollout

MANY, FEW = "many calls", "no call"  # classes of episodes
assumed_many = 2  # calls from which an episode belongs to the class of many (ours)
EPISODES: dict[str, tuple[str, Callable[[Rollout], float]]] = {
    "calls": ("calls", lambda r: len(r.results)),
    "tokens": ("tokens", lambda r: r.written_tokens),
    "accuracy": ("share", lambda r: r.correct),
}
"""Measure -> its unit, and the function that computes it from a response."""


def with_tools(arm: Arm, tools: Toolbox) -> Arm:
    """Return an intervention and its controls with tools to call.

    Args:
        arm: Intervention with controls, such as from ``edit_arm``.
        tools: Toolbox of the task, such as ``tasks.searching.toolbox()``.
    """
    return Arm(replace(arm.treated, tools=tools), tuple(replace(c, tools=tools) for c in arm.controls))


def episode_measures(sampling: Sampling) -> dict[str, Measure]:
    """Return a measure of problems per entry of ``EPISODES``: the mean over a problem's samples.

    All measures of one result use the same responses: what was sampled once for a condition and problems is kept.

    Args:
        sampling: Settings of every response. The seed is the same for all conditions.
    """
    kept: dict[
        tuple[int, tuple[str, ...]], tuple[Condition, list[Rollout]]
    ] = {}  # with the condition, so that its id stays its own

    def sampled(condition: Condition, problems: Sequence[Problem]) -> list[Rollout]:
        key = id(condition), tuple(p.id for p in problems)
        if key not in kept:
            kept[key] = condition, generate.rollouts(condition, problems, sampling, progress=False)
        return kept[key][1]

    def measure(of: Callable[[Rollout], float]) -> Any:
        def means(condition: Condition, problems: Sequence[Problem]) -> Float[ndarray, " problems"]:
            values = np.array([of(r) for r in sampled(condition, problems)], float)
            return values.reshape(len(problems), -1).mean(axis=1)

        return means

    return {name: measure(of) for name, (_, of) in EPISODES.items()}


def calls_direction(lm: LM, episodes: Sequence[Rollout], *, many: int = assumed_many) -> Direction:
    """Return the direction of calling: mean ``resid_post`` over thinking in episodes with many calls, minus that in episodes without one.

    Adding the direction should lead to more calls. Positions are those that predict think tokens that the model wrote.

    Args:
        lm: The model that wrote the episodes.
        episodes: Responses with and without calls.
        many: Smallest number of calls of the class "many calls".

    Raises:
        ValueError: one of the two classes has fewer than 8 episodes.
    """

    def by(r: Rollout) -> str | None:
        return MANY if len(r.results) >= many else None if r.results else FEW

    counts = {name: sum(by(r) == name for r in episodes) for name in (MANY, FEW)}
    if min(counts.values()) < 8:
        raise ValueError(f"{counts} of {len(episodes)} episodes: need at least 8 of each kind. Sample more episodes.")
    moments = collect.moments(lm, episodes, by, kinds=("resid_post",))
    return directions.mean_difference(moments, "resid_post", pos=MANY, neg=FEW)
