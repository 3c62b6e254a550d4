"""Find retrieval heads: score each attention head by how much it copies from the piece of the prompt that holds the answer.

The method is that of "Retrieval Head Mechanistically Explains Long-Context Factuality" (Wu et al., ICLR 2025), arXiv:2404.15574.

The *needle* is the piece of the prompt that the answer should be copied from. An *example* is one response to a prompt with a needle. The
*emitted* tokens are the response tokens that are evaluated: those in ``Example.emitted``, such as the answer, or by default all of them.

Equations (k: set of the needle's token ids; i_q: positions of the needle in the prompt; x: token ids of prompt and response; t: position
that predicts an emitted token; w_t = x_{t+1}: that token; a_h(t, j): attention weight of head h from t to j; j* = argmax_j a_h(t, j)):

    h copies w_t   iff   w_t in k   and   j* in i_q   and   x_{j*} = w_t
    score(h) = | g_h  cap  k | / | k |          g_h: set of tokens that h copies in one example; cap: intersection; mean over examples

Deviations:

* g_h is a set, as in the paper. The released code counts a token every time it is copied, so its scores can exceed 1.
* All examples count by default. With ``scores(..., when="success")``, an example counts only if its response retrieved the needle, as in
  the released code (the paper does not mention this). The released code decides by the share of the needle's stemmed words that the
  response contains. This module decides by the share of the needle's tokens (``needles.needle_recalled``).
* The caller gives the position of the needle. The released code searches for it.
* The response is read teacher-forced: heads are measured while the model reads a finished response. The released code measures them while
  the model generates.

The metrics (``METRICS``) are the published score, ``copy``, and seven others. Each has one value per example, layer and head:

    copy           share of the needle's distinct tokens that the head copies, as above
    copy_no_sink   like copy, but the argmax j* is over all keys except the first ``sinks`` positions of the sequence
    copy_unseen    like copy, but k holds only the tokens that occur nowhere else in the prompt; NaN if there are none
    copy_new       like copy, but only copies with x_{j*-1} != x_t count, since an induction head makes those with x_{j*-1} = x_t
    mass           attention on the needle: mean over t of sum_{j in i_q} a_h(t, j)
    contrast       mass minus the mass for a control prompt, in which other tokens replace the needle; the response and the
                   positions i_q are the same; NaN without a control prompt
    query          attention on the needle from the tokens of the question, mean over these tokens; NaN if the position of the
                   question is not given. The score of QRHead (arXiv:2506.09944), without its calibration and its cut of
                   tokens with little attention
    write          direct effect on the logit of the emitted token, through the needle position that the head attends to most:
                   mean of a_h(t, j') <u(w_t), W_O^h v_h(j')> over the emitted tokens in k; 0 if no token of k is emitted

In ``write``, j' = argmax_{j in i_q} a_h(t, j), v_h(j') is the head's value vector, W_O^h its part of W_O, and u(w) the unembedding of w
minus the mean unembedding of all tokens. Some families (such as Gemma 2) have a post-norm: a norm between W_O and the residual stream. It
is included: the head's output is divided by the norm's root mean square at t and multiplied by its gain. In models with a gate or a norm
before W_O, v_h(j') is also multiplied by the factor that these apply at t (``attention.Rows.gate``). The model's final norm is left out,
both its divisor and its gain.

Units and signs: all metrics are shares in [0, 1] (``contrast`` in [-1, 1]), except ``write``, which is in logits before the final norm. It
is positive if the head raises the logit of the emitted token. In all metrics, a higher value means that the head retrieves more.

Cost: one forward pass over each prompt and response. ``contrast`` needs another pass if the example has a control prompt. ``query`` needs
another if the position of the question is given. Attention weights are kept only for the query positions that a metric needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from toolkit import attention, origins
from toolkit.collect import pad_right
from toolkit.lm import LM
from toolkit.needles import Example, needle_recalled
from toolkit.types import HeadEdit, HeadScores, Plan, Provenance, Span

PUBLISHED_THRESHOLD = 0.1  # mean score above which a head is a retrieval head: paper, section 2
PUBLISHED_STRONG = 0.5  # second threshold in the paper's sparsity figure
PUBLISHED_MASKED = (0, 2, 5, 10, 15, 20, 30, 50, 100)  # numbers of heads masked in needle-in-a-haystack: paper, section 4
PUBLISHED_SHARES = {  # model -> shares of its heads with a mean score above 0.1, above 0.5, and of exactly 0
    "Llama-2-7B-80K": (0.0322, 0.0059, 0.702),
    "Llama-2-13B-64K": (0.0206, 0.0037, 0.732),
    "Yi-6B-200K": (0.0518, 0.0068, 0.494),
    "Qwen1.5-14B": (0.0381, 0.0063, 0.534),
    "Qwen1.5-14B-Chat": (0.0425, 0.0006, 0.711),
    "Mistral-7B-v0.2": (0.0420, 0.0049, 0.650),
    "Mixtral-8x7B": (0.0615, 0.0068, 0.576),
}  # computed from the released head_score files
assumed_sinks = 1  # number of first positions of the sequence (attention sinks) that copy_no_sink ignores as keys: ours
GROUP_SIZE = 32  # examples measured at a time, which bounds the memory for the tokens that heads copy

METRICS = ("copy", "copy_no_sink", "copy_unseen", "copy_new", "mass", "contrast", "query", "write")
COPY_METRICS = METRICS[:4]


@dataclass(frozen=True)
class HeadMetrics:
    """Metrics of how much each attention head retrieves a needle from the prompt, per head and example, from ``measure``.

    A needle is the piece of a prompt that the answer should be copied from. An example is one response to such a prompt. ``a + b``
    concatenates the examples of two measurements of the same model.

    Attributes:
        values: Name of a metric, such as ``"copy"`` (``METRICS`` has all names) -> tensor ``[examples, layers, heads]``. In layers with
            fewer heads than others, the last entries are NaN.
        success: For each example, True if the response retrieved the needle.
        ids: Problem id of each example.
        provenance: Which model was measured, and on which problems.
    """

    values: Mapping[str, Float[Tensor, "examples layers heads"]]
    success: tuple[bool, ...]
    ids: tuple[str, ...]
    provenance: Provenance

    def __add__(self, other: HeadMetrics) -> HeadMetrics:
        """Return one measurement with the examples of both. Raise ValueError if the two differ in model or metrics."""
        if self.provenance.fingerprint != other.provenance.fingerprint or set(self.values) != set(other.values):
            raise ValueError(
                f"These measurements do not belong together: {self.provenance.model} and {other.provenance.model}, "
                f"metrics {', '.join(self.values)} and {', '.join(other.values)}."
            )
        values = {name: torch.cat([value, other.values[name]]) for name, value in self.values.items()}
        about = replace(self.provenance, notes=origins.join_notes(self.provenance.notes, other.provenance.notes))
        return HeadMetrics(values, self.success + other.success, self.ids + other.ids, about)

    @property
    def present(self) -> Bool[Tensor, "layers heads"]:
        """Mask ``[layers, heads]`` of the heads that exist. In layers with fewer heads than others, the last entries are False."""
        return ~self.values["mass"].isnan().all(dim=0)

    def select(self, metric: str = "copy", *, when: str = "all") -> Float[Tensor, "examples layers heads"]:
        """Return the values of one metric in the chosen examples. Examples in which the metric is undefined (NaN) are left out.

        Args:
            metric: One of ``METRICS``.
            when: ``"all"``, or ``"success"`` for only the examples that retrieved the needle.

        Raises:
            KeyError: The metric is unknown.
            ValueError: ``when`` is unknown, or no example is left to return.
        """
        if metric not in self.values:
            raise KeyError(f"No metric {metric!r}: choose from {', '.join(self.values)}.")
        if when not in ("all", "success"):
            raise ValueError(f"when={when!r}: choose 'all' or 'success'.")
        value = self.values[metric]
        selected = ~value[:, self.present].isnan().any(dim=1) & (torch.tensor(self.success) | (when == "all"))
        if not selected.any():
            raise ValueError(
                f"No example has a {metric!r} score ({when}): of {len(self.success)}, {sum(self.success)} succeeded. 'contrast' needs "
                "controls, 'query' needs query spans, 'copy_unseen' needs needle tokens that occur nowhere else."
            )
        return value[selected]


def measure(
    lm: LM, examples: Sequence[Example], *, success: Callable[[Example], bool] = needle_recalled, sinks: int = assumed_sinks
) -> HeadMetrics:
    """Measure how much each attention head retrieves the needle in each example, by all metrics in ``METRICS``.

    The metrics are defined at the top of the module ``retrieval_heads``. The result has the examples in the given order.

    Args:
        lm: The model whose heads are measured.
        examples: Responses to prompts with a needle, from ``needles.examples``.
        success: Function that returns True for an example whose response retrieved the needle. By default, more than half of the needle's
            tokens must occur in the evaluated part of the response. With ``lambda e: e.rollout.correct``, the answer must be correct.
        sinks: Number of positions at the start of the sequence (attention sinks) that the metric ``copy_no_sink`` ignores. It looks for the
            position with the most attention among the other positions only.

    Raises:
        ValueError: There are no examples, or a sequence is longer than the model's context.
    """
    if not examples:
        raise ValueError("No examples to measure heads on: the list is empty.")
    # Groups of similar length save padding; the results are put back in the caller's order.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].rollout.token_ids))
    parts = [_group(lm, [examples[i] for i in order[at : at + GROUP_SIZE]], sinks) for at in range(0, len(order), GROUP_SIZE)]
    back = torch.tensor(order).argsort()
    # Layers may differ in their number of heads: NaN where there is none.
    absent = lm.layout.table({layer: torch.zeros(n) for layer, n in enumerate(lm.layout.heads)})
    values = {name: torch.cat([part[name] for part in parts])[back] + absent for name in METRICS}
    ids = tuple(e.rollout.problem_id for e in examples)
    return HeadMetrics(values, tuple(bool(success(e)) for e in examples), ids, lm.provenance(**origins.record(ids)))


def _group(lm: LM, examples: Sequence[Example], sinks: int) -> dict[str, Float[Tensor, "examples layers heads"]]:
    """Return all metrics of a few examples (at most ``GROUP_SIZE``), from up to three passes.

    The passes read the responses, the same responses after the control prompts, and the questions.
    """
    shape = (len(examples), lm.layout.n_layers, lm.layout.n_heads)
    sequences = [e.rollout.token_ids for e in examples]
    sums = _MetricSums(lm, examples, sinks)
    attention.read(lm, sequences, [e.span.predictors() for e in examples], sums.take)
    values = sums.values()

    def masses(chosen: Sequence[int], rows: Sequence[Sequence[int]], spans: Sequence[Span]) -> Tensor:
        """Return the attention on the needle, mean over query positions, for all examples; NaN for examples that are not chosen.

        Args:
            chosen: Indices of the examples to measure.
            rows: Token ids of each chosen example.
            spans: Query positions of each chosen example.
        """
        mass = torch.full(shape, torch.nan, dtype=torch.float64)
        if chosen:
            sums = _MetricSums(lm, [examples[i] for i in chosen], sinks)
            attention.read(lm, rows, spans, sums.take_mass)
            mass[chosen] = sums.mass.cpu() / torch.tensor([len(span) for span in spans])[:, None, None]
        return mass

    # contrast: the same response after a prompt with other tokens in place of the needle.
    controlled = [i for i, e in enumerate(examples) if e.control is not None]
    without = [(*(examples[i].control or ()), *sequences[i][examples[i].rollout.prompt_len :]) for i in controlled]
    values["contrast"] = values["mass"] - masses(controlled, without, [examples[i].span.predictors() for i in controlled])
    # query: the attention from the question's tokens on the needle.
    queries = [(i, e.query) for i, e in enumerate(examples) if e.query is not None]
    values["query"] = masses([i for i, _ in queries], [sequences[i] for i, _ in queries], [query for _, query in queries])
    return values


class _MetricSums:
    """Running sums over query positions, for some examples. The method ``values`` computes the metrics of the examples from the sums.

    The sums are: attention on the needle, direct effects on logits, and which needle tokens each head copies. ``attention.read`` calls
    ``take`` or ``take_mass`` with the attention probabilities of one layer at a time (``attention.Rows``). These methods update the sums.
    """

    def __init__(self, lm: LM, examples: Sequence[Example], sinks: int) -> None:
        self.lm, self.examples, self.sinks = lm, examples, sinks
        ids = [e.rollout.token_ids for e in examples]
        self.ids = pad_right(ids, lm)
        self.indices: dict[tuple[int, ...], Tensor] = {}  # Rows.examples -> the same as a tensor on the device: see ``_which``
        self.W_U: Tensor = lm.model.get_output_embeddings().weight.detach()
        self.W_U_mean = self.W_U.mean(dim=0, dtype=torch.float32)
        # Which positions belong to each example's needle.
        at = torch.arange(self.ids.shape[1], device=lm.device)
        start, stop = torch.tensor([[e.needle.start, e.needle.stop] for e in examples], device=lm.device).T[..., None]
        self.needle = (at >= start) & (at < stop)
        # The distinct tokens of a needle are numbered 0, 1, ...; any other emitted token gets one more number, which is dropped at
        # the end. ``copied`` marks the numbers that a head has copied, so a token counts once, however often it is copied.
        tokens = [e.tokens for e in examples]
        most = max(map(len, tokens))
        self.tokens = torch.tensor([row + [-1] * (most - len(row)) for row in tokens], device=lm.device)
        unseen = [[token not in i[: e.needle.start] + i[e.needle.stop : e.rollout.prompt_len] for token in row]
                  for e, i, row in zip(examples, ids, tokens, strict=True)]  # fmt: skip
        self.unseen = torch.tensor([row + [False] * (most - len(row)) for row in unseen], device=lm.device)
        shape = (len(examples), lm.layout.n_layers, lm.layout.n_heads)
        self.copied = {
            name: torch.zeros(*shape, most + 1, dtype=torch.bool, device=lm.device)
            for name in COPY_METRICS
            if name != "copy_unseen"
        }
        # mass: attention on the needle; write: logit contributions; written: number of emitted tokens that are in the needle.
        self.mass, self.write = (torch.zeros(shape, dtype=torch.float64, device=lm.device) for _ in range(2))
        self.written = torch.tensor([sum(t in row for t in i[e.span.start : e.span.stop])
                                     for e, i, row in zip(examples, ids, tokens, strict=True)], device=lm.device)  # fmt: skip

    def _which(self, rows: attention.Rows) -> Int[Tensor, " b"]:
        """Return the index in ``self.examples`` of each sequence of the batch (``rows.examples``), as a tensor on the device.

        The tensor is made once per batch and kept, since every layer needs it.
        """
        if rows.examples not in self.indices:
            self.indices[rows.examples] = torch.tensor(rows.examples, device=rows.weights.device)
        return self.indices[rows.examples]

    def take_mass(self, rows: attention.Rows) -> None:
        """Add the attention of one layer's heads on the needle to ``self.mass``, summed over the query positions."""
        # Queries at -1 only pad the batch and do not count.
        which = self._which(rows)
        needle = self.needle[which, : rows.weights.shape[-1]].to(rows.weights)
        on_needle = torch.einsum("bhqk,bk->bhq", rows.weights, needle)
        self.mass[which, rows.layer, : rows.weights.shape[1]] += (on_needle * (rows.queries >= 0)[:, None]).sum(dim=-1).double()

    def take(self, rows: attention.Rows) -> None:
        """Add the contributions of one layer's heads to all sums, at the query positions that predict the emitted tokens."""
        self.take_mass(rows)
        which, weights = self._which(rows), rows.weights
        ids, needle = self.ids[which], self.needle[which, : weights.shape[-1]]  # [b, tokens], [b, keys]
        # real: False for queries that only pad the batch (position -1).
        real, at = rows.queries >= 0, rows.queries.clamp(min=0)
        # The query at position t emits the token at t + 1. ``number`` is the emitted token's number among the needle's tokens.
        emitted = ids.gather(1, (at + 1).clamp(max=ids.shape[1] - 1))
        # same: [b, queries, needle tokens]
        same = emitted[..., None] == self.tokens[which][:, None]
        in_needle = same.any(dim=-1) & real
        number = torch.where(in_needle, same.long().argmax(dim=-1), self.tokens.shape[1])
        # copy: the key with the most attention lies in the needle and holds the emitted token.
        top = weights.argmax(dim=-1)  # [b, heads, queries]
        hits = _hits(top, ids, needle, emitted) & in_needle[:, None]
        self._copy("copy", which, rows.layer, number, hits)
        # copy_new: the token before the copied one differs from the token at the query, so an induction head would not attend there.
        before = _at(ids, (top - 1).clamp(min=0))
        self._copy("copy_new", which, rows.layer, number, hits & ((before != ids.gather(1, at)[:, None]) | (top == 0)))
        # copy_no_sink: -1 replaces the weights of the sinks, the first keys. All other weights are 0 or more, so argmax takes one
        # of the other keys, if there is one.
        sink = torch.arange(weights.shape[-1], device=weights.device) < self.sinks
        top = weights.masked_fill(sink, -1.0).argmax(dim=-1)
        self._copy("copy_no_sink", which, rows.layer, number, _hits(top, ids, needle, emitted) & in_needle[:, None])
        self._write(rows, which, needle, emitted, in_needle)

    def _copy(self, name: str, which: Tensor, layer: int, number: Int[Tensor, "b q"], hits: Bool[Tensor, "b h q"]) -> None:
        """Record for one copy metric which needle tokens each head copies, as True in ``self.copied[name]``.

        Args:
            name: Name of the metric.
            which: Index in ``self.examples`` of each sequence of the batch.
            layer: Layer of the heads.
            number: Index of each emitted token among the distinct tokens of the needle; the last index means "not in the needle".
            hits: True where the head copies the emitted token.
        """
        # scatter_add_ counts, for each head and needle token, the queries at which the head copies this token.
        index = number[:, None].expand_as(hits)
        counts = torch.zeros(*hits.shape[:2], self.tokens.shape[1] + 1, device=hits.device)
        self.copied[name][which, layer, : hits.shape[1]] |= counts.scatter_add_(2, index, hits.float()) > 0

    def _write(self, rows: attention.Rows, which: Tensor, needle: Tensor, emitted: Tensor, in_needle: Tensor) -> None:
        """Add one layer's terms to the sums of the metric ``write``, one term for each head and query.

        A term is the head's direct effect on the logit of the emitted token, through the needle position j' with the most attention. It is
        the attention on j' times the dot product of two vectors. One is W_O times the value vector at j'. The other is the unembedding of
        the emitted token minus the mean unembedding. A gate or norm before W_O and a norm after it are included. Queries whose token is not
        in the needle add 0.

        Args:
            rows: Attention rows of the layer.
            which: Index in ``self.examples`` of each sequence of the batch.
            needle: True for the keys that belong to the needle, ``[batch, keys]``.
            emitted: Token id that each query predicts, ``[batch, queries]``.
            in_needle: True where this token is one of the needle's tokens, ``[batch, queries]``.
        """
        # Keys outside the needle get weight -1, below all true weights, so that the maximum lies in the needle.
        weight, at = rows.weights.masked_fill(~needle[:, None, None], -1.0).max(dim=-1)  # [b, heads, queries] each; at is j'
        # Weighted value vectors a_h(t, j') v_h(j'), [b, heads, queries, head_dim]; zero where no needle token is emitted.
        read = rows.value_at(at) * weight.clamp(min=0)[..., None] * in_needle[:, None, :, None] * rows.gate.transpose(1, 2)
        layout = self.lm.layout
        u = self.W_U[emitted].float() - self.W_U_mean
        W_O = layout.W_O(rows.layer).detach().float()
        # <u, W_O v> = <W_O^T u, v>: the direction in each head's value space that raises the emitted token, [b, queries, heads, head_dim].
        # rows.scale is the divisor of the norm that follows W_O; 1 if there is no such norm.
        raises = (layout.to_attn_out(rows.layer, u / rows.scale) @ W_O).unflatten(
            -1, (layout.heads[rows.layer], layout.head_dims[rows.layer])
        )
        self.write[which, rows.layer, : read.shape[1]] += torch.einsum("bhqd,bqhd->bh", read, raises).double()

    def values(self) -> dict[str, Tensor]:
        """Return all metrics except ``contrast`` and ``query``, as tensors ``[examples, layers, heads]``."""
        # The last entry stands for tokens outside the needle. size: number of distinct needle tokens, without the padding -1.
        hits = {name: copied[..., :-1].cpu() for name, copied in self.copied.items()}
        size, unseen = (self.tokens >= 0).sum(dim=1).cpu()[:, None, None], self.unseen.cpu()
        values = {name: copied.sum(dim=-1).double() / size for name, copied in hits.items()}
        # 0 / 0 is NaN: every token of the needle also occurs elsewhere in the prompt.
        values["copy_unseen"] = (hits["copy"] & unseen[:, None, None]).sum(dim=-1).double() / unseen.sum(dim=1)[:, None, None]
        values["mass"] = self.mass.cpu() / torch.tensor([len(e.span) for e in self.examples])[:, None, None]
        values["write"] = self.write.cpu() / self.written.cpu().clamp(min=1)[:, None, None]
        return values


