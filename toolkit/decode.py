"""Batched decoding with a KV cache, one token per row per step, with few copies of the cache.

A row is one response. ``prefill`` runs the prompts and returns their KV cache; ``Batch`` decodes the rows step by step from this cache.

A cache that grows by one token per step is copied at every step. On a CPU in fp32 this is avoided: each layer's cache has two blocks.
New tokens are written into the short block, which is appended to the long one every few steps. A row that has ended is removed by moving
one of the last rows into its place. The logits are the same as with the model's own cache, up to rounding.

The two blocks are used only on a CPU in fp32, and only if every layer has SDPA attention over all keys and values in its cache. In all
other cases, the model's own cache and attention are used. Examples are a GPU, sliding windows, latent attention (its keys are compressed),
and an attention function that is wrapped (``hooks.wrap_attention``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
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
from toolkit.sites import UnsupportedModelError
from toolkit.tensors import upload

NEWEST = 16  # tokens in the short block; appending it to the long block copies the cache once


def batches(
    items: Sequence[Any],
    length: Callable[[Any], int],
    tokens: int,
    *,
    most: int | None = None,
    shared: Callable[[Any], Hashable] | None = None,
    limit: int | None = None,
) -> list[list[Any]]:
    """Cut a list of items, sorted by length, into batches of at most ``tokens`` padded tokens and at most ``most`` items.

    Every batch has at least one item, even if that item is longer than ``tokens``.

    Args:
        items: The items, shortest first.
        length: Function from an item to its length in tokens.
        tokens: Largest number of padded tokens per batch. A batch has (number of items) x (length of its longest item) padded tokens. With
            ``shared``, the number of different keys replaces the number of items.
        most: Largest number of items per batch; ``None`` for no limit.
        shared: Function from an item to a key. In each batch, items with equal keys count as one item, because ``prefill`` runs equal
            prompts once. ``None``: every item counts.
        limit: No batch has both items of at most this length and longer ones (see ``LM.frequency_limit``). ``None`` for no such limit.

    >>> batches([2, 2, 3, 9], lambda item: item, tokens=6)
    [[2, 2], [3], [9]]
    >>> batches([2, 2, 3, 9], lambda item: item, tokens=6, shared=lambda item: item)
    [[2, 2, 3], [9]]
    >>> batches([2, 2, 3, 9], lambda item: item, tokens=99, limit=2)
    [[2, 2], [3, 9]]
    """
    cut: list[list[Any]] = []
    keys: set[Hashable] = set()  # of the last batch
    for place, item in enumerate(items):
        key = place if shared is None else shared(item)
        counted = len(keys) + (key not in keys)
        apart = bool(cut) and limit is not None and length(cut[-1][-1]) <= limit < length(item)
        if cut and not apart and counted * length(item) <= tokens and (most is None or len(cut[-1]) < most):
            cut[-1].append(item)
        else:
            cut.append([item])
            keys.clear()
        keys.add(key)
    return cut


def check_growth(lm: LM, sequences: Iterable[tuple[int, int]], remedy: str) -> None:
    """Check that no sequence grows in a KV cache beyond the length at which the model's rotary frequencies change.

    Args:
        sequences: For each sequence, its number of tokens after the first pass, and at the end.
        remedy: Advice to the user, put at the end of the error message; ``{limit}`` in it is replaced by the length.

    Raises:
        UnsupportedModelError: a sequence does (``LM.frequency_limit``).
    """
    if (limit := lm.frequency_limit) is None:
        return
    for begun, tokens in sequences:
        if begun <= limit < tokens:
            raise UnsupportedModelError(
                f"The rotary frequencies of {lm.name} change beyond {limit} tokens, and a sequence may grow from {begun} to {tokens} tokens: "
                f"keys that are cached before would not fit those after. {remedy.format(limit=limit)}"
            )


def prefill(lm: LM, prompts: Sequence[list[int]]) -> tuple[DynamicCache, Float[Tensor, "rows vocab"], Int[Tensor, "rows width"]]:
    """Run the model over left-padded prompts, and return what decoding starts from: the KV cache, logits and attention mask.

    Equal prompts are run once, and their result is copied.

    Returns:
        Three parts, each with one row per prompt, in order: the KV cache, the logits that predict the first token after the prompt, and the
        attention mask (1 for a token, 0 for padding).
    """
    first: dict[tuple[int, ...], int] = {}
    which = [first.setdefault(tuple(p), len(first)) for p in prompts]  # for each prompt, its row among the different prompts
    width = max(map(len, prompts))
    ids = torch.full((len(first), width), lm.tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for prompt, row in first.items():
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    padded = any(len(prompt) < width for prompt in first)
    ids, mask = ids.to(lm.device), mask.to(lm.device)
    cache = DynamicCache(config=lm.model.config)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    # By index and not as a slice: torch multiplies a slice of a bf16 sequence as a batch, with a copy of the LM head for every row.
    last = torch.tensor([width - 1], device=lm.device)
    out = lm.model(
        input_ids=ids,
        attention_mask=mask if padded else None,  # without a mask, attention is faster
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last,
    )
    index = torch.tensor(which, device=lm.device)
    for layer in cache.layers:
        select_rows(layer, index)
    return cache, out.logits[:, -1][index], mask[index]


class Batch:
    """Rows (responses) that are decoded together, with their KV cache, attention mask and the position of each row's next token.

    Args:
        cache: KV cache of the left-padded prompts, from ``prefill``.
        mask: Attention mask of the prompts, from ``prefill``: 1 for a token, 0 for padding.
        budget: Largest number of decoding steps; the attention mask is made long enough for all of them at the start.
    """

    def __init__(self, lm: LM, cache: DynamicCache, mask: Int[Tensor, "rows width"], budget: int) -> None:
        self.lm, self.cache, self.width = lm, cache, mask.shape[1]
        self.positions = mask.sum(dim=1, keepdim=True)
        padded = bool((mask == 0).any())
        mask = F.pad(mask, (0, budget), value=1)
        # Without padding no mask is needed. Else SDPA needs it as bool with four axes: bring it into this form only once, here. Sliding windows
        # and eager attention need other forms and get the plain mask; transformers then converts it at every step.
        implementation, full = (
            hooks.attention_name(lm.layout),
            all(type(layer) in (DynamicLayer, History) for layer in cache.layers),
        )
        ready = full and implementation.startswith("sdpa") and any(m is lm.layout.attention for m in lm.model.modules())
        self.mask: Tensor | None = (mask[:, None, None].bool() if ready else mask) if padded else None
        self.blocks: list[Blocks] = []
        layers: list[Any] = cache.layers[: lm.layout.n_layers]
        if ready and implementation == "sdpa" and all(_on_cpu_in_fp32(layer) for layer in layers) and lm.caches_keys:
            cache.layers[: lm.layout.n_layers] = self.blocks = [Blocks(layer) for layer in layers]
            if self.mask is not None:  # ``Blocks.attend`` adds the mask to the attention scores
                self.mask = torch.zeros(self.mask.shape).masked_fill(~self.mask, -torch.inf)

    def acting(self) -> AbstractContextManager[None]:
        """Return a context manager inside which ``step`` must be called.

        On a CPU in fp32, the KV cache may be stored in two blocks per layer (``Blocks``), which the model's own attention cannot read.
        Inside the context, attention reads both blocks. In all other cases the context does nothing.
        """
        if not self.blocks:
            return nullcontext()
        layers = {id(block.attention): cached for block, cached in zip(self.lm.layout.blocks, self.blocks, strict=True)}

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any):
            return layers[id(module)].attend(query, mask, kwargs.get("scaling")), None

        return hooks.replace_attention(self.lm.layout, attend)

    def step(self, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]:
        """Append one token to each row, and return the logits that predict the token after it. Call it inside ``with acting()``."""
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
        """Keep only the rows ``left``. Return the old index of each kept row, in the new order, which may differ from that of ``left``.

        Args:
            left: Indices of the rows to keep.
        """
        order, moves = list(left), None
        if self.blocks:  # the last rows move into the places of removed rows, so that few rows are copied
            # staying: rows to keep; late: those of them that lie beyond the new number of rows, and so have to move.
            staying, late = {*left}, [row for row in left if row >= len(left)]
            order = [place if place in staying else late.pop() for place in range(len(left))]
            # Pairs (place, row) for the rows that move, as two tensors.
            moves = torch.tensor([(place, row) for place, row in enumerate(order) if place != row], dtype=torch.long).view(-1, 2).T
        index = upload(torch.tensor(order), self.positions.device)
        layers: list[Any] = self.cache.layers
        for layer in layers:
            if isinstance(layer, Blocks) and moves is not None:
                layer.leave(len(order), *moves)
            else:
                select_rows(layer, index)
        self.positions = self.positions[index]
        self.mask = None if self.mask is None else self.mask[index]
        return order


def select_rows(layer: Any, index: Int[Tensor, " rows"]) -> None:
    """Select rows of one layer of a KV cache, in place. The new row i is the old row ``index[i]``; an index may occur several times."""
    if (keys := getattr(layer, "keys", None)) is not None:  # the layers of a big model may be on several devices
        index = index.to(keys.device)
    # Layers with a recurrent state have only ``reorder_cache``, which does the same.
    if hasattr(layer, "batch_select_indices"):
        layer.batch_select_indices(index)
    else:
        layer.reorder_cache(index)


def _on_cpu_in_fp32(layer: DynamicLayer) -> bool:
    tensors = (layer.keys, layer.values)  # under autocast keys may be fp32 although values are not
    return all(t is not None and t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


class Blocks(DynamicLayer):
    """One layer of a KV cache, stored in two blocks.

    The attribute ``newest`` is the short block: the keys and values of the last ``count`` tokens. The attributes ``keys`` and ``values``
    are the long block, which holds all tokens before them.

    The model's attention function must be replaced by ``attend``, which reads both blocks. Any other attention function would see only the
    newest token, because ``update`` returns only the keys and values of that token.
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
        # Append the short block to the long one.
        assert self.keys is not None and self.values is not None
        self.keys, self.values = (torch.cat(pair, dim=2) for pair in zip((self.keys, self.values), self.newest, strict=True))
        self.count = 0

    def attend(
        self, query: Float[Tensor, "rows heads 1 size"], bias: Float[Tensor, "rows 1 1 width"] | None, scaling: float | None
    ) -> Float[Tensor, "rows 1 heads value_size"]:
        """Return the attention output for the newest token of each row, over the keys and values of both blocks.

        Args:
            query: Query of the newest token.
            bias: Number to add to the score of each key: -inf for padding, else 0. ``None`` if there is no padding.
            scaling: Factor on the scores; ``None`` means 1 / sqrt(head size).
        """
        assert self.keys is not None and self.values is not None
        (rows, heads, _, size), split = query.shape, self.keys.shape[2]
        # Several query heads may share one KV head: group them, [rows, KV heads, query heads per KV head, size].
        query = query.reshape(rows, self.keys.shape[1], -1, size) * (size**-0.5 if scaling is None else scaling)
        old = query @ self.keys.mT
        if bias is not None:  # padding is all in the long block
            old += bias[..., :split]
        new = query @ self.newest[0][:, :, : self.count].mT
        weights = torch.cat([old, new], dim=-1).softmax(dim=-1)
        read = weights[..., :split] @ self.values
        read += weights[..., split:] @ self.newest[1][:, :, : self.count]
        return read.reshape(rows, 1, heads, -1)

    def leave(self, left: int, places: Int[Tensor, " moves"], rows: Int[Tensor, " moves"]) -> None:
        """Remove rows that have ended: copy row ``rows[i]`` over row ``places[i]`` for every i, then keep only the first ``left`` rows.

        Args:
            left: Number of rows to keep.
            places: Indices of the rows to overwrite. They are smaller than ``left``.
            rows: Indices of the rows that are copied there. They are ``left`` or larger.
        """
        assert self.keys is not None and self.values is not None
        if len(rows):
            for block in (self.keys, self.values, *self.newest):
                block.index_copy_(0, places, block[rows])
        self.keys, self.values = self.keys[:left], self.values[:left]
        self.newest = self.newest[0][:left], self.newest[1][:left]
