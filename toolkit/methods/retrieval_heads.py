"""Retrieval Head Mechanistically Explains Long-Context Factuality (Wu et al., ICLR 2025), arXiv:2404.15574.

Equations (k the set of a needle's token ids, i_q their positions in the prompt, w_t the token emitted at query t, x the sequence):

    h copies w_t   iff   w_t in k,  j* = argmax_j a_h(t, j) in i_q,  x_{j*} = w_t
    score(h) = | g_h  cap  k | / | k |          g_h the set of tokens that h copies in one instance; mean over instances

Deviations: g_h is a set, as in the paper (the released code counts a token each time, so its scores exceed 1). All instances count
unless asked: ``when="success"`` is the released, undocumented gate, here by unigram recall of token ids, not of stemmed words. The
needle's place is given, never searched. The prompt is processed with SDPA up to the last token, the response teacher-forced.

Ours, each beside the published score (``METRICS``; all per example, layer and head):

    copy           as above
    copy_no_sink   argmax over all keys but the first ``sinks``
    copy_unseen    only tokens of k that occur nowhere else in the prompt; NaN if there are none
    copy_new       only copies that continue nothing: x_{j*-1} != x_t, which an induction head does not make
    mass           mean over t of sum_{j in i_q} a_h(t, j)
    contrast       mass minus the same in a prompt without the needle (same response, same positions); NaN without such a prompt
    query          QRHead (arXiv:2506.09944), without its calibration: mean over the question's tokens of their mass on i_q
    write          mean over emitted tokens of k of a_h(t, j') <u(w_t), W_O^h v_h(j')>, j' = argmax_{j in i_q} a_h(t, j), and u(w) the
                   unembedding of w minus the mean of all; 0 if no token of k is emitted. Where a norm follows W_O, it is applied,
                   with its scale at t. The final norm is left out, its gain included

Units and signs: shares in [0, 1]; ``write`` in logits before the final norm's scale, + raises the emitted token. Higher = retrieves more.

Cost: one pass over each prompt and one over its response (another of each with a control); attention of the emitted rows only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from toolkit import attention, origins
from toolkit.collect import pad_right
from toolkit.lm import LM
from toolkit.tasks.haystack import Haystack
from toolkit.types import HeadEdit, HeadScores, Plan, Provenance, Rollout, Span

PUBLISHED_THRESHOLD = 0.1  # mean score above which a head is a retrieval head: paper, section 2
PUBLISHED_STRONG = 0.5  # second line of the paper's sparsity figure
PUBLISHED_MASKED = (0, 2, 5, 10, 15, 20, 30, 50, 100)  # heads masked in needle-in-a-haystack: paper, section 4
PUBLISHED_RECALL = 0.5  # unigram recall that counts as success, strict: released retrieval_head_detection.py
PUBLISHED_SHARES = {
    "Llama-2-7B-80K": (0.0322, 0.0059, 0.702),
    "Llama-2-13B-64K": (0.0206, 0.0037, 0.732),
    "Yi-6B-200K": (0.0518, 0.0068, 0.494),
    "Qwen1.5-14B": (0.0381, 0.0063, 0.534),
    "Qwen1.5-14B-Chat": (0.0425, 0.0006, 0.711),
    "Mistral-7B-v0.2": (0.0420, 0.0049, 0.650),
    "Mixtral-8x7B": (0.0615, 0.0068, 0.576),
}  # shares of heads above 0.1, above 0.5, and at zero: recomputed from the released head_score files
assumed_sinks = 1  # first positions that copy_no_sink leaves out: ours
GROUP = 32  # examples whose copies are held at a time

METRICS = ("copy", "copy_no_sink", "copy_unseen", "copy_new", "mass", "contrast", "query", "write")
COPIES = METRICS[:4]


class NeedleError(ValueError):
    """A needle, a question or a control is not where it has to be."""


@dataclass(frozen=True)
class Example:
    """One response to a prompt with a needle.

    Attributes:
        rollout: Prompt and response.
        needle: The needle's tokens in the prompt: what is to be copied.
        query: The question's tokens in the prompt, or ``None``.
        control: Token ids of the prompt with other words where the needle was, of the same length, or ``None``.
        emitted: Which tokens of the response are looked at, such as its answer span; ``None`` is all.
    """

    rollout: Rollout
    needle: Span
    query: Span | None = None
    control: tuple[int, ...] | None = None
    emitted: Span | None = None

    def __post_init__(self) -> None:
        r, name = self.rollout, f"Example {self.rollout.problem_id!r}"
        for what, span in (("needle", self.needle), ("query", self.query)):
            if span is not None and (not len(span) or span.stop > r.prompt_len):
                raise NeedleError(
                    f"{name}: the {what} is [{span.start}, {span.stop}), the prompt has {r.prompt_len} tokens: "
                    "need at least one token, inside the prompt."
                )
        span = self.span
        if not len(span) or span.start < r.prompt_len or span.stop > len(r.token_ids):
            raise NeedleError(
                f"{name}: no emitted token to look at: [{span.start}, {span.stop}) of a response at [{r.prompt_len}, "
                f"{len(r.token_ids)}). Sample with max_new_tokens > 0, or choose other tokens."
            )
        if self.control is not None and len(self.control) != r.prompt_len:
            raise NeedleError(
                f"{name}: the control has {len(self.control)} tokens, the prompt {r.prompt_len}: positions must agree. "
                "Put as many tokens in the needle's place as it has."
            )

    @property
    def span(self) -> Span:
        """The emitted tokens that are looked at."""
        return self.emitted if self.emitted is not None else Span(self.rollout.prompt_len, len(self.rollout.token_ids))

    @property
    def tokens(self) -> list[int]:
        """The needle's distinct token ids, in order of appearance."""
        return list(dict.fromkeys(self.rollout.token_ids[self.needle.start : self.needle.stop]))