def _at(ids: Int[Tensor, "b t"], positions: Int[Tensor, "b h q"]) -> Int[Tensor, "b h q"]:
    """Return the token ids at the given positions of each sequence."""
    return ids.gather(1, positions.flatten(1)).view_as(positions)


def _hits(
    top: Int[Tensor, "b h q"], ids: Int[Tensor, "b t"], needle: Bool[Tensor, "b k"], emitted: Tensor
) -> Bool[Tensor, "b h q"]:
    """Return, for each head and query, True if position ``top`` lies in the needle and holds the emitted token.

    Args:
        top: Position that the head attends to most, for each query.
        ids: Token ids of each sequence.
        needle: True at the positions that belong to the needle.
        emitted: Token id that each query predicts, ``[batch, queries]``.
    """
    return (_at(needle.long(), top) > 0) & (_at(ids, top) == emitted[:, None])


def _absent(metrics: HeadMetrics) -> tuple[tuple[int, int], ...]:
    """Return the pairs ``(layer, head)`` without a head. They occur only in layers with fewer heads than others."""
    return tuple((int(layer), int(head)) for layer, head in (~metrics.present).nonzero())


def scores(metrics: HeadMetrics, metric: str = "copy", *, when: str = "all") -> HeadScores:
    """Return the score of every head: the mean of a metric over examples. The default, ``"copy"``, gives the score of arXiv:2404.15574.

    ``"copy"`` is the share of the needle's distinct tokens that the head copies. The module ``retrieval_heads`` defines all metrics.

    Args:
        metrics: From ``measure``.
        metric: Name of the metric, one of ``METRICS``. Examples in which it is undefined (NaN) are left out.
        when: Examples to use: ``"all"``, or ``"success"`` for only those that retrieved the needle (as in the paper's released code).
    """
    units = "logits" if metric == "write" else "share"
    return HeadScores(
        metrics.select(metric, when=when).mean(dim=0), f"retrieval_{metric}", units, metrics.provenance, _absent(metrics)
    )


