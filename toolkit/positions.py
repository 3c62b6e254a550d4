"""Rules that select token positions in rollouts, at which activations are collected or averaged.

There are rules for all think tokens, starts of lines of thinking, ends of sentences of thinking, and random subsets of these.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from toolkit.lm import LM
from toolkit.types import Rollout

By = Callable[[Rollout], str | None]
"""A function from a rollout to the name of its class, such as "long" or "short". ``None`` leaves the rollout out."""


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
    placed = _placed(r)
    return [t for t in range(span.start, span.stop) if t + 1 not in placed] if placed else range(span.start, span.stop)


def _placed(r: Rollout) -> set[int]:
    """Return the positions of the tokens of tool results, which the model did not write."""
    return {t for result in r.results for t in range(result.start, result.stop)}


THINK = Positions("think", _think)
"""All positions that predict a think token, as in ThinkEdit's code. Tokens of tool results are not think tokens.

The logits at a position predict the next token. So for the think span ``[start, stop)`` the positions are ``[start - 1, stop - 1)``.
"""


def step_starts(lm: LM) -> Positions:
    """Return a rule that selects the positions that predict the first token of each line of thinking.

    If a model writes one step per line, it decides on its next step at these positions. The first selected position is the one before the
    think span; it predicts the first think token. The others are the think tokens that end with a line break, except for the last think
    token. The rule is ours, not from a paper.
    """
    ends_line = {i for i in range(min(lm.vocab_size, len(lm.tokenizer))) if lm.text([i]).endswith("\n")}

    def of(r: Rollout) -> Sequence[int]:
        where = _think(r)
        return [t for i, t in enumerate(where) if i == 0 or r.token_ids[t] in ends_line]

    return Positions("step_starts", of)


def sentence_ends(lm: LM) -> Positions:
    """Return a rule that selects the think tokens that end a sentence, with ``.``, ``!`` or ``?``.

    If a model thinks in prose, it decides at these positions whether to continue thinking or to stop. The rule selects nothing in a rollout
    whose thinking was never closed. It is ours, not from a paper.

    Example of use: compute a direction from "stops thinking" to "continues thinking".

    1. Collect the activations at these positions, with ``collect.states(..., each=True)``. The result, ``States``, has one row per
       position. The column ``remaining`` of ``States.rows`` is the number of think tokens after the position.
    2. Compute the mean activation over the rows with ``remaining`` above 0, where thinking continued.
    3. Subtract from it the mean activation over the rows with ``remaining`` 0, where thinking stopped.

    If the model was loaded with ``ThinkTags(None, None)``, the whole response counts as thinking. The direction is then one of response
    length.
    """
    ends = {i for i in range(min(lm.vocab_size, len(lm.tokenizer))) if lm.text([i]).rstrip().endswith((".", "!", "?"))}

    def of(r: Rollout) -> Sequence[int]:
        if r.think is None or not r.closed:
            return ()
        placed = _placed(r)
        return [t for t in range(r.think.start, r.think.stop) if r.token_ids[t] in ends and t not in placed]

    return Positions("sentence_ends", of)


def sample_positions(positions: Positions, at_most: int, *, seed: int = 0) -> Positions:
    """Return a rule that selects a random subset of the positions of another rule: at most ``at_most`` per rollout, in ascending order.

    Positions are drawn without replacement. The same seed, problem id and sample index always give the same subset.

    Args:
        positions: The other rule.
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