@dataclass(frozen=True)
class Measured:
    """What every head did in every example. Two measurements of the same model add up (``+``).

    Attributes:
        values: Metric -> ``[examples, layers, heads]``.
        success: Whether each example retrieved its needle.
        ids: Problem of each example.
    """

    values: Mapping[str, Float[Tensor, "examples layers heads"]]
    success: tuple[bool, ...]
    ids: tuple[str, ...]
    provenance: Provenance

    def __add__(self, other: Measured) -> Measured:
        """Both sets of examples."""
        if self.provenance.fingerprint != other.provenance.fingerprint or set(self.values) != set(other.values):
            raise ValueError(
                f"These measurements do not belong together: {self.provenance.model} and {other.provenance.model}, "
                f"metrics {', '.join(self.values)} and {', '.join(other.values)}."
            )
        values = {name: torch.cat([value, other.values[name]]) for name, value in self.values.items()}
        about = replace(self.provenance, notes=origins.join_notes(self.provenance.notes, other.provenance.notes))
        return Measured(values, self.success + other.success, self.ids + other.ids, about)

    def of(self, metric: str = "copy", *, when: str = "all") -> Float[Tensor, "examples layers heads"]:
        """One metric of all examples, or of those that succeeded. Examples without a number (NaN) are left out.

        Raises:
            KeyError: an unknown metric.
            ValueError: an unknown ``when``, or no example is left.
        """
        if metric not in self.values:
            raise KeyError(f"No metric {metric!r}: choose from {', '.join(self.values)}.")
        if when not in ("all", "success"):
            raise ValueError(f"when={when!r}: choose 'all' or 'success'.")
        value = self.values[metric]
        kept = ~value.flatten(1).isnan().any(dim=1) & (torch.tensor(self.success) | (when == "all"))
        if not kept.any():
            raise ValueError(
                f"No example has a {metric!r} score ({when}): of {len(self.success)}, {sum(self.success)} succeeded. 'contrast' needs "
                "controls, 'query' query spans, 'copy_unseen' needle tokens that occur nowhere else."
            )
        return value[kept]