def activation_frequency(metrics: HeadMetrics, *, when: str = "all") -> HeadScores:
    """Return, for each head, the share of examples (0 to 1) in which it copies at least one token of the needle.

    A head copies a token if, at the position that predicts this token in the response, the head attends most to a needle position that
    holds the same token.

    Args:
        metrics: From ``measure``.
        when: Examples to use: ``"all"``, or ``"success"`` for only those that retrieved the needle.
    """
    share = (metrics.select("copy", when=when) > 0).double().mean(dim=0)
    return HeadScores(share, "retrieval_activation_frequency", "share", metrics.provenance, _absent(metrics))


def heads(head_scores: HeadScores, *, above: float = PUBLISHED_THRESHOLD) -> list[tuple[int, int]]:
    """Return the heads, as pairs ``(layer, head)``, with a score above ``above``, highest score first. The published threshold is 0.1."""
    return [(layer, head) for layer, head in head_scores.ranked() if head_scores.score[layer, head] > above]


def mask_plan(head_scores: HeadScores, count: int) -> Plan:
    """Return a plan that masks the ``count`` heads with the highest scores.

    ``masks.masking`` applies the plan while the model runs. ``edits.apply`` applies it to the weights: the outputs of the heads are then 0.

    Raises:
        ValueError: ``count`` is negative or larger than the number of heads.
    """
    head_scores.check()
    ranked = head_scores.ranked()
    if not 0 <= count <= len(ranked):
        raise ValueError(f"count={count}: the model has {len(ranked)} heads.")
    # A "scale" edit multiplies the head's output by 1 - strength, so strength 1 sets it to 0.
    edits = tuple(HeadEdit(layer, head, "scale", 1.0) for layer, head in ranked[:count])
    return Plan(edits, None, f"top {count} of {len(ranked)} heads, {head_scores.method}", head_scores.provenance)


