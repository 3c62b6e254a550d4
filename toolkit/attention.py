"""Exact attention rows of chosen queries, for every supported family, with memory linear in the context length.

An attention row is the attention probabilities of one query over all keys. Two steps compute it:

1. The tokens before the chosen queries are run with the model's usual attention (mostly SDPA). They fill a KV cache.
2. The queries are run from this cache, teacher-forced and a few at a time, with eager attention, which returns their rows.

Both steps run the model's code in transformers. So sliding windows, query and key norms, soft-capping and rotary embeddings are not
reimplemented here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from toolkit import hooks
from toolkit.decode import batches, check_growth
from toolkit.lm import LM
from toolkit.passes import batch_tokens
from toolkit.sites import Site
from toolkit.types import Span

ROW_NUMBERS = 2**25  # largest number of attention weights of one layer in memory at a time: 128 MB in fp32


@dataclass(frozen=True)
class Rows:
    """Attention rows of some queries in one layer: for each query, the attention probabilities over all keys.

    The axis ``batch`` runs over sequences. Positions count from the first token of a sequence, without padding.

    Attributes:
        layer: Index of the layer.
        examples: Index of each sequence of the batch in ``sequences``, the argument of ``read``.
        queries: Position of each query, ``[batch, queries]``. -1 is padding, for sequences that have fewer queries than others.
        weights: Attention probabilities ``[batch, heads, queries, keys]``, fp32; zero at keys that the query may not attend to.
        scale: Number by which the norm after ``W_O`` divides its input at each query, ``[batch, queries, 1]``, fp32; 1 in models without
            such a norm.
        gate: Factor by which the output of the attention function is multiplied, entry by entry, before it enters ``W_O``:
            ``[batch, queries, heads, head_dim]``, fp32. In most models the factor is 1. In gated attention it is the gate. In models with a
            norm before ``W_O``, it is the gain of the norm, divided by the number by which the norm divides its input.
    """

    layer: int
    examples: tuple[int, ...]
    queries: Int[Tensor, "batch queries"]
    weights: Float[Tensor, "batch heads queries keys"]
    scale: Float[Tensor, "batch queries 1"]
    gate: Float[Tensor, "batch queries heads head_dim"]
    _values: Tensor  # value vectors in the KV cache, [batch, KV heads, cached keys, head_dim]
    _shift: Tensor  # [batch]; position p of a sequence is key p + shift of the cache

    def value_at(self, keys: Int[Tensor, "batch heads queries"]) -> Float[Tensor, "batch heads queries head_dim"]:
        """Return the value vector of each head at one key per query, fp32.

        For a key outside the layer's sliding window, the result is wrong and must not be used: the key is no longer in the cache, and the
        vector of another key is returned.

        Args:
            keys: Position of the key, for each head and query.
        """
        batch, heads, _ = keys.shape
        # Column of each key in the cache, kept inside it for keys that are no longer cached.
        at = (keys + self._shift[:, None, None]).clamp(0, self._values.shape[2] - 1)
        # KV head that each query head reads: several query heads may share one.
        group = torch.arange(heads, device=keys.device) // (heads // self._values.shape[1])
        return self._values[torch.arange(batch, device=keys.device)[:, None, None], group[None, :, None], at].float()


Take = Callable[[Rows], None]
"""A function ``take(rows)`` that processes the attention rows of a few queries in one layer."""


@torch.inference_mode()
def read(lm: LM, sequences: Sequence[Sequence[int]], spans: Sequence[Span], take: Take, *, tokens: int | None = None) -> None:
    """Compute the attention rows of the queries in ``spans``, and call ``take(rows)`` for each layer, a few queries at a time.

    Rows are not stored, so ``take`` must copy or reduce the numbers that are needed later.

    Args:
        sequences: Token ids of each sequence.
        spans: One span per sequence: the positions of its queries. For the queries that predict the tokens of a span, pass
            ``span.predictors()``.
        take: Function that is called with the rows; see ``Rows``.
        tokens: Largest number of padded tokens per batch; ``None`` means ``passes.batch_tokens(lm)``.

    Raises:
        ValueError: there are no sequences, or not one span per sequence; or a span is empty, or ends outside its sequence or beyond the
            model's context.
        UnsupportedModelError: a span ends beyond the length at which the model's rotary frequencies change (``LM.frequency_limit``).
    """
    _check(lm, sequences, spans)
    # A sequence is run in several passes, from its first token on.
    check_growth(lm, ((0, span.stop) for span in spans), "Give spans of queries that end within {limit} tokens.")
    order = sorted(range(len(sequences)), key=lambda i: spans[i].stop)
    for batch in batches(order, lambda i: spans[i].stop, tokens or batch_tokens(lm)):
        _Batch(lm, batch, [sequences[i] for i in batch], [spans[i] for i in batch]).run(take)


def rows(lm: LM, ids: Sequence[int], span: Span) -> Float[Tensor, "layers heads queries keys"]:
    """Return the attention probabilities of the queries in ``span`` over all keys, in all layers and heads, on the CPU.

    If a layer has fewer heads than others, the entries of the missing heads are NaN.

    Args:
        ids: Token ids of one sequence.
        span: Positions of the queries. The keys are all positions before ``span.stop``.
    """
    weights = torch.full((lm.layout.n_layers, lm.layout.n_heads, len(span), span.stop), torch.nan)
    for layer in lm.layout.attention_layers:
        weights[layer, : lm.layout.heads[layer]] = 0.0

    def take(part: Rows) -> None:
        at = (part.queries[0] - span.start).cpu()
        weights[part.layer, : part.weights.shape[1], at, : part.weights.shape[-1]] = part.weights[0].cpu()

    read(lm, [ids], [span], take)
    return weights


def _check(lm: LM, sequences: Sequence[Sequence[int]], spans: Sequence[Span]) -> None:
    if not sequences or len(sequences) != len(spans):
        raise ValueError(
            f"{len(sequences)} sequences and {len(spans)} spans of queries: give at least one sequence, and one span per sequence."
        )
    context = lm.context
    for i, (ids, span) in enumerate(zip(sequences, spans, strict=True)):
        if not len(span) or span.stop > len(ids):
            raise ValueError(
                f"Sequence {i} has {len(ids)} tokens, its queries are [{span.start}, {span.stop}): "
                "need at least one query, and all of them inside the sequence."
            )
        if context and span.stop > context:
            raise ValueError(
                f"Sequence {i} has {span.stop} tokens up to its last query, more than the {context} of {lm.name}'s context: shorten it."
            )


class _Batch:
    """Sequences that are processed together, as one padded table of token ids ``[batch, columns]``.

    The queries of all sequences start in the same column: the tokens before them are padded on the left, the queries on the right. A
    *column* is an index into the table, a *position* an index into a sequence without padding.
    """

    def __init__(self, lm: LM, examples: Sequence[int], sequences: Sequence[Sequence[int]], spans: Sequence[Span]) -> None:
        self.lm, self.examples, self.last = lm, tuple(examples), max(span.stop for span in spans)
        device = lm.device
        self.starts = torch.tensor([span.start for span in spans], device=device)
        self.stops = torch.tensor([span.stop for span in spans], device=device)
        self.width = max(span.start for span in spans)  # column at which the queries start
        self.ids = torch.full((len(spans), self.width + max(map(len, spans))), lm.tokenizer.pad_token_id or 0)
        for row, ids, span in zip(self.ids, sequences, spans, strict=True):
            first = self.width - span.start
            row[first : first + span.stop] = torch.tensor(ids[: span.stop])
        self.ids = self.ids.to(device)
        # Position of each column in its sequence: negative in the left padding, beyond the last query in the right padding.
        places = torch.arange(self.ids.shape[1], device=device)[None] - (self.width - self.starts)[:, None]
        self.mask = (places >= 0).long()
        # positions: position ids for the model; in the padding they are clamped to valid ones. queries: the same, but -1 in the padding.
        self.positions = torch.minimum(places, self.stops[:, None] - 1).clamp(min=0)
        self.queries = torch.where(places < self.stops[:, None], places, -1)
        self.cache, self.gated = DynamicCache(config=lm.model.config), lm.gated_layers

    def run(self, take: Take) -> None:
        step = max(1, ROW_NUMBERS // (len(self.examples) * self.lm.layout.n_heads * self.ids.shape[1]))
        # step: queries per pass with eager attention, whose weights [batch, heads, queries, columns] have to fit into memory. A model whose
        # usual attention is eager (as soft-capping requires) computes such weights for the tokens before the queries too, so it also runs
        # those only a few at a time.
        plain = hooks.attention_name(self.lm.layout).startswith("eager")
        stride = step if plain else max(1, self.width)
        for start in range(0, self.width, stride):
            self._pass(start, min(start + stride, self.width))
        for start in range(self.width, self.ids.shape[1], step):
            stop = min(start + step, self.ids.shape[1])
            with self._reading(start, stop, take):
                self._pass(start, stop)

    def _pass(self, start: int, stop: int) -> None:
        self.lm.body(
            input_ids=self.ids[:, start:stop],
            attention_mask=self.mask[:, :stop],
            position_ids=self.positions[:, start:stop],
            past_key_values=self.cache,
            use_cache=True,
        )

    @contextmanager
    def _reading(self, start: int, stop: int, take: Take) -> Iterator[None]:
        """Context manager that calls ``take`` with the rows of every layer. In it, run one pass over the columns ``start`` to ``stop``.

        ``take`` is called when a layer's ``attn_out`` (the output of ``W_O``) is known, because ``Rows.scale`` is computed from it.
        """
        layout, pending = self.lm.layout, dict[int, Rows]()

        def hand_on(layer: int) -> hooks.Rewrite:
            norm = layout.norm(layer)

            def look(attn_out: Tensor, z: Tensor) -> None:
                rows = pending.pop(layer)
                scale = rows.scale if norm is None else norm.scale(attn_out)
                gate = _gate(rows.gate, z) if layer in self.gated else torch.ones_like(rows.gate, dtype=torch.float32)
                take(replace(rows, scale=scale, gate=gate))

            return hooks.reader(look)

        after = {Site("attn_out", layer): hand_on(layer) for layer in layout.attention_layers}
        with hooks.wrap_attention(layout, self._reader(start, stop, pending), eager=True), hooks.rewrite(layout, after):
            yield

    def _reader(self, start: int, stop: int, pending: dict[int, Rows]):
        """Return a wrapper of the attention function that stores the rows of each layer in ``pending``.

        The rows are not complete yet: ``scale`` is 1, and ``gate`` holds the output of the attention function. ``_reading`` computes the
        true values from them when the input and output of ``W_O`` are known.
        """

        def fn(layer: int, attend: hooks.Attend, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
            output, weights = attend(query, key, value)
            if hooks.is_unwatched():
                return output, None
            assert weights is not None, "plain attention returns its weights"
            # Number of left-padding columns, minus the number of columns whose keys are no longer cached: a layer with a sliding window
            # caches only the last keys. The last cached key is always the last token of this pass.
            shift = (self.width - self.starts) - (stop - key.shape[2])
            queries, aligned = self.queries[:, start:stop], self._aligned(weights, shift, stop)
            ones = aligned.new_ones(*queries.shape, 1)
            pending[layer] = Rows(
                layer, self.examples, queries, aligned, ones, output, value, shift
            )  # the gate follows from the output
            return output, None

        return fn

    def _aligned(self, weights: Tensor, shift: Int[Tensor, " batch"], stop: int) -> Float[Tensor, "batch heads queries keys"]:
        """Return attention weights over the positions of each sequence, without padding. The weights of keys that are not cached are 0.

        Args:
            weights: Attention weights over the keys in the cache, which is left padded. With a sliding window it holds only the last keys.
            shift: One number per sequence. The token at position p of the sequence has the key with index ``p + shift`` in the cache.
            stop: Column at which the pass ends.
        """
        # The table may have more columns than its longest sequence has tokens: one may have a long prompt, another many queries.
        # at: column of the cache that holds each position of the result, [batch, positions].
        at = torch.arange(min(stop, self.last), device=weights.device)[None] + shift[:, None]
        cached = (at >= 0) & (at < weights.shape[-1])
        index = at.clamp(0, weights.shape[-1] - 1)[:, None, None].expand(*weights.shape[:3], -1)
        return weights.float().gather(-1, index) * cached[:, None, None]


def _gate(output: Float[Tensor, "batch queries heads head_dim"], z: Float[Tensor, "batch queries z"]) -> Tensor:
    """Return the factor by which the attention function's output is multiplied to give z, the input of ``W_O``; 0 where the output is 0."""
    after = z.reshape(output.shape).float()
    return torch.where(output == 0, 0.0, after / output.float())
