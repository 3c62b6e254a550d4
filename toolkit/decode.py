"""One token a row from a KV cache: rows that decode together, and how little of their cache is copied on the way.

:class:`Batch` is what sampling steps through. On a CPU in fp32, where a model attends with SDPA over whole sequences, its layers keep
what was read in two blocks: a long one that never moves, and the newest tokens, which join it every few steps. Attention is then two
small batched products, and rows leave by moving the last ones into their places. The same numbers up to rounding. Anything else
(another device, another number type, sliding windows, something that stands around attention) takes the model's own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from toolkit import hooks
from toolkit.lm import LM
from toolkit.phases import History

NEWEST = 16  # tokens of the short block: each join copies the cache once


class Batch:
    """Rows that decode together: their cache, positions and mask.

    Args:
        cache: Filled with the prompts, left padded.
        mask: 1 where a prompt has a token.
        budget: Tokens that may follow.
    """

    def __init__(self, lm: LM, cache: DynamicCache, mask: Int[Tensor, "rows width"], budget: int) -> None:
        self.lm, self.cache, self.width = lm, cache, mask.shape[1]
        self.positions = mask.sum(dim=1, keepdim=True)
        padded = bool((mask == 0).any())
        mask = F.pad(mask, (0, budget), value=1)
        # Attention's own form of the mask is made here once. Layers that see only a window, and plain attention, need another.
        implementation, full = (
            hooks.attention_name(lm.layout),
            all(type(layer) in (DynamicLayer, History) for layer in cache.layers),
        )
        ready = full and implementation.startswith("sdpa") and any(m is lm.layout.blocks[0].attention for m in lm.model.modules())
        self.mask: Tensor | None = (mask[:, None, None].bool() if padded else None) if ready else mask
        self.blocks: list[Blocks] = []
        kept: list[Any] = cache.layers[: lm.layout.n_layers]
        if ready and implementation == "sdpa" and all(_plain(layer) for layer in kept):
            cache.layers[: lm.layout.n_layers] = self.blocks = [Blocks(layer) for layer in kept]
            if self.mask is not None:  # to be added to scores
                self.mask = torch.zeros(self.mask.shape).masked_fill(~self.mask, -torch.inf)

    def acting(self) -> AbstractContextManager[None]:
        """Where :meth:`step` may be called."""
        if not self.blocks:
            return nullcontext()
        layers = {id(block.attention): own for block, own in zip(self.lm.layout.blocks, self.blocks, strict=True)}

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any):
            return layers[id(module)].attend(query, mask, kwargs.get("scaling")), None

        return hooks.replace_attention(self.lm.layout, attend)

    def step(self, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]:
        """One more token a row; logits of the next."""
        self.width += 1
        out = self.lm.model(
            input_ids=tokens[:, None],
            attention_mask=None if self.mask is None else self.mask[..., : self.width],
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.positions = self.positions + 1
        return out.logits[:, -1]

    def keep(self, left: Sequence[int]) -> list[int]:
        """Only these rows go on, in the order returned."""
        order, moves = list(left), None
        if self.blocks:  # the last rows take the places of those that leave
            staying, late = {*left}, [row for row in left if row >= len(left)]
            order = [place if place in staying else late.pop() for place in range(len(left))]
            moves = torch.tensor([(place, row) for place, row in enumerate(order) if place != row], dtype=torch.long).view(-1, 2).T
        index = torch.tensor(order, device=self.positions.device)
        layers: list[Any] = self.cache.layers
        for layer in layers:
            if isinstance(layer, Blocks) and moves is not None:
                layer.leave(len(order), *moves)
            else:
                layer.batch_select_indices(index)
        self.positions = self.positions[index]
        self.mask = None if self.mask is None else self.mask[index]
        return order


def _plain(layer: DynamicLayer) -> bool:
    kept = (layer.keys, layer.values)  # under autocast keys may be fp32 where values are not
    return all(t is not None and t.device.type == "cpu" and t.dtype == torch.float32 for t in kept)


class Blocks(DynamicLayer):
    """A layer of a KV cache in two blocks, ``keys`` and ``values`` of the tokens read long ago, and those of the newest.

    What :meth:`update` is given it gives back: only :meth:`attend` knows both blocks.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self.keys, self.values, self.count = layer.keys, layer.values, 0
        rows, heads, _, size = self.keys.shape
        self.newest = (
            self.keys.new_empty(rows, heads, NEWEST, size),
            self.values.new_empty(rows, heads, NEWEST, self.values.shape[-1]),
        )

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2] + self.count

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.count == NEWEST:
            self._join()
        for block, states in zip(self.newest, (key_states, value_states), strict=True):
            block[:, :, self.count : self.count + 1] = states
        self.count += 1
        return key_states, value_states

    def _join(self) -> None:
        assert self.keys is not None and self.values is not None
        self.keys, self.values = (torch.cat(pair, dim=2) for pair in zip((self.keys, self.values), self.newest, strict=True))
        self.count = 0

    def attend(
        self, query: Float[Tensor, "rows heads 1 size"], bias: Float[Tensor, "rows 1 1 width"] | None, scaling: float | None
    ) -> Float[Tensor, "rows 1 heads size"]:
        """What each head of each row reads; ``bias`` is added to its scores."""
        assert self.keys is not None and self.values is not None
        (rows, heads, _, size), split = query.shape, self.keys.shape[2]
        query = query.reshape(rows, self.keys.shape[1], -1, size) * (size**-0.5 if scaling is None else scaling)
        old = query @ self.keys.mT
        if bias is not None:  # it hides padding, which is all in the long block
            old += bias[..., :split]
        new = query @ self.newest[0][:, :, : self.count].mT
        weights = torch.cat([old, new], dim=-1).softmax(dim=-1)
        read = weights[..., :split] @ self.values
        read += weights[..., split:] @ self.newest[1][:, :, : self.count]
        return read.reshape(rows, 1, heads, -1)

    def leave(self, left: int, places: Int[Tensor, " moves"], rows: Int[Tensor, " moves"]) -> None:
        """The first ``left`` rows go on, after some have moved to the places of others."""
        assert self.keys is not None and self.values is not None
        if len(rows):
            for block in (self.keys, self.values, *self.newest):
                block.index_copy_(0, places, block[rows])
        self.keys, self.values = self.keys[:left], self.values[:left]
        self.newest = self.newest[0][:left], self.newest[1][:left]