def recalled(example: Example, *, above: float = PUBLISHED_RECALL) -> bool:
    """Success: more than this share of the needle's tokens (with repetition) is among the emitted ones."""
    ids = example.rollout.token_ids
    needle = Counter(ids[example.needle.start : example.needle.stop])
    return (needle & Counter(ids[example.span.start : example.span.stop])).total() / needle.total() > above


def examples(haystacks: Sequence[Haystack], found: Sequence[Rollout], *, whole: bool = True) -> list[Example]:
    """One example for each piece that a haystack needs, response by response.

    Args:
        found: Responses to the haystacks, in any number and order.
        whole: Whether a needle is the whole needed piece (a sentence, ``N=8;``) or, as published, only the words of the answer in it.
            A model may fetch an answer from the tokens beside it, where earlier layers have moved it: ``copy`` then sees nothing,
            ``mass`` and ``write`` only see it on the whole piece.

    Raises:
        NeedleError: a response to no haystack given, or to another prompt than its haystack's.
    """
    by_id, chosen = {h.problem.id: h for h in haystacks}, []
    for r in found:
        h = by_id.get(r.problem_id)
        if h is None or r.token_ids[: r.prompt_len] != h.prompt_ids:
            raise NeedleError(f"Rollout {r.sample} of {r.problem_id!r} does not answer one of these haystacks' prompts.")
        chosen += [Example(r, needle, h.query, h.control) for needle in (h.needed if whole else h.answers)]
    return chosen


def measure(
    lm: LM, examples: Sequence[Example], *, success: Callable[[Example], bool] = recalled, sinks: int = assumed_sinks
) -> Measured:
    """All metrics of all heads on the given examples, in their order.

    Args:
        success: Whether an example retrieved its needle; ``lambda e: e.rollout.correct`` takes the grade.
        sinks: First positions of a sequence that ``copy_no_sink`` leaves out.

    Raises:
        ValueError: no examples, or a sequence longer than the model's context.
    """
    if not examples:
        raise ValueError("No examples to measure heads on: the list is empty.")
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].rollout.token_ids))
    parts = [_group(lm, [examples[i] for i in order[at : at + GROUP]], sinks) for at in range(0, len(order), GROUP)]
    back = torch.tensor(order).argsort()
    values = {name: torch.cat([part[name] for part in parts])[back] for name in METRICS}
    ids = tuple(e.rollout.problem_id for e in examples)
    return Measured(values, tuple(bool(success(e)) for e in examples), ids, lm.provenance(**origins.record(ids)))


def _group(lm: LM, examples: Sequence[Example], sinks: int) -> dict[str, Float[Tensor, "examples layers heads"]]:
    shape = (len(examples), lm.layout.n_layers, lm.layout.n_heads)
    sequences = [e.rollout.token_ids for e in examples]
    found = _Sums(lm, examples, sinks)
    attention.read(lm, sequences, [e.span.predictors() for e in examples], found.take)
    values = found.values()

    def masses(chosen: Sequence[int], rows: Sequence[Sequence[int]], spans: Sequence[Span]) -> Tensor:
        mass = torch.full(shape, torch.nan, dtype=torch.float64)
        if chosen:
            only = _Sums(lm, [examples[i] for i in chosen], sinks)
            attention.read(lm, rows, spans, only.take_mass)
            mass[chosen] = only.mass.cpu() / torch.tensor([len(span) for span in spans])[:, None, None]
        return mass

    controlled = [i for i, e in enumerate(examples) if e.control is not None]
    without = [(*(examples[i].control or ()), *sequences[i][examples[i].rollout.prompt_len :]) for i in controlled]
    values["contrast"] = values["mass"] - masses(controlled, without, [examples[i].span.predictors() for i in controlled])
    asked = [(i, e.query) for i, e in enumerate(examples) if e.query is not None]
    values["query"] = masses([i for i, _ in asked], [sequences[i] for i, _ in asked], [query for _, query in asked])
    return values


