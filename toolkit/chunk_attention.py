"""Attention to a few chunks of a text, which are read at consecutive positions; ``methods.long_heads`` has the equations.

Queries and keys come rotated by their position within their chunk only. The rest of the rotation depends on token and chunk, is a multiple
of the chunk's length, and is done on the query.

Units: lengths in tokens. All logits, sums and outputs are in fp32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from toolkit.lm import LM

FEW = 8  # up to so many queries, such as one while decoding, gather their keys; more are grouped by chunk


def attention_code(lm: LM) -> Any:
    """Return the module of transformers that defines the model's attention."""
    return sys.modules[type(lm.layout.attention).__module__]


@dataclass(frozen=True)
class Turns:
    """Rotations by positions, as the model's own code does them.

    Attributes:
        rotate: The model's function ``(query, key, cos, sin) -> (query, key)``.
        cos, sin: Rotations by the positions 0 to w - 1, ``[w, rotated entries]``.
        far_cos, far_sin: Rotations by the positions 0, w, .., (k - 1) w, without the model's factor on cos and sin, if it has one.
        chunk: Tokens per chunk, w.
    """

    rotate: Callable[..., tuple[Tensor, Tensor]]
    cos: Float[Tensor, "w d"]
    sin: Float[Tensor, "w d"]
    far_cos: Float[Tensor, "k d"]
    far_sin: Float[Tensor, "k d"]
    chunk: int

    @classmethod
    def of(cls, lm: LM, rotary: Any, chunk: int, chunks: int) -> Turns:
        """Return the rotations of a model for attention to ``chunks`` chunks of ``chunk`` tokens.

        Args:
            lm: The model.
            rotary: Its rotary module.
            chunk: Tokens per chunk, w.
            chunks: Number of chunks that a query attends to at most, k.
        """
        weight = next(lm.layout.attention.parameters())
        near = torch.arange(chunk, device=lm.device)
        far = chunk * torch.arange(chunks, device=lm.device)
        sample = torch.zeros(1, dtype=weight.dtype if weight.is_floating_point() else torch.float32, device=lm.device)
        with torch.inference_mode():
            (cos, sin), (far_cos, far_sin) = (rotary(sample, position_ids=at[None]) for at in (near, far))
        factor = far_cos[0, 0]  # at position 0, cos is 1 times the model's factor
        return cls(attention_code(lm).apply_rotary_pos_emb, cos[0], sin[0], far_cos[0] / factor, far_sin[0] / factor, chunk)

    def unrotated(self, query: Float[Tensor, "heads queries d"], at: Int[Tensor, " queries"]) -> Float[Tensor, "heads queries d"]:
        """Return queries before their rotation by ``at mod w``, up to a positive factor."""
        return self._turned(query, self.cos[at % self.chunk], -self.sin[at % self.chunk])

    def forward(self, query: Float[Tensor, "queries d"], chunks: Int[Tensor, " queries"]) -> Float[Tensor, "queries d"]:
        """Return queries rotated further by ``chunks`` times w positions."""
        return self._turned(query[None], self.far_cos[chunks], self.far_sin[chunks])[0]

    def _turned(self, query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.rotate(query[None], query[None], cos[None], sin[None])[0][0]


def chunk_keys(
    query: Float[Tensor, "heads chunks w d"],
    key: Float[Tensor, "heads chunks w d"],
    value: Float[Tensor, "heads chunks w d"],
    scale: float,
) -> Float[Tensor, "heads chunks d"]:
    """Return the key c_i of every chunk.

    Args:
        query, key: Queries and keys, rotated by their positions within the chunk.
        value: Values.
        scale: Factor on attention logits, usually ``1 / sqrt d``.
    """
    each = F.scaled_dot_product_attention(query, key, value, scale=scale)
    mean = each.mean(dim=2, keepdim=True)
    return F.scaled_dot_product_attention(mean, key, key, scale=scale)[:, :, 0]


def attend_chunks(
    turns: Turns,
    qkv: tuple[Float[Tensor, "heads queries d"], Float[Tensor, "kv keys d"], Float[Tensor, "kv keys v"]],
    chosen: Int[Tensor, "heads queries k"],
    at: Int[Tensor, " queries"],
    scale: float,
) -> Float[Tensor, "heads queries v"]:
    """Return the output of attention over the chosen chunks, in fp32.

    Args:
        turns: Rotations of the model.
        qkv: Queries, keys and values; queries and keys are rotated by their positions within the chunk.
        chosen: Chunks of each query, from ``choose``.
        at: Position of each query in the text.
        scale: Factor on attention logits.
    """
    query, key, value = qkv
    group = torch.arange(len(query), device=query.device) // (len(query) // len(key))  # KV head of each head
    if query.shape[1] <= FEW:
        return _attend_few(turns, qkv, chosen, at, scale, group)
    heads = zip(query, key[group], value[group], chosen, strict=True)
    return torch.stack([_attend(turns, (q, k, v), own, at, scale) for q, k, v, own in heads])


def _attend_few(
    turns: Turns, qkv: tuple[Tensor, Tensor, Tensor], chosen: Tensor, at: Tensor, scale: float, group: Tensor
) -> Tensor:
    """Return the output of all heads for a few queries, such as one while decoding: the keys and values of each query are gathered."""
    (query, key, value), w, k = qkv, turns.chunk, chosen.shape[2]
    exists = chosen <= at[-1] // w
    turn = (exists.sum(dim=2, keepdim=True) - 1 - torch.arange(k, device=at.device)).clamp(min=0)
    q = turns.forward(query.repeat_interleave(k, dim=1).flatten(0, 1), turn.flatten()).unflatten(0, chosen.shape)
    places = chosen[..., None] * w + torch.arange(w, device=at.device)
    hidden = (places > at[:, None, None]) | ~exists[..., None]
    places, which = places.clamp(max=key.shape[1] - 1), group[:, None, None, None]
    logits = torch.einsum("hqkd,hqkwd->hqkw", q.float(), key[which, places].float()) * scale
    weights = logits.masked_fill(hidden, -torch.inf).flatten(2).softmax(dim=-1)
    return torch.einsum("hqs,hqsd->hqd", weights, value[which, places].float().flatten(2, 3))


def _attend(
    turns: Turns, qkv: tuple[Tensor, Tensor, Tensor], chosen: Tensor, at: Tensor, scale: float
) -> Float[Tensor, "queries v"]:
    """Return the output of one head: a softmax over all chosen chunks, summed chunk by chunk.

    For each query, ``top`` is its largest logit so far, ``total`` the sum of ``exp(logit - top)``, and ``out`` the same sum of values.
    """
    query, key, value = qkv
    w, k, n = turns.chunk, chosen.shape[1], int(at[-1]) // turns.chunk + 1
    counts = (chosen < n).sum(dim=1)
    top, total = torch.full((len(query),), -torch.inf, device=query.device), torch.zeros(len(query), device=query.device)
    out = torch.zeros(len(query), value.shape[-1], device=query.device)
    order = chosen.flatten().argsort(stable=True)  # entries that chose chunk 0, then those that chose chunk 1, ...
    sizes = torch.bincount(chosen.flatten(), minlength=n + 1)[:n].tolist()
    start = 0
    for chunk, size in enumerate(sizes):
        entries, start = order[start : start + size], start + size
        if not size:
            continue
        rows = entries // k
        q = turns.forward(query[rows], counts[rows] - 1 - entries % k).float()
        keys, values = (x[chunk * w : (chunk + 1) * w].float() for x in (key, value))
        places = chunk * w + torch.arange(len(keys), device=query.device)
        logits = (q @ keys.mT * scale).masked_fill_(places > at[rows, None], -torch.inf)
        new = torch.maximum(top[rows], logits.amax(dim=1))
        weights, old = (logits - new[:, None]).exp_(), (top[rows] - new).exp()
        top[rows] = new
        total[rows] = total[rows] * old + weights.sum(dim=1)
        out[rows] = out[rows] * old[:, None] + weights @ values
    return out / total[:, None]