def statistics(copy: Float[Tensor, "examples layers heads"]) -> dict[str, int | float]:
    """Return the summary numbers that arXiv:2404.15574 reports on retrieval heads, from the ``copy`` score of every head in each example.

    The ``copy`` score is the share of the needle's distinct tokens that the head copies in the example. A head's mean score is the mean
    over examples. Keys of the result:

    - ``examples``: number of examples.
    - ``retrieval``: number of heads with a mean score above 0.1.
    - ``share_retrieval, share_strong, share_zero``: shares of all heads (0 to 1) whose mean score is above 0.1, above 0.5, and exactly 0.
    - ``always, often``: number of heads that copy a needle token in all examples, and in more than 95 % of them.
    - ``silent_examples``: number of examples in which no head copies a needle token.
    - ``above_1``: number of scores (of one head in one example) above 1. Only files from the paper's released code can contain such scores.

    >>> numbers = statistics(torch.tensor([[[0.5, 0.0]], [[1.0, 0.0]]]))  # 2 examples, 1 layer, 2 heads
    >>> numbers["retrieval"], numbers["share_zero"], numbers["always"]
    (1, 0.5, 1)

    Args:
        copy: Score of every head in each example: ``metrics.select("copy")``, or a published file that ``from_lists`` converted.
    """
    copy = copy.flatten(1)[:, ~copy[0].flatten().isnan()]  # NaN: there is no such head
    mean, active = copy.double().mean(dim=0), (copy > 0).double().mean(dim=0)
    return {
        "examples": len(copy),
        "retrieval": int((mean > PUBLISHED_THRESHOLD).sum()),
        "share_retrieval": float((mean > PUBLISHED_THRESHOLD).double().mean()),
        "share_strong": float((mean > PUBLISHED_STRONG).double().mean()),
        "share_zero": float((mean == 0).double().mean()),
        "always": int((active == 1).sum()),
        "often": int((active > 0.95).sum()),
        "silent_examples": int((copy == 0).all(dim=1).sum()),
        "above_1": int((copy > 1).sum()),
    }