class _Sums:
    """Sums over the emitted tokens of some examples, fed with rows of attention."""

    def __init__(self, lm: LM, examples: Sequence[Example], sinks: int) -> None:
        self.lm, self.examples, self.sinks = lm, examples, sinks
        ids = [e.rollout.token_ids for e in examples]
        self.ids = pad_right(ids, lm)
        self.W_U: Tensor = lm.model.get_output_embeddings().weight.detach()
        self.W_U_mean = self.W_U.mean(dim=0, dtype=torch.float32)
        at = torch.arange(self.ids.shape[1], device=lm.device)
        start, stop = torch.tensor([[e.needle.start, e.needle.stop] for e in examples], device=lm.device).T[..., None]
        self.needle = (at >= start) & (at < stop)
        # Each needle's distinct tokens are its classes; what is no such token belongs to a class past the last, dropped in the end.
        tokens = [e.tokens for e in examples]
        most = max(map(len, tokens))
        self.tokens = torch.tensor([row + [-1] * (most - len(row)) for row in tokens], device=lm.device)
        unseen = [[token not in i[: e.needle.start] + i[e.needle.stop : e.rollout.prompt_len] for token in row]
                  for e, i, row in zip(examples, ids, tokens, strict=True)]  # fmt: skip
        self.unseen = torch.tensor([row + [False] * (most - len(row)) for row in unseen], device=lm.device)
        shape = (len(examples), lm.layout.n_layers, lm.layout.n_heads)
        self.copied = {
            name: torch.zeros(*shape, most + 1, dtype=torch.bool, device=lm.device) for name in COPIES if name != "copy_unseen"
        }
        self.mass, self.write = (torch.zeros(shape, dtype=torch.float64, device=lm.device) for _ in range(2))
        self.written = torch.tensor([sum(t in row for t in i[e.span.start : e.span.stop])
                                     for e, i, row in zip(examples, ids, tokens, strict=True)], device=lm.device)  # fmt: skip

    def take_mass(self, rows: attention.Rows) -> None:
        """Add the attention that the queries pay to the needle."""
        which = torch.tensor(rows.examples, device=rows.weights.device)
        needle = self.needle[which, : rows.weights.shape[-1]].to(rows.weights)
        on_needle = torch.einsum("bhqk,bk->bhq", rows.weights, needle)
        self.mass[which, rows.layer] += (on_needle * (rows.queries >= 0)[:, None]).sum(dim=-1).double()

    def take(self, rows: attention.Rows) -> None:
        """Add what a layer's heads do where some tokens are emitted."""
        self.take_mass(rows)
        which, weights = torch.tensor(rows.examples, device=rows.weights.device), rows.weights
        ids, needle = self.ids[which], self.needle[which, : weights.shape[-1]]
        real, at = rows.queries >= 0, rows.queries.clamp(min=0)
        emitted = ids.gather(1, (at + 1).clamp(max=ids.shape[1] - 1))
        same = emitted[..., None] == self.tokens[which][:, None]
        in_needle = same.any(dim=-1) & real
        kind = torch.where(in_needle, same.long().argmax(dim=-1), self.tokens.shape[1])
        top = weights.argmax(dim=-1)
        hits = _hits(top, ids, needle, emitted) & in_needle[:, None]
        self._copy("copy", which, rows.layer, kind, hits)
        before = _at(ids, (top - 1).clamp(min=0))
        self._copy("copy_new", which, rows.layer, kind, hits & ((before != ids.gather(1, at)[:, None]) | (top == 0)))
        # Weights are never negative, so a sink set to -1 is no maximum unless nothing else is seen.
        sink = torch.arange(weights.shape[-1], device=weights.device) < self.sinks
        top = weights.masked_fill(sink, -1.0).argmax(dim=-1)
        self._copy("copy_no_sink", which, rows.layer, kind, _hits(top, ids, needle, emitted) & in_needle[:, None])
        self._write(rows, which, needle, emitted, in_needle)

    def _copy(self, name: str, which: Tensor, layer: int, kind: Int[Tensor, "b q"], hits: Bool[Tensor, "b h q"]) -> None:
        index = kind[:, None].expand_as(hits)
        found = torch.zeros(*hits.shape[:2], self.tokens.shape[1] + 1, device=hits.device)
        self.copied[name][which, layer] |= found.scatter_add_(2, index, hits.float()) > 0

    def _write(self, rows: attention.Rows, which: Tensor, needle: Tensor, emitted: Tensor, in_needle: Tensor) -> None:
        paid, at = rows.weights.masked_fill(~needle[:, None, None], -1.0).max(dim=-1)
        read = rows.value_at(at) * paid.clamp(min=0)[..., None] * in_needle[:, None, :, None]
        layout = self.lm.layout
        u = self.W_U[emitted].float() - self.W_U_mean
        W_O = layout.W_O(rows.layer).detach().float()
        wanted = (layout.to_attn_out(rows.layer, u / rows.scale) @ W_O).unflatten(-1, (layout.n_heads, layout.head_dim))
        self.write[which, rows.layer] += torch.einsum("bhqd,bqhd->bh", read, wanted).double()

    def values(self) -> dict[str, Tensor]:
        """The metrics of every example that one reading gives."""
        hits = {name: copied[..., :-1].cpu() for name, copied in self.copied.items()}
        size, unseen = (self.tokens >= 0).sum(dim=1).cpu()[:, None, None], self.unseen.cpu()
        found = {name: copied.sum(dim=-1).double() / size for name, copied in hits.items()}
        # 0 / 0 is NaN: no token of the needle is unseen elsewhere.
        found["copy_unseen"] = (hits["copy"] & unseen[:, None, None]).sum(dim=-1).double() / unseen.sum(dim=1)[:, None, None]
        found["mass"] = self.mass.cpu() / torch.tensor([len(e.span) for e in self.examples])[:, None, None]
        found["write"] = self.write.cpu() / self.written.cpu().clamp(min=1)[:, None, None]
        return found


