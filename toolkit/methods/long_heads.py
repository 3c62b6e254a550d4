"""LongHeads: multi-head attention is secretly a long context processor (Lu et al., 2024), arXiv:2402.10685.

A text that is longer than a model's training texts is cut into chunks. Each head attends, at each token, to a few whole chunks that it
selects itself. Together they are no longer than a training text, and they get consecutive positions, so no position is new to the model.
Nothing is trained.

Equations, for one head. w: tokens per chunk; k: chunks attended, so that the window has ``k w`` tokens; d: size of a head; Q_i, K_i, V_i:
queries, keys and values of chunk i; R(p): rotation by position p; q_t: query of token t before any rotation; j: chunk of token t::

    o_i   = R(0..w-1) Q_i attends to R(0..w-1) K_i, V_i            softmax(. / sqrt d), every token of the chunk to every other, no mask
    u_i   = mean of o_i over the chunk's tokens                    query of the chunk
    c_i   = softmax(u_i (R K_i)^T / sqrt d) R K_i                  key of the chunk: a mean of its rotated keys
    s_t,i = q_t . c_i                                              score of chunk i for token t
    S_t   = {0, j - 1, j} and the k - 3 other chunks before j - 1 with the highest scores, in ascending order

Token t attends causally to the chunks of S_t. The chunk with rank r in S_t gets the positions ``r w .. r w + w - 1``, and t itself the
position ``(|S_t| - 1) w + (t mod w)``. If t has at most k chunks before it, its own included, S_t holds them all: that is full attention.

Keys are rotated by their position within the chunk only, ``t mod w``. The rest of the rotation depends on token and chunk, is a multiple of
w, and is done on the query.

Deviations: chunks are also selected within a first window, where they are all chunks; the result is the same as the ordinary attention of
the paper's code. With grouped keys (several query heads per key head), each query head has its own chunk keys; the paper's models have no
groups. The rules ``random``, ``sinks`` and ``recent`` are controls of ours. The paper uses w = 256 and a window of 4,096 tokens for models
trained on 4,096; for other models both are arguments.

Units and signs: lengths in tokens; scores in the units of attention logits times sqrt d, higher is selected first.

Cost: for n tokens, attention takes ``n k w`` products per head instead of ``n^2 / 2``. The scores take ``n^2 / w``, a share of ``1 / w`` of
full attention, which is small at the lengths that are measured here. All keys and values stay in memory, as with full attention.
Not tested on a GPU, where the loops over heads and chunks are slow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from toolkit import chunk_attention, hooks, tensors
from toolkit import lm as lms
from toolkit.lm import LM
from toolkit.sites import UnsupportedModelError
from toolkit.types import Span

PUBLISHED_CHUNK, PUBLISHED_WINDOW = 256, 4096  # tokens; released code, for Llama-2 with a context of 4,096
RULES = ("scores", "random", "sinks", "recent")
FORCED = 3  # chunks that are always attended: the first, the one before the token's own, and its own
SCORE_NUMBERS = 2**24  # largest number of scores in memory at a time: 64 MB in fp32
ORIGINAL = "context_before_extension"  # entry of a config: the model's own context, which ``extended`` keeps there
TOLERANCE = 1e-3  # of the check at entry: largest difference of logits from full attention, relative to the largest logit

Take = Callable[[int, Int[Tensor, "heads queries chunks"], int], None]
"""``take(layer, chosen, past)``: called for every layer in every pass, with the chosen chunks (see ``choose``) of the tokens from ``past``."""


@dataclass(frozen=True)
class LongHeads:
    """An intervention in which every head attends, at each token, to a few chunks of the text. Use it in ``Condition(lm, (LongHeads(),))``.

    One sequence is read at a time: sample with ``Sampling(batch_size=1)``. To sample beyond the context in the model's config, use the
    model that ``extended`` returns.

    Attributes:
        chunk: Tokens per chunk, w.
        window: Tokens that a head attends to at most, ``k w``; at most the length of the texts that the model was trained on.
        rule: How chunks other than the forced ones are chosen. ``scores``: as published. Controls with the same cost: ``random`` (other
            chunks at random), ``sinks`` (the first chunk and the latest ones) and ``recent`` (the latest chunks only: a sliding window).
        seed: Seed of the rule ``random``. Texts of equal length get the same chunks, so give several seeds if needles are at one place.
    """

    chunk: int = PUBLISHED_CHUNK
    window: int = PUBLISHED_WINDOW
    rule: str = "scores"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule={self.rule!r}: choose one of {', '.join(RULES)}.")
        if self.chunk < 1 or self.window % self.chunk or self.chunks < FORCED + 1:
            raise ValueError(
                f"chunk={self.chunk}, window={self.window}: the window must be a multiple of the chunk, and at least {FORCED + 1} chunks long."
            )

    @property
    def chunks(self) -> int:
        """Number of chunks that a head attends to at most, k."""
        return self.window // self.chunk

    def __call__(self, lm: LM) -> AbstractContextManager[None]:
        """Return a context manager in which the heads of ``lm`` attend to chunks.

        Raises:
            UnsupportedModelError: the model does not have one rotary module for all layers, or its attention computes something that this
                form does not, such as a sliding window. It is raised by this call, before the context is entered.
            ValueError: the window is longer than the context of the model, before any ``extended``.
        """
        return self.recording(lm, None)

    def recording(self, lm: LM, take: Take | None) -> AbstractContextManager[None]:
        """Return the context manager of ``__call__``, in which ``take`` gets the chosen chunks of every pass."""
        rotary = _rotary(lm)
        config = lm.model.config.get_text_config()
        context = getattr(config, ORIGINAL, None) or getattr(config, "max_position_embeddings", None)
        if context and self.window > context:
            raise ValueError(
                f"window={self.window} is longer than the context of {lm.name}, {context} tokens as loaded: its last positions would be new "
                f"to the model. Give a window of at most {context}."
            )
        _check(lm, rotary)
        return self._acting(lm, rotary, take)

    @contextmanager
    def _acting(self, lm: LM, rotary: Any, take: Take | None) -> Iterator[None]:
        """Reduce positions to those within a chunk, and replace the attention function of every layer."""
        turns = chunk_attention.Turns.of(lm, rotary, self.chunk, self.chunks)
        states = {layer: _State(self.chunk) for layer in lm.layout.attention_layers}

        def fn(layer: int, attend: hooks.Attend, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
            if len(query) != 1:
                raise ValueError(f"LongHeads reads one sequence at a time, and got {len(query)}: set batch_size=1 and n=1.")
            scale = getattr(lm.layout.blocks[layer].attention, "scaling", query.shape[-1] ** -0.5)
            q, k, v, past = query[0], key[0], value[0], key.shape[2] - query.shape[2]
            keys = states[layer].update(q, k, v, scale)
            at = torch.arange(past, past + q.shape[1], device=q.device)
            chosen = choose(turns.unrotated(q, at), keys, at, self, layer)
            if take is not None:
                take(layer, chosen, past)
            return chunk_attention.attend_chunks(turns, (q, k, v), chosen, at, scale).transpose(0, 1)[None].to(query.dtype), None

        with hooks.rewrite_positions([rotary], lambda ids: ids % self.chunk), hooks.wrap_attention(lm.layout, fn):
            yield


@dataclass
class _State:
    """Chunk keys of one layer, and the queries of the last, unfinished chunk.

    Attributes:
        chunk: Tokens per chunk.
        keys: Keys of all full chunks so far, ``[heads, chunks, d]``.
        queries: Queries of the tokens after them, rotated by their positions within the chunk, ``[heads, tokens, d]``.
    """

    chunk: int
    keys: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    queries: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def update(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Float[Tensor, "heads chunks d"]:
        """Add the chunks that a pass completes, and return the keys of all full chunks.

        Args:
            query: Queries of the pass, ``[heads, queries, d]``.
            key, value: Keys and values of all tokens so far, ``[KV heads, keys, d]``.
            scale: Factor on attention logits.

        Raises:
            ValueError: the pass neither begins a text nor continues the one before.
        """
        past, w = key.shape[1] - query.shape[1], self.chunk
        if past == 0:
            self.keys = self.queries = query[:, :0]
        done = self.keys.shape[1] * w  # tokens in full chunks before this pass
        if past != done + self.queries.shape[1]:
            raise ValueError(
                f"A pass begins at token {past}, the one before ended at token {done + self.queries.shape[1]}: LongHeads needs the passes over "
                "a text in order."
            )
        queries = torch.cat([self.queries, query], dim=1)
        full = key.shape[1] // w * w
        if full > done:
            group = query.shape[0] // key.shape[0]
            q, k, v = (
                x.unflatten(1, (-1, w))
                for x in (queries[:, : full - done], *(x[:, done:full].repeat_interleave(group, dim=0) for x in (key, value)))
            )
            self.keys = torch.cat([self.keys, chunk_attention.chunk_keys(q, k, v, scale)], dim=1)
        self.queries = queries[:, full - done :].clone()
        return self.keys


def choose(
    query: Float[Tensor, "heads queries d"],
    keys: Float[Tensor, "heads full d"],
    at: Int[Tensor, " queries"],
    settings: LongHeads,
    layer: int = 0,
) -> Int[Tensor, "heads queries k"]:
    """Return the chunks that each head attends to at each token, S_t, in ascending order.

    Tokens with fewer than k chunks have all of them; their other entries are the number of all chunks, which is no chunk.

    Args:
        query: Queries before rotation.
        keys: Keys of all full chunks, from ``chunk_attention.chunk_keys``.
        at: Position of each query in the text.
        settings: Chunk, window and rule.
        layer: Index of the layer; the rule ``random`` draws other chunks in each.
    """
    own = at // settings.chunk
    n = int(own.max()) + 1
    parts = max(1, SCORE_NUMBERS // (query.shape[0] * n))
    generator = torch.Generator().manual_seed(1_000_003 * settings.seed + 1_009 * layer + int(at[0]))
    chosen = []
    for start in range(0, len(at), parts):
        q, j = query[:, start : start + parts], own[start : start + parts, None]
        i = torch.arange(n, device=q.device)
        match settings.rule:
            case "scores":
                scores = F.pad(q.float() @ keys.float().mT, (0, n - keys.shape[1]))
            case "random":
                scores = torch.rand(len(q), q.shape[1], n, generator=generator).to(q.device)
            case _:
                scores = i.float().expand(len(q), q.shape[1], n)
        first = (i == 0) & (settings.rule != "recent")
        scores = scores.masked_fill(first | (i == j) | (i == j - 1), torch.inf).masked_fill(i > j, -torch.inf)
        top = scores.topk(min(settings.chunks, n), dim=-1)
        chosen.append(top.indices.masked_fill(top.values == -torch.inf, n).sort(dim=-1).values)
    return torch.cat(chosen, dim=1)


def extended(lm: LM, context: int) -> LM:
    """Return a copy of a model with another largest number of tokens of a text, ``max_position_embeddings``. All weights are shared.

    Nothing else changes: with the model's own attention, positions beyond the trained context are new to it. The config also keeps the
    context of the original model, which a window of ``LongHeads`` may not exceed.
    """
    if context < 1:
        raise ValueError(f"context={context}: expected a positive number of tokens.")
    model = tensors.copied(lm.model)
    config = model.config.get_text_config()
    if not hasattr(config, ORIGINAL):
        setattr(config, ORIGINAL, getattr(config, "max_position_embeddings", None))
    config.max_position_embeddings = context
    return lms.child(lm, model, f"{lm.name}, context {context}")


@torch.inference_mode()
def selections(lm: LM, ids: Sequence[int], span: Span, settings: LongHeads) -> Bool[Tensor, "layers heads queries chunks"]:
    """Return, for each head and each token of ``span``, which chunks it attends to while the model reads a text with LongHeads.

    Layers with fewer heads than others have False in the missing ones.

    Args:
        ids: Token ids of the text.
        span: Tokens whose choices are returned.
        settings: Chunk, window and rule.
    """
    n = -(-len(ids) // settings.chunk)
    marks = torch.zeros(lm.layout.n_layers, lm.layout.n_heads, len(span), n + 1, dtype=torch.bool)

    def take(layer: int, chosen: Tensor, past: int) -> None:
        marks[layer, : len(chosen)].scatter_(2, chosen[:, span.start - past : span.stop - past].cpu(), True)

    with settings.recording(lm, take):
        lm.body(input_ids=torch.tensor([list(ids)], device=lm.device), use_cache=False)
    return marks[..., :n]


def hit_rates(
    chosen: Bool[Tensor, "layers heads queries chunks"], span: Span, needle: Span, settings: LongHeads
) -> Float[Tensor, "layers heads"]:
    """Return the share of queries, 0 to 1, at which each head selects all chunks of a needle by their scores.

    Queries for which one of these chunks is forced (the first chunk, the query's own or the one before) are left out; without any other
    query, the share is NaN.

    Args:
        chosen: From ``selections``.
        span: The queries in ``chosen``.
        needle: Token span of the needle.
        settings: The settings of ``selections``.
    """
    free, holds = _free(span, needle, settings)
    return chosen[:, :, free][..., holds].all(dim=-1).double().mean(dim=-1)


def chance_of_hits(span: Span, needle: Span, settings: LongHeads) -> float:
    """Return the ``hit_rates`` of a head that selects its chunks at random, 0 to 1; NaN without a query that counts.

    Of F chunks that are not forced, s are selected, m of which hold the needle: the chance is C(F - m, s - m) / C(F, s), mean over queries.

    Args:
        span: Queries, as in ``hit_rates``.
        needle: Token span of the needle.
        settings: Chunk and window.
    """
    free, holds = _free(span, needle, settings)
    m, chances = len(holds), []
    for own in (torch.arange(span.start, span.stop)[free] // settings.chunk).tolist():
        others = own - FORCED + 1  # chunks before the query's own, without the first and the last one
        selected = min(settings.chunks - FORCED, others)
        chances.append(math.comb(others - m, selected - m) / math.comb(others, selected) if selected >= m else 0.0)
    return sum(chances) / len(chances) if chances else math.nan


def _free(span: Span, needle: Span, settings: LongHeads) -> tuple[Bool[Tensor, " queries"], Int[Tensor, " chunks"]]:
    """Return which queries have none of the needle's chunks forced, and the needle's chunks."""
    holds = torch.arange(needle.start // settings.chunk, (needle.stop - 1) // settings.chunk + 1)
    own = torch.arange(span.start, span.stop) // settings.chunk
    return bool((holds > 0).all()) & (own - 1 > holds.max()), holds


def _rotary(lm: LM) -> Any:
    """Return the model's rotary module. Raise UnsupportedModelError unless there is one for all layers, and no sliding window."""
    names, config = tensors.rotary(lm.model), lm.model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    slides = {*kinds} != {"full_attention"} if kinds else getattr(config, "sliding_window", None) is not None
    if len(names) != 1 or slides or not hasattr(chunk_attention.attention_code(lm), "apply_rotary_pos_emb"):
        raise UnsupportedModelError(
            f"{lm.name} cannot be read in chunks: expected one rotary module and full attention in all layers, found {len(names)} rotary "
            f"modules and {'other' if slides else 'full'} attention."
        )
    return lm.model.get_submodule(names[0])


@torch.inference_mode()
def _check(lm: LM, rotary: Any) -> None:
    """Check that reading a short random text in chunks, all of them selected, gives the same logits as the model's own attention.

    Raises:
        UnsupportedModelError: the logits differ.
    """
    settings = LongHeads(4, 32)
    ids = torch.randint(lm.vocab_size, (1, 30), generator=torch.Generator().manual_seed(0)).to(lm.device)
    full = lm.model(ids, use_cache=False).logits.float()
    with settings._acting(lm, rotary, None):
        ours = lm.model(ids, use_cache=False).logits.float()
    error = float((ours - full).abs().max() / full.abs().max())
    if not error <= (TOLERANCE if lm.model.dtype == torch.float32 else 50 * TOLERANCE):
        raise UnsupportedModelError(
            f"{lm.name} cannot be read in chunks: with all chunks selected its logits differ from full attention (by {error:.2g})."
        )
