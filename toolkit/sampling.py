"""Draw tokens: the sampling settings, one stream of random numbers per response, and the draw of one token per row of a batch.

Each response has a stream of random numbers that depends only on (seed, problem id, sample). So a response does not depend on the batch
size, the order of the problems or the other rows of the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Sampling settings.

    Attributes:
        n: Samples per problem.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Probability mass of the nucleus; 1 keeps every token.
        top_k: Number of most likely tokens that are kept; 0 keeps every token.
        max_new_tokens: Longest response in tokens, think tags and end-of-sequence token included.
        seed: Seed of the random numbers of all responses.
        details: True to record the log-probability of each token and the entropy of the full softmax (``Rollout.logprobs``,
            ``Rollout.entropies``).
        batch_size: Largest number of responses that are decoded together (halved if memory runs out). It never changes the samples.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024
    seed: int = 0
    details: bool = False
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError(
                f"n={self.n}, max_new_tokens={self.max_new_tokens}, batch_size={self.batch_size}: all must be at least 1."
            )
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"temperature={self.temperature}, top_p={self.top_p}, top_k={self.top_k}: "
                "need temperature >= 0, 0 < top_p <= 1, top_k >= 0."
            )

    @property
    def identity(self) -> dict:
        """All settings except the batch size, as a dict. It is stored with rollouts; a run resumes only with the same settings."""
        return {k: v for k, v in asdict(self).items() if k != "batch_size"}


class Streams:
    """Uniform random numbers in [0, 1), one stream per row of a batch. Each stream has a counter-based generator (Philox).

    Args:
        keys: ``(problem id, sample)`` of each row.
        seed: Seed of all streams; a stream depends on the seed and on the key of the row.
    """

    BLOCK = 256

    def __init__(self, keys: Sequence[tuple[str, int]], seed: int) -> None:
        digests = [hashlib.sha256(f"{seed}|{problem}|{sample}".encode()).digest() for problem, sample in keys]
        self.generators = [np.random.Generator(np.random.Philox(key=int.from_bytes(d[:16], "big"))) for d in digests]
        self.block: Tensor | None = None

    def at(self, step: int, rows: Sequence[int], index: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Return one random number per row for a decoding step.

        Call this method for the steps 0, 1, 2, ... in order. Rows that have ended are left out, and cannot be added again.

        Args:
            step: Number of the decoding step, from 0.
            rows: Indices into ``keys`` of the rows that are still decoded.
            index: The same indices as a tensor on the model's device.
        """
        if step % self.BLOCK == 0:
            numbers = np.zeros((self.BLOCK, len(self.generators)))
            for row in rows:
                numbers[:, row] = self.generators[row].random(self.BLOCK)
            self.block = torch.from_numpy(numbers).to(index.device, torch.float32)
        assert self.block is not None
        return self.block[step % self.BLOCK].index_select(0, index)


def draw(
    logits: Float[Tensor, "rows vocab"], uniform: Float[Tensor, " rows"], sampling: Sampling
) -> tuple[Int[Tensor, " rows"], Float[Tensor, "2 rows"] | None]:
    """Draw one token per row: invert the cumulative distribution at ``uniform``, or take the most likely token at temperature 0.

    Args:
        uniform: One random number in [0, 1) per row.

    Returns:
        The tokens, and a tensor ``[2, rows]`` (``None`` unless ``sampling.details``). Its first row has the natural log-probability of each
        token, at the sampling temperature and after top-k and top-p. Its second row has the entropy (nats) of the full softmax at this
        temperature. If sampling is greedy, both are of the full softmax at temperature 1.
    """
    scaled = logits.float() / (sampling.temperature or 1.0)
    logp = torch.log_softmax(scaled, dim=-1)
    probs = logp.exp()
    if sampling.temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        allowed = _truncated(probs, sampling)
        cdf = allowed.cumsum(dim=-1)
        total = cdf[:, -1:]
        # If top-k or top-p removed tokens, the total is below 1. Rounding must not push the target to the total, past the last token that
        # can be drawn.
        target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(cdf, target, right=True).squeeze(1)
        if allowed is not probs:
            logp = torch.where(allowed > 0, logp, -torch.inf) - total.log()
    if not sampling.details:
        return tokens, None
    chosen = logp.gather(1, tokens[:, None]).squeeze(1)
    return tokens, torch.stack([chosen, torch.special.entr(probs).sum(dim=-1)])


def _truncated(probs: Float[Tensor, "rows vocab"], sampling: Sampling) -> Float[Tensor, "rows vocab"]:
    """Set the probabilities outside top-k and the nucleus to 0, without renormalising."""
    if sampling.top_k == 0 and sampling.top_p == 1.0:
        return probs
    ordered, order = probs.sort(dim=-1, descending=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_k:
        keep[:, sampling.top_k :] = False
    # A token stays if the mass before it is still below top_p, so the first always stays.
    ordered = ordered * keep
    keep &= (ordered.cumsum(dim=-1) - ordered) / ordered.sum(dim=-1, keepdim=True) < sampling.top_p
    return torch.zeros_like(probs).scatter(-1, order, ordered * keep)