def overlap(a: HeadScores, b: HeadScores, count: int) -> float:
    """Return how much two rankings of the same heads agree: the share (0 to 1) of the top heads of ``a`` that are also top heads of ``b``.

    The top heads are the ``count`` heads with the highest scores.

    Raises:
        ValueError: The scores have different shapes, or ``count`` is not between 1 and the number of heads.
    """
    if a.score.shape != b.score.shape or not 1 <= count <= len(a.ranked()):
        raise ValueError(
            f"Scores of {tuple(a.score.shape)} and {tuple(b.score.shape)} heads, count={count}: need equal shapes and a count within them."
        )
    return len({*a.ranked()[:count]} & {*b.ranked()[:count]}) / count


def stability(copy: Float[Tensor, "examples layers heads"], n: int, count: int, *, draws: int = 20, seed: int = 0) -> float:
    """Return how stable the top heads are when fewer examples are used: from 0 (entirely other heads) to 1 (the same heads).

    The top heads are the ``count`` heads with the highest mean score. Each draw takes ``n`` of the examples at random. Its overlap is the
    share of the top heads on all examples that are also top heads on the draw. The result is the mean overlap of all draws. Each draw
    is a subset of all examples, so the overlap is higher than it would be between two separate sets of examples.

    Args:
        copy: Score of every head in each example, such as ``metrics.select("copy")``.
        n: Number of examples per draw.
        count: Number of top heads.
        draws: Number of draws.
        seed: Seed of the draws.

    Raises:
        ValueError: ``n`` is not between 1 and the number of examples, or ``count`` not between 1 and the number of heads.
    """
    copy = copy.flatten(1)[:, ~copy[0].flatten().isnan()]  # NaN: there is no such head
    if not 1 <= n <= len(copy) or not 1 <= count <= copy[0].numel():
        raise ValueError(
            f"n={n} of {len(copy)} examples, count={count} of {copy[0].numel()} heads: need at least 1 and at most all."
        )
    generator = torch.Generator().manual_seed(seed)

    def top(sample: Tensor) -> set[int]:
        order = sample.double().mean(dim=0).argsort(descending=True, stable=True)
        return set(order[:count].tolist())

    whole = top(copy)
    return sum(len(whole & top(copy[torch.randperm(len(copy), generator=generator)[:n]])) for _ in range(draws)) / count / draws


