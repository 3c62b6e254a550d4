"""The impact of positional encoding on length generalization in transformers (Kazemnejad et al., 2023), arXiv:2305.19466.

The paper trains decoders from scratch that differ only in how they encode positions, and tests them on longer inputs than they were
trained on. This module has the five encodings, a small decoder that takes any of them, and the paper's comparison of attention maps.

Equations, with i the position of the query and j that of the key (0 <= j <= i), h = 1 .. H the head, q and k the query and the key of one
head, d their number of entries, x the embedding of a token and D its number of entries::

    score      s_ij = q_i . k_j / sqrt(d) + b_h(i - j)       a_ij = softmax of s_ij over j <= i
    absolute   x_i + p_i,    p_i[2m] = sin(i theta_m),  p_i[2m + 1] = cos(i theta_m),  theta_m = 10000^(-2m / D)         b = 0
    alibi      b_h(n) = -2^(-8h / H) n
    t5         b_h(n) = one learned number per head and bucket of n (``t5_buckets``)
    rope       q_i and k_j are rotated: entries (m, m + d/2) by the angle i theta_m or j theta_m, theta_m = 10000^(-2m / d) b = 0
    none       b = 0 (NoPE): only the causal mask tells positions apart

    distance of two attention rows    JS(a, c) = KL(a || m) / 2 + KL(c || m) / 2,    m = (a + c) / 2
    distance of two heads             mean of JS over the rows (queries)
    attention distance of a head      mean over i of  sum over j of  a_ij (i - j)

The paper reports that T5's encoding and NoPE generalise best and the absolute one worst, and that attention of a trained NoPE decoder
is most similar to that of one with T5's encoding.

Deviations: the paper's decoder has the size of T5-base; ours has two layers and no dropout. T5 itself does not divide scores by sqrt(d);
here all encodings do, so that they differ in nothing else. The paper's code swaps the arguments of both KL terms; here they are as in the
definition of Jensen and Shannon. Attention distance is ours.

Units and signs: positions and distances in tokens, angles in radians, biases are added to scores before the softmax, divergences in nats
(from 0 to ln 2).

Cost: attention maps are held in full, ``[batch, heads, T, T]`` per layer, so this decoder is for short sequences.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

ENCODINGS = ("absolute", "alibi", "t5", "rope", "none")
BASE = 10000.0  # of the frequencies of ``absolute`` and ``rope``
T5_BUCKETS, T5_FURTHEST = 32, 128  # T5's number of buckets, and all distances of at least this many tokens are in the last bucket


def sinusoid(positions: Int[Tensor, " T"], dim: int) -> Float[Tensor, "T dim"]:
    """Return the vectors p_i of the absolute encoding: sines in even entries, cosines in odd ones.

    Args:
        positions: Positions in tokens.
        dim: Number of entries D of an embedding; even.

    >>> sinusoid(torch.tensor([0]), 4).tolist()
    [[0.0, 1.0, 0.0, 1.0]]
    """
    angles = _angles(positions, dim)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def alibi_slopes(heads: int) -> Float[Tensor, " heads"]:
    """Return ALiBi's slopes ``2^(-8h / heads)`` for h = 1 .. heads.

    The number of heads must be a power of two. For others, ALiBi's authors interpolate, which is not implemented.

    Raises:
        ValueError: ``heads`` is not a power of two.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    if heads < 1 or heads & (heads - 1):
        raise ValueError(f"{heads} heads: expected a power of two (1, 2, 4, 8, ...), for which ALiBi's slopes are defined.")
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)


def alibi_bias(heads: int, length: int) -> Float[Tensor, "heads T T"]:
    """Return ALiBi's bias of every query and key, ``-slope * (i - j)``. Entries with j > i, which the causal mask hides, are 0."""
    return -alibi_slopes(heads)[:, None, None] * distances(length)


def distances(length: int) -> Int[Tensor, "T T"]:
    """Return how many tokens key j is before query i: ``i - j``, and 0 for later keys.

    >>> distances(3).tolist()
    [[0, 0, 0], [1, 0, 0], [2, 1, 0]]
    """
    positions = torch.arange(length)
    return (positions[:, None] - positions[None, :]).clamp(min=0)


def t5_buckets(distance: Int[Tensor, "*any"], buckets: int = T5_BUCKETS, furthest: int = T5_FURTHEST) -> Int[Tensor, "*any"]:
    """Return T5's bucket of each distance. Small distances have a bucket each; then widths grow geometrically.

    With E = buckets / 2, distance n is in bucket n if n < E, otherwise in the smaller of ``buckets - 1`` and
    ``E + floor(E ln(n / E) / ln(furthest / E))``.

    Args:
        distance: Tokens from the key to the query, at least 0.
        buckets: Number of buckets.
        furthest: All distances of at least this many tokens are in the last bucket, which has no upper limit.

    >>> t5_buckets(torch.tensor([0, 15, 16, 20, 127, 5000])).tolist()
    [0, 15, 16, 17, 31, 31]
    """
    exact = buckets // 2
    wide = exact + ((distance.clamp(min=1) / exact).log() / math.log(furthest / exact) * (buckets - exact)).long()
    return distance.where(distance < exact, wide.clamp(max=buckets - 1))


