"""Dense rewards: place the rewards of segments of a response at tokens, as in Fine-Grained RLHF (arXiv:2306.01693).

    r_t = sum of the values of the segments whose last character is in token t  -  beta log( pi(t) / pi_0(t) )

A reward with a method ``segments(batch)`` is dense: it returns, for each response, its segments (``rewards.fine_grained.Segment``).
``advantages.TOKENS`` turn rewards of tokens into advantages.

Deviations: in training, the second term is TRL's KL term of the loss (``beta``), which has a gradient of its own; the paper subtracts the
term from the reward. ``token_rewards`` computes the paper's sum if it gets log-probabilities.

Units: rewards per token; log-probabilities in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from toolkit.lm import LM
from toolkit.rewards.fine_grained import Segment
from toolkit.steps import token_texts
from toolkit.types import Rollout

PUBLISHED_BETA = 0.3


def token_rewards(
    texts: Sequence[str],
    segments: Sequence[Segment],
    *,
    log_ratio: Sequence[float] | None = None,
    beta: float = PUBLISHED_BETA,
) -> Float[ndarray, " tokens"]:
    """Return the reward of each token of a response.

    >>> token_rewards(["3+", "4", "=7\\n", "7"], [Segment(5, "facts", 0.5), Segment(7, "complete", -0.3)]).tolist()
    [0.0, 0.0, 0.5, -0.3]

    Args:
        texts: Text of each token, from ``steps.token_texts``; joined, they are the response's text.
        segments: Segments with their ends in that text. A segment that ends inside a token is paid at this token.
        log_ratio: ``log pi - log pi_0`` of each token, in nats; ``None`` leaves the term out.
        beta: Weight of ``log_ratio``.

    Raises:
        ValueError: a segment ends outside the text, or ``log_ratio`` has not one value per token.
    """
    ends = list(accumulate(map(len, texts)))
    total = ends[-1] if ends else 0
    if outside := [s.stop for s in segments if not 0 < s.stop <= total]:
        raise ValueError(
            f"A segment ends at character {outside[0]} of a response of {total} characters: give ends from 1 to {total}."
        )
    if log_ratio is not None and len(log_ratio) != len(texts):
        raise ValueError(f"{len(log_ratio)} log-ratios of {len(texts)} tokens: give one per token.")
    rewards = np.zeros(len(texts)) if log_ratio is None else -beta * np.asarray(log_ratio, float)
    # The first token whose text reaches the end: tokens with an empty text before it are skipped, since they end before.
    np.add.at(rewards, np.searchsorted(ends, [s.stop for s in segments]).astype(np.int64), [s.value for s in segments])
    return rewards


def batch_rewards(lm: LM, rollouts: Sequence[Rollout], segments: Sequence[Sequence[Segment]]) -> Float[ndarray, "n positions"]:
    """Return the reward of each token of each rollout; 0 behind a response's end.

    Args:
        lm: Model whose tokenizer decodes the rollouts.
        rollouts: The rollouts.
        segments: Segments of each rollout, with offsets in its text.

    Raises:
        ValueError: a segment ends outside the text of its response.
    """
    values = np.zeros((len(rollouts), max(r.response_tokens for r in rollouts)))
    for row, rollout, own in zip(values, rollouts, segments, strict=True):
        if rollout.response_tokens:
            row[: rollout.response_tokens] = token_rewards(token_texts(lm, rollout.token_ids[rollout.prompt_len :]), own)
    return values


def own_tokens(rollouts: Sequence[Rollout]) -> Float[ndarray, "n positions"]:
    """Return 1 for each token that the model wrote, and 0 for tokens of tool results and behind a response's end."""
    mask = np.zeros((len(rollouts), max(r.response_tokens for r in rollouts)))
    for row, rollout in zip(mask, rollouts, strict=True):
        row[: rollout.response_tokens] = rollout.written
    return mask
