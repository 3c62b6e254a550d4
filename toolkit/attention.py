"""Attention of chosen queries only: exact rows for every family, memory linear in the context.

The tokens before the chosen queries fill a KV cache with the model's own attention (SDPA, as a rule). Then the queries pass once,
teacher-forced, a few at a time, with the family's plain attention, which forms their rows and nothing else. Sliding windows,
norms of queries and keys, soft-capping and rotations are thus the model's own, never written again here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from toolkit import hooks
from toolkit.collect import batch_tokens
from toolkit.decode import batches
from toolkit.lm import LM
from toolkit.sites import Site
from toolkit.types import Span

ROW_NUMBERS = 2**25  # attention weights of one layer that exist at a time: 128 MB in fp32


@dataclass(frozen=True)
class Rows:
    """How some queries attend in one layer. Every axis counts in the positions of the sequences themselves: no padding in front.

    Attributes:
        layer: The layer.
        examples: Which of the sequences given these are: row b is sequence ``examples[b]``.
        queries: Position of each query, -1 where a sequence has fewer of them than others.
        weights: Attention probabilities, fp32; zero at keys that a query does not see.
        scale: What the norm behind the output projection divides by at each query, fp32; 1 if none follows.
    """

    layer: int
    examples: tuple[int, ...]
    queries: Int[Tensor, "batch queries"]
    weights: Float[Tensor, "batch heads queries keys"]
    scale: Float[Tensor, "batch queries 1"]
    _values: Tensor
    _shift: Tensor

    def value_at(self, keys: Int[Tensor, "batch heads queries"]) -> Float[Tensor, "batch heads queries head_dim"]:
        """The value vector of each head at one key per query, fp32. A key out of the layer's sight gives some other key's."""
        batch, heads, _ = keys.shape
        at = (keys + self._shift[:, None, None]).clamp(0, self._values.shape[2] - 1)
        group = torch.arange(heads, device=keys.device) // (heads // self._values.shape[1])
        return self._values[torch.arange(batch, device=keys.device)[:, None, None], group[None, :, None], at].float()


Take = Callable[[Rows], None]


@torch.inference_mode()
def read(lm: LM, sequences: Sequence[Sequence[int]], spans: Sequence[Span], take: Take, *, tokens: int | None = None) -> None:
    """Call ``take(rows)`` for every layer of every few queries of every batch; the rows are gone afterwards unless it keeps them.

    Args:
        spans: The positions of the queries of each sequence. The rows at which response tokens are emitted: ``span.predictors()``.
        tokens: Padded tokens of a batch.

    Raises:
        ValueError: an empty span, one outside its sequence, or a sequence longer than the model's context.
    """
    _check(lm, sequences, spans)
    order = sorted(range(len(sequences)), key=lambda i: spans[i].stop)
    for batch in batches(order, lambda i: spans[i].stop, tokens or batch_tokens(lm)):
        _Batch(lm, batch, [sequences[i] for i in batch], [spans[i] for i in batch]).run(take)


def rows(lm: LM, ids: Sequence[int], span: Span) -> Float[Tensor, "layers heads queries keys"]:
    """All rows of the queries of one sequence, on the CPU: for looking at. Keys end with the last query."""
    kept = torch.zeros(lm.layout.n_layers, lm.layout.n_heads, len(span), span.stop)

    def take(found: Rows) -> None:
        at = (found.queries[0] - span.start).cpu()
        kept[found.layer, :, at, : found.weights.shape[-1]] = found.weights[0].cpu()

    read(lm, [ids], [span], take)
    return kept


def _check(lm: LM, sequences: Sequence[Sequence[int]], spans: Sequence[Span]) -> None:
    if not sequences or len(sequences) != len(spans):
        raise ValueError(
            f"{len(sequences)} sequences and {len(spans)} spans of queries: give one span a sequence, and at least one."
        )
    context = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    for i, (ids, span) in enumerate(zip(sequences, spans, strict=True)):
        if not len(span) or span.stop > len(ids):
            raise ValueError(
                f"Sequence {i} has {len(ids)} tokens, its queries are [{span.start}, {span.stop}): "
                "need at least one query, inside the sequence."
            )
        if context and span.stop > context:
            raise ValueError(f"Sequence {i} reaches {span.stop} tokens, past the {context} of {lm.name}'s context: shorten it.")


class _Batch:
    """Sequences that pass together: what precedes their queries left padded, the queries right padded."""

    def __init__(self, lm: LM, examples: Sequence[int], sequences: Sequence[Sequence[int]], spans: Sequence[Span]) -> None:
        self.lm, self.examples = lm, tuple(examples)
        device = lm.device
        self.starts = torch.tensor([span.start for span in spans], device=device)
        self.stops = torch.tensor([span.stop for span in spans], device=device)
        self.width = int(self.starts.max())
        self.ids = torch.full((len(spans), self.width + max(map(len, spans))), lm.tokenizer.pad_token_id or 0)
        for row, ids, span in zip(self.ids, sequences, spans, strict=True):
            first = self.width - span.start
            row[first : first + span.stop] = torch.tensor(ids[: span.stop])
        self.ids = self.ids.to(device)
        places = torch.arange(self.ids.shape[1], device=device)[None] - (self.width - self.starts)[:, None]
        self.mask = (places >= 0).long()
        self.positions = torch.minimum(places, self.stops[:, None] - 1).clamp(min=0)
        self.queries = torch.where(places < self.stops[:, None], places, -1)
        self.cache = DynamicCache(config=lm.model.config)

    def run(self, take: Take) -> None:
        step = max(1, ROW_NUMBERS // (len(self.examples) * self.lm.layout.n_heads * self.ids.shape[1]))
        # A model that attends plainly itself (soft-capping allows nothing else) would form all rows at once: a few at a time, too.
        attention: Any = self.lm.layout.blocks[0].attention
        plain = attention.config._attn_implementation.startswith("eager")
        stride = step if plain else max(1, self.width)
        for start in range(0, self.width, stride):
            self._pass(start, min(start + stride, self.width))
        for start in range(self.width, self.ids.shape[1], step):
            stop = min(start + step, self.ids.shape[1])
            with self._reading(start, stop, take):
                self._pass(start, stop)

    def _pass(self, start: int, stop: int) -> None:
        self.lm.model.base_model(
            input_ids=self.ids[:, start:stop],
            attention_mask=self.mask[:, :stop],
            position_ids=self.positions[:, start:stop],
            past_key_values=self.cache,
            use_cache=True,
        )

    @contextmanager
    def _reading(self, start: int, stop: int, take: Take) -> Iterator[None]:
        """Hand the rows of every layer to ``take`` once it is known what its heads write is divided by."""
        layout, held = self.lm.layout, dict[int, Rows]()

        def hand_on(layer: int) -> Callable[[Tensor], None]:
            norm = layout.norm(layer)

            def look(attn_out: Tensor) -> None:
                rows = held.pop(layer)
                take(rows if norm is None else replace(rows, scale=norm.scale(attn_out)))

            return look

        after = {Site("attn_out", layer): hand_on(layer) for layer in range(layout.n_layers)}
        with hooks.attending(layout, self._reader(start, stop, held), eager=True), hooks.observe(layout, after):
            yield

    def _reader(self, start: int, stop: int, held: dict[int, Rows]):
        def fn(layer: int, attend: hooks.Attend, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
            output, weights = attend(query, key, value)
            assert weights is not None, "plain attention returns its weights"
            # A layer with a sliding window holds only the last keys; the last of them is always the last token passed.
            shift = (self.width - self.starts) - (stop - key.shape[2])
            queries, aligned = self.queries[:, start:stop], self._aligned(weights, shift, stop)
            held[layer] = Rows(layer, self.examples, queries, aligned, aligned.new_ones(*queries.shape, 1), value, shift)
            return output, None

        return fn

    def _aligned(self, weights: Tensor, shift: Int[Tensor, " batch"], stop: int) -> Float[Tensor, "batch heads queries keys"]:
        """Weights over the positions of each sequence, from weights over padded (and perhaps only the last) keys."""
        # A long prompt with few queries beside a short one with many: nothing stands past the longest sequence.
        longest = min(int((stop - self.width + self.starts).max()), int(self.stops.max()))
        at = torch.arange(longest, device=weights.device)[None] + shift[:, None]
        seen = (at >= 0) & (at < weights.shape[-1])
        index = at.clamp(0, weights.shape[-1] - 1)[:, None, None].expand(*weights.shape[:3], -1)
        return weights.float().gather(-1, index) * seen[:, None, None]