def _at(ids: Int[Tensor, "b t"], where: Int[Tensor, "b h q"]) -> Int[Tensor, "b h q"]:
    return ids.gather(1, where.flatten(1)).view_as(where)


def _hits(
    top: Int[Tensor, "b h q"], ids: Int[Tensor, "b t"], needle: Bool[Tensor, "b k"], emitted: Tensor
) -> Bool[Tensor, "b h q"]:
    """Whether the key attended most lies in the needle and holds the very token emitted."""
    return (_at(needle.long(), top) > 0) & (_at(ids, top) == emitted[:, None])


def scores(measured: Measured, metric: str = "copy", *, when: str = "all") -> HeadScores:
    """Mean over examples: the retrieval score. ``when="success"`` is the released code's condition."""
    units = "logits" if metric == "write" else "share"
    return HeadScores(measured.of(metric, when=when).mean(dim=0), f"retrieval_{metric}", units, measured.provenance)


def activation_frequency(measured: Measured, *, when: str = "all") -> HeadScores:
    """Share of examples in which a head copies at least one token."""
    share = (measured.of("copy", when=when) > 0).double().mean(dim=0)
    return HeadScores(share, "retrieval_activation_frequency", "share", measured.provenance)


def heads(found: HeadScores, *, above: float = PUBLISHED_THRESHOLD) -> list[tuple[int, int]]:
    """The retrieval heads, best first: score above 0.1 as published."""
    return [(layer, head) for layer, head in found.ranked() if found.score[layer, head] > above]


def mask_plan(found: HeadScores, count: int) -> Plan:
    """The highest-scoring heads, to be masked: by ``masks.masking`` while the model runs, or for good by ``edits.apply`` (zero).

    Raises:
        ValueError: ``count`` below 0 or above the number of heads.
    """
    ranked = found.ranked()
    if not 0 <= count <= len(ranked):
        raise ValueError(f"count={count}: the model has {len(ranked)} heads.")
    chosen = tuple(HeadEdit(layer, head, "scale", 1.0) for layer, head in ranked[:count])
    return Plan(chosen, None, f"top {count} of {len(ranked)} heads, {found.method}", found.provenance)


