"""Positions of a rollout at which activations are averaged: the think span, starts of lines, ends of sentences, random samples of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from toolkit.lm import LM
from toolkit.types import Rollout

By = Callable[[Rollout], str | None]
"""A function from a rollout to its class, or to ``None`` to leave it out."""


@dataclass(frozen=True)
class Positions:
    """A choice of positions in rollouts.

    Attributes:
        name: Name of the choice, for files and reports.
        of: Function from a rollout to positions in its full sequence (prompt and response).
    """

    name: str
    of: Callable[[Rollout], Sequence[int]]


def _think(r: Rollout) -> Sequence[int]:
    if r.think is None or not len(r.think):
        return ()
    span = r.think.predictors()
    return range(span.start, span.stop)


THINK = Positions("think", _think)
"""All positions that predict a think token: ``[start-1, stop-1)``, as in ThinkEdit's released code."""


def step_starts(lm: LM) -> Positions:
    """Return the positions that predict the first token of a line of thinking: there a model decides on its next step (our choice).

    These are the position that predicts the first think token, and every later position whose token ends a line.
    """
    ends_line = {i for i in range(min(lm.vocab_size, len(lm.tokenizer))) if lm.text([i]).endswith("\n")}

    def of(r: Rollout) -> Sequence[int]:
        where = _think(r)
        return [t for i, t in enumerate(where) if i == 0 or r.token_ids[t] in ends_line]

    return Positions("step_starts", of)


def sentence_ends(lm: LM) -> Positions:
    """Return the positions whose token ends a sentence of thinking, the last sentence included: there prose stops or goes on (our choice).

    In ``states(..., each=True)`` at these positions, a row with ``remaining`` 0 is where a rollout stopped thinking. The mean of all other
    rows minus the mean of these rows is a direction of thinking length, for models that think in prose; if whole responses count as
    thinking, it is a direction of response length. A rollout without closed thinking has no positions.
    """
    ends = {i for i in range(min(lm.vocab_size, len(lm.tokenizer))) if lm.text([i]).rstrip().endswith((".", "!", "?"))}

    def of(r: Rollout) -> Sequence[int]:
        return [t for t in range(r.think.start, r.think.stop) if r.token_ids[t] in ends] if r.think and r.closed else ()

    return Positions("sentence_ends", of)


def sample_positions(positions: Positions, at_most: int, *, seed: int = 0) -> Positions:
    """Return a random subset of ``positions``: at most ``at_most`` per rollout, drawn without replacement, in ascending order.

    The sample depends only on the seed and on the rollout's problem and sample index, not on other rollouts or on batches.

    Args:
        at_most: Largest number of positions per rollout.

    Raises:
        ValueError: ``at_most`` is below 1.
    """
    if at_most < 1:
        raise ValueError(f"at_most={at_most}: need at least one position per rollout.")

    def of(r: Rollout) -> Sequence[int]:
        where = positions.of(r)
        if len(where) <= at_most:
            return where
        return sorted(random.Random(f"{seed}-{r.problem_id}-{r.sample}").sample(list(where), at_most))

    return Positions(f"{at_most} of {positions.name}", of)
