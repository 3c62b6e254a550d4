"""Entropy and log-probability of each token of given responses, under a model, with or without interventions.

With x_t the response token at index t, z the logits that predict it, and v an index over the full vocabulary::

    p        = softmax(z / temperature)
    H_t      = -sum_v p_v log p_v              entropy
    logp_t   = log p_v  at v = x_t             log-probability

Both are in nats. There are two ways to get them:

- ``Sampling(details=True)`` records them during sampling, at the sampling temperature, without an extra forward pass.
- ``with_entropies`` computes them later, at any temperature. It runs the model once over each sequence (teacher-forced), in pieces: at most
  ``CHUNK`` logits are in memory at a time, and a KV cache carries the earlier tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor
from torch.nn.functional import pad

from toolkit.collect import batch_tokens, logprobs_and_entropies, pad_right
from toolkit.decode import batches, check_growth, prefill
from toolkit.lm import LM, Condition
from toolkit.memory import FittingSize
from toolkit.progress import stage
from toolkit.types import Rollout

CHUNK = 2**24  # largest number of logits in memory at a time: 64 MB in fp32, about 200 MB while entropies are computed from them


class NoEntropiesError(ValueError):
    """Raised if an operation needs entropies, but the rollouts have none."""


def with_entropies(
    target: LM | Condition, rollouts: Sequence[Rollout], *, temperature: float = 1.0, chunk: int = CHUNK, progress: bool = False
) -> list[Rollout]:
    """Return copies of the rollouts, in order, with the entropy and log-probability (nats) of each response token under ``target``.

    Both are computed from the full softmax at ``temperature``, without top-k or top-p. ``target`` may differ from the model that sampled
    the rollouts, for example to measure the entropy of the base model's responses under an intervention.

    Rollouts sampled with ``Sampling(details=True)`` already have the entropies under the model that sampled them, at the sampling
    temperature. The log-probabilities stored in them equal those of this function only if sampling used neither top-k nor top-p.

    Args:
        target: Model or condition that predicts the tokens. A condition's interventions are active. Its decoding rules and its change of
            the prompt have no effect, since the rollouts already contain all tokens.
        rollouts: Responses to score.
        temperature: Softmax temperature, above 0.
        chunk: Largest number of logits in memory at a time, ``rows * positions * vocab``. It limits the number of positions that are
            processed together, which is at least 1.
        progress: True to show a progress bar.

    Raises:
        ValueError: The temperature is not positive.
        UnsupportedModelError: a response crosses the length at which the model's rotary frequencies change (``LM.frequency_limit``).
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: entropies need a temperature above 0 (greedy sampling records them at 1).")
    condition = target if isinstance(target, Condition) else Condition(target)
    check_growth(
        condition.lm, ((r.prompt_len, len(r.token_ids)) for r in rollouts), "Leave out responses of more than {limit} tokens."
    )
    done: dict[int, Rollout] = {}
    order = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i].token_ids))
    bar = stage("entropies", len(rollouts), "rollout", show=progress)

    def run(rows: Sequence[int]) -> None:
        with condition.active(), torch.inference_mode():
            scores = _scores(condition.lm, [rollouts[i] for i in rows], temperature, chunk).tolist()
        for i, logprobs, entropies in zip(rows, *scores, strict=True):
            n = rollouts[i].response_tokens
            done[i] = replace(rollouts[i], logprobs=tuple(logprobs[:n]), entropies=tuple(entropies[:n]))
        bar.update(len(rows))

    # Size: padded tokens. The last rollout is the longest.
    fitting = FittingSize(lambda batch: len(batch) * len(rollouts[batch[-1]].token_ids))
    with bar:
        limit = condition.lm.frequency_limit
        for batch in batches(order, lambda i: len(rollouts[i].token_ids), batch_tokens(condition.lm), limit=limit):
            fitting.run(batch, run)
    return [done[i] for i in range(len(rollouts))]


def _scores(lm: LM, batch: Sequence[Rollout], temperature: float, chunk: int) -> Float[Tensor, "2 rows response"]:
    """Return log-probability and entropy (nats) of each response token, ``[2, rows, response]``. Values at padding are meaningless.

    Prompts are padded on the left and responses on the right. So the responses of all rows begin at the same column of the KV cache.
    """
    ids = pad_right([r.token_ids[r.prompt_len :] for r in batch], lm)
    scores = torch.zeros(2, *ids.shape, device=lm.device)
    cache, logits, mask = prefill(lm, [list(r.token_ids[: r.prompt_len]) for r in batch])
    starts = mask.sum(dim=1)  # number of prompt tokens per row, and so the position of the first response token
    last = torch.tensor([len(r.token_ids) - 1 for r in batch], device=lm.device)
    scores[:, :, :1] = logprobs_and_entropies(logits[:, None], ids[:, :1], temperature)
    # Each chunk feeds the tokens at..stop - 1 and scores the tokens at + 1..stop that they predict. The prompt has predicted token 0.
    width = max(1, chunk // (len(batch) * logits.shape[-1]))
    for at in range(0, ids.shape[1] - 1, width):
        stop = min(at + width, ids.shape[1] - 1)
        mask = pad(mask, (0, stop - at), value=1)
        # The padding of shorter rows repeats their last position, so that it stays within the model's context.
        positions = torch.minimum(starts[:, None] + torch.arange(at, stop, device=lm.device), last[:, None])
        part = ids[:, at:stop]
        out = lm.model(input_ids=part, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        scores[:, :, at + 1 : stop + 1] = logprobs_and_entropies(out.logits, ids[:, at + 1 : stop + 1], temperature)
    return scores


def entropies_of(rollout: Rollout) -> Float[ndarray, " response"]:
    """Return the entropies that are stored in a rollout, one per response token, in nats.

    Raises:
        NoEntropiesError: the rollout has no entropies.
    """
    if rollout.entropies is None:
        raise NoEntropiesError(
            f"Rollout {rollout.sample} of problem {rollout.problem_id!r} carries no entropies: sample with Sampling(details=True) (toolkit "
            "rollouts --details), or compute them with entropies.with_entropies(lm, rollouts, temperature=...)."
        )
    return np.array(rollout.entropies)