def statistics(copy: Float[Tensor, "examples layers heads"]) -> dict[str, int | float]:
    """The paper's aggregate numbers, of per-example scores (``measured.of("copy")`` or a published file).

    ``retrieval`` counts the heads whose mean exceeds 0.1; ``share_*`` are shares of all heads; ``always`` counts the heads active in
    every example; ``silent_examples`` those in which no head copies; ``above_1`` the scores over 1, which no share can be.
    """
    mean, active = copy.double().mean(dim=0), (copy > 0).double().mean(dim=0)
    return {
        "examples": len(copy),
        "retrieval": int((mean > PUBLISHED_THRESHOLD).sum()),
        "share_retrieval": float((mean > PUBLISHED_THRESHOLD).double().mean()),
        "share_strong": float((mean > PUBLISHED_STRONG).double().mean()),
        "share_zero": float((mean == 0).double().mean()),
        "always": int((active == 1).sum()),
        "often": int((active > 0.95).sum()),
        "silent_examples": int((copy.flatten(1) == 0).all(dim=1).sum()),
        "above_1": int((copy > 1).sum()),
    }


def overlap(a: HeadScores, b: HeadScores, count: int) -> float:
    """Share of the top ``count`` heads of one that are among the top ``count`` of the other."""
    if a.score.shape != b.score.shape or not 1 <= count <= a.score.numel():
        raise ValueError(
            f"Scores of {tuple(a.score.shape)} and {tuple(b.score.shape)} heads, count={count}: they must fit each other."
        )
    return len({*a.ranked()[:count]} & {*b.ranked()[:count]}) / count


def stability(copy: Float[Tensor, "examples layers heads"], n: int, count: int, *, draws: int = 20, seed: int = 0) -> float:
    """Mean overlap of the top ``count`` heads of ``n`` random examples with those of all (which hold them: in-sample)."""
    if not 1 <= n <= len(copy) or not 1 <= count <= copy[0].numel():
        raise ValueError(f"n={n} of {len(copy)} examples, count={count} of {copy[0].numel()} heads: both must be possible.")
    generator = torch.Generator().manual_seed(seed)

    def top(some: Tensor) -> set[int]:
        order = some.double().mean(dim=0).flatten().argsort(descending=True, stable=True)
        return set(order[:count].tolist())

    whole = top(copy)
    return sum(len(whole & top(copy[torch.randperm(len(copy), generator=generator)[:n]])) for _ in range(draws)) / count / draws


def from_lists(lists: Mapping[str, Sequence[float]]) -> Float[Tensor, "examples layers heads"]:
    """Per-example scores from the form of the released files, ``{"<layer>-<head>": [score of each example, ...]}``.

    Raises:
        ValueError: a head is missing or has another number of examples than the first.
    """
    places = {tuple(map(int, key.split("-"))): values for key, values in lists.items()}
    if not places:
        raise ValueError("These head scores are empty.")
    shape = (1 + max(layer for layer, _ in places), 1 + max(head for _, head in places))
    n = len(next(iter(places.values())))
    missing = sorted({(i, j) for i in range(shape[0]) for j in range(shape[1])} - {*places})
    ragged = [f"{layer}-{head}" for (layer, head), values in places.items() if len(values) != n]
    if missing or ragged:
        raise ValueError(
            f"Head scores of {shape[0]} x {shape[1]} heads, {n} examples: missing {missing[:3]}, of other length {ragged[:3]}."
        )
    found = torch.tensor([places[place] for place in sorted(places)], dtype=torch.float64)
    return found.T.reshape(n, *shape)


def to_lists(copy: Float[Tensor, "examples layers heads"]) -> dict[str, list[float]]:
    """Per-example scores in the form of the released files."""
    return {f"{i}-{j}": copy[:, i, j].tolist() for i in range(copy.shape[1]) for j in range(copy.shape[2])}
