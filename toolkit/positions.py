"""Choices of token positions in rollouts, at which activations are collected or averaged.

The choices: the whole think span, starts of lines of thinking, ends of sentences of thinking, and random subsets of these.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from toolkit.lm import LM
from toolkit.types import Rollout

By = Callable[[Rollout], str | None]
"""A function from a rollout to the name of its class (such as "long" or "short"), or to ``None`` to leave the rollout out."""


@dataclass(frozen=True)
class Positions:
    """A rule that selects token positions in a rollout.

    Attributes:
        name: Name of the rule, for files and reports.
        of: Function from a rollout to the selected positions, as indices into its full sequence (prompt and response).
    """

    name: str
    of: Callable[[Rollout], Sequence[int]]


def _think(r: Rollout) -> Sequence[int]:
    if r.think is None or not len(r.think):
        return ()
    span = r.think.predictors()
    return range(span.start, span.stop)


THINK = Positions("think", _think)
"""All positions that predict a think token: ``[start - 1, stop - 1)`` for the think span ``[start, stop)``, as in ThinkEdit's code."""


def step_starts(lm: LM) -> Positions:
    """Return a rule that selects the positions that predict the first token of a line of thinking (our choice).

    At these positions a model that writes one step per line decides on its next step. They are the position that predicts the first think
    token, and every later position of the think span whose token ends with a line break.
    """
    ends_line = {i for i in range(min(lm.vocab_size, len(lm.tokenizer))) if lm.text([i]).endswith("\n")}

    def of(r: Rollout) -> Sequence[int]:
        where = _think(r)
        return [t for i, t in enumerate(where) if i == 0 or r.token_ids[t] in ends_line]

    return Positions("step_starts", of)


def sentence_ends(lm: LM) -> Positions:
    """Return a rule that selects the positions whose token ends a sentence of thinking, with ``.``, ``!`` or ``?`` (our choice).

    At these positions a model that thinks in prose continues or stops. A rollout whose thinking was never closed has no such positions.

    Use: collect ``states(..., each=True)`` at these positions. In the rows with ``remaining`` 0, thinking stopped; in all others it
    continued. The mean of the others minus the mean of these rows is a direction of thinking length (+ is longer). If the whole response
    counts as thinking, the difference is a direction of response length.
    """
    ends = {i for i in range(min(lm.vocab_size, len(lm.tokenizer))) if lm.text([i]).rstrip().endswith((".", "!", "?"))}

    def of(r: Rollout) -> Sequence[int]:
        return [t for t in range(r.think.start, r.think.stop) if r.token_ids[t] in ends] if r.think and r.closed else ()

    return Positions("sentence_ends", of)


def sample_positions(positions: Positions, at_most: int, *, seed: int = 0) -> Positions:
    """Return a rule that selects a random subset of the positions of another rule: at most ``at_most`` per rollout, in ascending order.

    Positions are drawn without replacement. The draw depends only on the seed, the rollout's problem id and its sample index.

    Args:
        positions: Rule to draw from.
        at_most: Largest number of positions per rollout.
        seed: Random seed.

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