def rotate(x: Float[Tensor, "*heads T dim"], positions: Int[Tensor, " T"]) -> Float[Tensor, "*heads T dim"]:
    """Return queries or keys rotated by their position (RoPE). Entries m and ``m + dim/2`` form a pair.

    Args:
        x: Queries or keys of each head.
        positions: Position of each token.
    """
    angles = _angles(positions, x.shape[-1])
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _angles(positions: Int[Tensor, " T"], dim: int) -> Float[Tensor, "T pairs"]:
    return positions[:, None] * BASE ** -(torch.arange(0, dim, 2) / dim)


# --- the decoder ---------------------------------------------------------------------------------------------


class Outputs(NamedTuple):
    """What a decoder returns.

    Attributes:
        logits: Logits of the next token.
        notes: Logits of a second output layer. Multi-task training fits them to a label of each position instead of the next token.
        attention: Attention probabilities of each layer.
    """

    logits: Float[Tensor, "batch T vocabulary"]
    notes: Float[Tensor, "batch T vocabulary"]
    attention: tuple[Float[Tensor, "batch heads T T"], ...]


class Decoder(nn.Module):
    """A small causal decoder (layer norm before each sublayer, GELU, no dropout) with one of five positional encodings.

    With the same sizes and ``torch`` seed, all encodings start from the same weights. Only ``t5`` has additional weights, which start
    at 0.

    Args:
        encoding: One of ``ENCODINGS``.
        vocabulary: Number of tokens.
        width: Number of entries D of an embedding.
        heads: Attention heads per layer; for ``alibi`` a power of two.
        layers: Number of layers.

    Raises:
        ValueError: unknown encoding, or a width that is not a multiple of twice the number of heads.
    """

    def __init__(self, encoding: str, vocabulary: int, *, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        if encoding not in ENCODINGS:
            raise ValueError(f"Unknown encoding {encoding!r}: expected one of {', '.join(ENCODINGS)}.")
        if width % (2 * heads):
            raise ValueError(f"width={width}, heads={heads}: expected a width that is a multiple of twice the number of heads.")
        super().__init__()
        self.encoding, self.heads = encoding, heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head, self.note_head = nn.Linear(width, vocabulary), nn.Linear(width, vocabulary)
        # As in T5, all layers share one table of biases.
        self.t5_bias = nn.Parameter(torch.zeros(heads, T5_BUCKETS)) if encoding == "t5" else None

    def bias(self, length: int) -> Float[Tensor, "heads T T"]:
        """Return the bias b of every head, query and key, with -inf where the key comes after the query."""
        bias = torch.zeros(self.heads, length, length)
        if self.encoding == "alibi":
            bias = alibi_bias(self.heads, length)
        elif self.t5_bias is not None:
            bias = self.t5_bias[:, t5_buckets(distances(length))]
        return bias.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)

    def forward(self, ids: Int[Tensor, "batch T"]) -> Outputs:
        """Return logits and attention of every position."""
        positions = torch.arange(ids.shape[1])
        x, bias = self.embedding(ids), self.bias(ids.shape[1])
        if self.encoding == "absolute":
            x = x + sinusoid(positions, x.shape[-1])
        attention = []
        for block in self.blocks:
            x, weights = block(x, bias, positions if self.encoding == "rope" else None)
            attention.append(weights)
        x = self.norm(x)
        return Outputs(self.head(x), self.note_head(x), tuple(attention))


class Block(nn.Module):
    """One layer of ``Decoder``: attention, then an MLP of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self, x: Float[Tensor, "batch T width"], bias: Float[Tensor, "heads T T"], rotated: Int[Tensor, " T"] | None
    ) -> tuple[Float[Tensor, "batch T width"], Float[Tensor, "batch heads T T"]]:
        """Return the layer's output and its attention probabilities. ``rotated``: positions for RoPE; ``None`` rotates nothing."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.before_attention(x)).chunk(3, -1))
        if rotated is not None:
            q, k = rotate(q, rotated), rotate(k, rotated)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x)), weights


# --- attention maps ------------------------------------------------------------------------------------------


def attention_js(a: Float[Tensor, "A queries keys"], c: Float[Tensor, "C queries keys"]) -> Float[Tensor, "A C"]:
    """Return the Jensen-Shannon divergence in nats between each head of ``a`` and each head of ``c``, averaged over queries.

    Args:
        a: Attention probabilities of some heads; every row sums to 1.
        c: Attention probabilities of other heads, for the same queries and keys.

    >>> x, y = torch.tensor([[[0.9, 0.1]]]), torch.tensor([[[0.5, 0.5]]])
    >>> round(float(attention_js(x, y)), 6)
    0.101749
    """
    p, q = a[:, None], c[None, :]
    m = (p + q) / 2
    # xlogy(p, p) is 0 where p is 0, and there m may be 0 too: the term is 0 then.
    kl = [(torch.xlogy(r, r) - torch.xlogy(r, m)).sum(-1) for r in (p, q)]
    return ((kl[0] + kl[1]) / 2).mean(-1).clamp(min=0)


def attention_distance(weights: Float[Tensor, "*heads T T"]) -> Float[Tensor, "*heads"]:
    """Return how far back each head attends, in tokens: the mean over queries of the expected distance to the key.

    >>> attention_distance(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).item()
    0.25
    """
    return (weights * distances(weights.shape[-1])).sum(-1).mean(-1)
