"""Confidence of the newest step of thinking while tokens are sampled, from certainties that are kept in the KV cache.

The *certainty* of a prediction is the largest probability of its distribution, from 0 to 1. The *confidence* c of a step is the mean certainty
with which its tokens were predicted. A step ends with a split token, such as a line break, which does not count.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class Certainty(DynamicLayer):
    """Additional layer of the KV cache: the certainty of the prediction at each position, and the part that the token there plays.

    ``keys`` holds the certainties. ``values`` holds the parts: 0 for a token outside thinking, 1 for a think token, 2 for a split token. Both
    are ``[rows, 1, seq, 1]``. Because they are a layer of the cache, they change with it when rows are reordered, dropped or repeated.
    """


def certainty_of(cache: Any, *, make: bool = False) -> Any:
    """Return the ``Certainty`` of a KV cache, or ``None`` if it has none.

    Args:
        cache: The KV cache, or ``None``.
        make: True to add an empty one to a cache that has none.
    """
    if cache is None:
        return None
    layer = next((layer for layer in reversed(cache.layers) if isinstance(layer, Certainty)), None)
    if layer is None and make:
        cache.layers.append(layer := Certainty())
    return layer


def step_confidence(
    certainty: Float[Tensor, "rows past"], part: Float[Tensor, "rows past"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Return confidence, variance and number of tokens of the newest step of each row, which the next token, a split token, would end.

    The variance is (c - c_before)^2 / 4, with c_before the confidence of the last step before it that has tokens; 0 if there is none. A
    step without tokens, between two split tokens, has the confidence 0 and the number 0.

    Args:
        certainty: Certainty of the prediction at each position so far.
        part: 0, 1 or 2 for the token at each position, see ``Certainty``.
    """
    # The certainty of a token is that of the prediction one position before it.
    token = torch.cat([torch.zeros_like(certainty[:, :1]), certainty[:, :-1]], dim=1)
    step, thinks = (part == 2).cumsum(dim=1), part == 1
    newest = step[:, -1:]
    # Steps without tokens are passed over, as if they were not there.
    before = step.masked_fill(~thinks | (step == newest), -1).amax(dim=1, keepdim=True)
    means = []
    for number in (newest, before):
        mine = (thinks & (step == number)).float()
        count = mine.sum(dim=1)
        means.append(((token * mine).sum(dim=1) / count.clamp(min=1), count))
    (c, count), (c_before, earlier) = means
    return c, torch.where(earlier > 0, (c - c_before).square() / 4, 0.0), count
