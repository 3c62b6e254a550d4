"""A small encoder of texts, tuned contrastively: a question is to be closer to its own query than to the queries of other questions.

    e(x)   = normalised sum over the words w of x of E_w                    E: one vector per word; words that were not trained count 0
    loss   = mean over pairs i of -log softmax_j( <e(q_i), e(s_j)> / T )_i          (InfoNCE, arXiv:1807.03748)

Deviations: the reward of arXiv:2510.13827 takes its embeddings from a multilingual language model (XLM-R) that is tuned contrastively. This
encoder is a bag of words that is trained from the start, in seconds, so it knows only the words of its training pairs. The vectors' size,
T, the learning rate and the number of steps are ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

assumed_width, assumed_temperature, assumed_rate, assumed_steps, assumed_batch = 32, 0.1, 0.02, 300, 64


@dataclass(frozen=True)
class Encoder:
    """A bag-of-words encoder. Called with a question and a query, it returns their similarity from 0 to 1. ``train`` makes one.

    Attributes:
        index: Word -> its row in ``vectors``.
        vectors: E, ``[words, width]``.
    """

    index: Mapping[str, int]
    vectors: Float[Tensor, "words width"]

    def encode(self, text: str) -> Float[Tensor, " width"]:
        """Return e(x), a vector of norm 1, or 0 if the text has no known word."""
        rows = [self.index[word] for word in _words(text) if word in self.index]
        return F.normalize(self.vectors[rows].sum(dim=0), dim=0) if rows else torch.zeros(self.vectors.shape[1])

    def __call__(self, one: str, other: str) -> float:
        """Return the similarity of two texts: their cosine, or 0 if it is negative."""
        return max(0.0, float(self.encode(one) @ self.encode(other)))


def train(pairs: Sequence[tuple[str, str]], seed: int, *, steps: int = assumed_steps) -> Encoder:
    """Train an encoder on pairs of a question and its query, and return it. With ``steps=0`` its vectors are random.

    Args:
        pairs: The pairs, at least two.
        seed: Seed of the initial vectors and of the order of the pairs.
        steps: Optimizer steps, each with ``assumed_batch`` pairs at most.

    Raises:
        ValueError: there are fewer than two pairs.
    """
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} pairs: a contrastive loss compares pairs, so give at least two.")
    index = {word: i for i, word in enumerate(sorted({w for pair in pairs for text in pair for w in _words(text)}))}
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.randn(len(index), assumed_width, generator=draw).requires_grad_()
    bags = [torch.stack([_bag(text, index) for text in side]) for side in zip(*pairs, strict=True)]
    optimizer = torch.optim.Adam([vectors], lr=assumed_rate)
    for _ in range(steps):
        rows = torch.randperm(len(pairs), generator=draw)[:assumed_batch]
        one, other = (F.normalize(bag[rows] @ vectors, dim=1) for bag in bags)
        # Pairs with one text in common are no negatives of each other.
        alike = [(bag[rows][:, None] == bag[rows][None]).all(dim=2) for bag in bags]
        same = (alike[0] | alike[1]) & ~torch.eye(len(rows), dtype=torch.bool)
        logits = (one @ other.T / assumed_temperature).masked_fill(same, -torch.inf)
        loss = F.cross_entropy(logits, torch.arange(len(rows)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Encoder(index, vectors.detach())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _bag(text: str, index: Mapping[str, int]) -> Float[Tensor, " words"]:
    counts = torch.zeros(len(index))
    for word in _words(text):
        counts[index[word]] += 1
    return counts