def from_lists(lists: Mapping[str, Sequence[float]]) -> Float[Tensor, "examples layers heads"]:
    """Return the head scores in a file that was released with arXiv:2404.15574, as a tensor.

    The file holds ``{"<layer>-<head>": [score in each example, ...], ...}``. An empty list stands for a head that the model does not have,
    and becomes NaN. The released files have no empty lists: they are our addition, for models whose layers differ in their number of heads.

    >>> from_lists({"0-0": [0.5, 1.0], "0-1": [0.0, 0.0]}).tolist()
    [[[0.5, 0.0]], [[1.0, 0.0]]]

    Raises:
        ValueError: There are no scores, a head is missing, or two heads have scores of different numbers of examples.
    """
    places = {tuple(map(int, key.split("-"))): values for key, values in lists.items()}
    if not places:
        raise ValueError("These head scores are empty.")
    shape = (1 + max(layer for layer, _ in places), 1 + max(head for _, head in places))
    n = max(map(len, places.values()))
    missing = sorted({(i, j) for i in range(shape[0]) for j in range(shape[1])} - {*places})
    ragged = [f"{layer}-{head}" for (layer, head), values in places.items() if values and len(values) != n]
    if missing or ragged or not n:
        raise ValueError(
            f"Head scores of {shape[0]} x {shape[1]} heads, {n} examples: missing {missing[:3]}, of other length {ragged[:3]}. Every head needs "
            "one score per example."
        )
    table = torch.tensor([places[place] or [torch.nan] * n for place in sorted(places)], dtype=torch.float64)
    return table.T.reshape(n, *shape)


def to_lists(copy: Float[Tensor, "examples layers heads"]) -> dict[str, list[float]]:
    """Return head scores in the format of the files that were released with arXiv:2404.15574.

    The format is ``{"<layer>-<head>": [score in each example, ...], ...}``. A head that is NaN in all examples becomes an empty list.
    ``from_lists`` is the inverse.
    """
    absent = copy.isnan().all(dim=0)
    places = [(i, j) for i in range(copy.shape[1]) for j in range(copy.shape[2])]
    return {f"{i}-{j}": [] if absent[i, j] else copy[:, i, j].tolist() for i, j in places}
