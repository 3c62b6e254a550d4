"""Draw tokens: the sampling settings, one stream of random numbers per response, and the draw of one token per row of a batch.

A row is one response. Its stream of random numbers depends only on the seed, the problem id and the sample index. So, apart from rounding
(see ``engines.loop``), a response does not depend on the batch size, the order of the problems or the other rows of its batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from toolkit.tensors import upload


@dataclass(frozen=True)
class Sampling:
    """Sampling settings.

    Attributes:
        n: Samples per problem.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Probability mass of the nucleus (the most likely tokens that are kept), as a share of the mass that ``top_k`` keeps; 1 keeps
            every token.
        top_k: Number of most likely tokens that are kept; 0 keeps every token.
        max_new_tokens: Largest number of tokens in a response, think tags and end-of-sequence token included.
        seed: Seed of the random numbers of all responses.
        details: True to store two numbers per sampled token: its log-probability (``Rollout.logprobs``), and the entropy of the softmax
            over the whole vocabulary at its position, before top-k and top-p (``Rollout.entropies``). See ``draw``.
        batch_size: Largest number of responses that are decoded together. If memory runs out, those that have not ended are sampled again,
            fewer together. Responses do not depend on it, apart from rounding.
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
        """All settings except the batch size, as a dict. It is stored with rollouts, so that sampling resumes only with equal settings."""
        return {k: v for k, v in asdict(self).items() if k != "batch_size"}


class Streams:
    """Uniform random numbers in [0, 1), one stream per row of a batch. Each stream has its own Philox generator.

    Args:
        keys: ``(problem id, sample index)`` of each row of the batch. It is ``None`` for an empty row, to which ``begin`` later assigns a
            response. A stream depends only on its key and ``seed``.
        seed: Seed of all streams.
    """

    BLOCK = 256  # steps for which numbers are drawn at once, and copied to the device

    def __init__(self, keys: Sequence[tuple[str, int] | None], seed: int) -> None:
        self.seed = seed
        self.generators = [None if key is None else self._generator(key) for key in keys]
        self.block: Tensor | None = None

    def _generator(self, key: tuple[str, int]) -> np.random.Generator:
        digest = hashlib.sha256(f"{self.seed}|{key[0]}|{key[1]}".encode()).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))

    def at(self, step: int, rows: Sequence[int], index: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Return one random number for each row that is still decoded, for one decoding step.

        This method must be called for the steps 0, 1, 2, ... in order. Once ``rows`` leaves out a row, its stream cannot be used again.

        Args:
            step: Index of the decoding step, from 0.
            rows: Indices (into ``keys``) of the rows that are still decoded.
            index: The same indices as a tensor on the model's device.
        """
        if step % self.BLOCK == 0:
            numbers = np.zeros((self.BLOCK, len(self.generators)))
            for row in rows:
                if (generator := self.generators[row]) is not None:
                    numbers[:, row] = generator.random(self.BLOCK)
            self.block = upload(torch.from_numpy(numbers).float(), index.device)
        assert self.block is not None
        return self.block[step % self.BLOCK].index_select(0, index)

    def begin(self, step: int, rows: Sequence[int], keys: Sequence[tuple[str, int]]) -> None:
        """Replace the streams of some rows by new ones. A new stream starts at decoding step ``step``.

        Args:
            step: Index of the decoding step, for which ``at`` was not called yet.
            rows: Indices of the rows.
            keys: ``(problem id, sample index)`` of the new response in each of these rows.
        """
        for row, key in zip(rows, keys, strict=True):
            self.generators[row] = self._generator(key)
        begun = step % self.BLOCK
        if self.block is None or not begun:  # ``at`` draws a new block at this step
            return
        numbers = torch.zeros(self.BLOCK - begun, len(rows))
        for column, row in enumerate(rows):
            generator = self.generators[row]
            assert generator is not None
            numbers[:, column] = torch.from_numpy(generator.random(self.BLOCK - begun)).float()
        self.block[begun:].index_copy_(1, upload(torch.tensor(rows), self.block.device), upload(numbers, self.block.device))


def draw(
    logits: Float[Tensor, "rows vocab"], uniform: Float[Tensor, " rows"], sampling: Sampling
) -> tuple[Int[Tensor, " rows"], Float[Tensor, "2 rows"] | None]:
    """Draw one token per row: the first token id at which the cumulative probability exceeds ``uniform``.

    Probabilities are those after temperature, top-k and top-p, renormalised, and are summed in the order of token ids. At temperature 0,
    the most likely token is taken instead.

    Args:
        logits: Logits of the token to draw.
        uniform: One random number in [0, 1) per row.

    Returns:
        A pair: the tokens, and their details ``[2, rows]`` (``None`` if ``sampling.details`` is False).

        - ``details[0]``: natural log-probability of each token, at the sampling temperature and after top-k and top-p.
        - ``details[1]``: entropy (nats) of the full softmax at the sampling temperature, without top-k and top-p.

        At temperature 0, both are of the full softmax at temperature 1.
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
        if allowed is not probs:  # renormalise after top-k and top-p
            logp = torch.where(allowed > 0, logp, -torch.inf) - total.log()
    if not sampling.details:
        return tokens, None
    chosen = logp.gather(1, tokens[:, None]).squeeze(1)
    return tokens, torch.stack([chosen, torch.special.entr(probs).sum(dim=-1)])


def _truncated(probs: Float[Tensor, "rows vocab"], sampling: Sampling) -> Float[Tensor, "rows vocab"]:
    """Return ``probs`` with 0 for tokens outside top-k or outside the nucleus (top-p). The others are not renormalised."""
    if sampling.top_k == 0 and sampling.top_p == 1.0:
        return probs
    ordered, order = probs.sort(dim=-1, descending=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_k:
        keep[:, sampling.top_k :] = False
    # Top-p after top-k: a token stays if the tokens that are more likely have less than top_p of the mass that top-k left. So the most
    # likely token always stays.
    ordered = ordered * keep
    keep &= (ordered.cumsum(dim=-1) - ordered) / ordered.sum(dim=-1, keepdim=True) < sampling.top_p
    return torch.zeros_like(probs).scatter(-1, order, ordered * keep)
