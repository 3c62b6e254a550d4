"""Rows of attention against full plain attention with explicit loops, and masked heads against their formulas, on every family."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from families import CONFIGS

from toolkit import attention, collect, edits, hooks, masks
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition
from toolkit.phases import Scope
from toolkit.sites import Site
from toolkit.store import WrongModelError
from toolkit.types import HeadEdit, Moments, Plan, Span

WINDOWED = ("mistral", "gemma2", "gemma3")


def sequence(n: int, seed: int = 0) -> list[int]:
    return torch.randint(5, 103, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def full(lm: LM, ids: list[int]) -> torch.Tensor:
    """All attention of one sequence by itself, ``[layers, heads, T, T]``, as transformers returns it."""
    own = lm.model.config._attn_implementation
    lm.model.set_attn_implementation("eager")
    try:
        return torch.stack(lm.model(torch.tensor([ids]), output_attentions=True).attentions)[:, 0].float()
    finally:
        lm.model.set_attn_implementation(own)


def collected(lm: LM, sequences: list[list[int]], spans: list[Span], **options) -> list[torch.Tensor]:
    """Rows of every sequence by loops over what ``read`` hands out."""
    kept = [torch.full((lm.layout.n_layers, lm.layout.n_heads, len(s), s.stop), math.nan) for s in spans]

    def take(rows: attention.Rows) -> None:
        for b, example in enumerate(rows.examples):
            for q, position in enumerate(rows.queries[b].tolist()):
                if position < 0:
                    continue
                kept[example][rows.layer, :, position - spans[example].start] = 0
                seen = min(rows.weights.shape[-1], spans[example].stop)
                kept[example][rows.layer, :, position - spans[example].start, :seen] = rows.weights[b, :, q, :seen]

    attention.read(lm, sequences, spans, take, **options)
    return kept


# --- rows ----------------------------------------------------------------------------------------------------


def test_rows_equal_full_plain_attention(any_lm):
    ids, span = sequence(40), Span(24, 39)
    got, want = attention.rows(any_lm, ids, span), full(any_lm, ids)
    for layer in range(any_lm.layout.n_layers):
        for head in range(any_lm.layout.n_heads):
            for q, t in enumerate(range(span.start, span.stop)):
                assert torch.allclose(got[layer, head, q], want[layer, head, t, : span.stop], atol=1e-5), (layer, head, t)


def test_rows_sum_to_one_and_see_no_later_token(any_lm):
    span = Span(20, 40)
    got = attention.rows(any_lm, sequence(40), span)
    assert torch.allclose(got.sum(dim=-1), torch.ones(got.shape[:-1]), atol=1e-5)
    for q, t in enumerate(range(span.start, span.stop)):
        assert not got[:, :, q, t + 1 :].any()


def test_rows_of_a_batch_equal_rows_of_its_sequences_alone(any_lm, monkeypatch):
    """Prefixes of other lengths, one of them none, queries of other numbers; few queries at a time."""
    monkeypatch.setattr(attention, "ROW_NUMBERS", 4 * 4 * 40 * 3)
    spans = [Span(30, 38), Span(3, 20), Span(0, 5), Span(25, 26)]
    sequences = [sequence(40, i) for i in range(4)]
    for got, ids, span in zip(collected(any_lm, sequences, spans), sequences, spans, strict=True):
        want = full(any_lm, ids)[:, :, span.start : span.stop, : span.stop]
        assert torch.allclose(got, want, atol=1e-5)


def test_a_long_prompt_with_few_queries_beside_a_short_one_with_many_shows_no_key_past_the_longest(llama):
    ids = torch.randint(5, 103, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    sequences, spans = [ids, ids[:30]], [Span(38, 40), Span(4, 30)]
    widths = []
    attention.read(llama, sequences, spans, lambda found: widths.append(found.weights.shape[-1]))
    assert max(widths) == 40, "not 38 + 26, as if both were in one sequence"


def test_batches_do_not_matter(llama):
    spans, sequences = [Span(10 + i, 15 + i) for i in range(5)], [sequence(30, i) for i in range(5)]
    one, all_ = collected(llama, sequences, spans, tokens=1), collected(llama, sequences, spans)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one, all_, strict=True))


@pytest.mark.parametrize("name", WINDOWED)
def test_a_sliding_window_is_seen_in_the_rows(name, model_of):
    got = attention.rows(model_of(name), sequence(40), Span(39, 40))
    away = (got[:, :, 0, : 40 - CONFIGS[name].sliding_window] == 0).flatten(1).all(dim=1)
    kinds = getattr(CONFIGS[name], "layer_types", None) or ["sliding_attention"] * len(away)
    assert away.tolist() == [kind == "sliding_attention" for kind in kinds]


def test_values_times_weights_are_the_heads_output(any_lm):
    """z_h(t) = sum_j a_h(t, j) v_h(j), with a loop over keys: what value_at returns is what attention reads."""
    ids, span, layout = sequence(30), Span(20, 29), any_lm.layout
    sites = [Site("z", layer) for layer in range(layout.n_layers)]
    with hooks.record(layout, sites) as z, torch.no_grad():
        any_lm.model(torch.tensor([ids]))
    got = torch.zeros(layout.n_layers, len(span), layout.n_heads, layout.head_dim)

    def take(rows: attention.Rows) -> None:
        for j in range(rows.weights.shape[-1]):
            value = rows.value_at(torch.full(rows.weights.shape[:3], j))
            got[rows.layer] += (rows.weights[..., j, None] * value)[0].transpose(0, 1)

    attention.read(any_lm, [ids], [span], take)
    for site in sites:
        want = z[site][0, span.start : span.stop].unflatten(-1, (layout.n_heads, layout.head_dim))
        assert torch.allclose(got[site.layer], want, atol=1e-4 * want.abs().max().item())


def test_soft_capping_is_kept():
    """Small logits hide the cap; here it bites."""
    from families import family

    lm = family("gemma2")
    base = attention.rows(lm, sequence(40), Span(30, 40))
    for block in lm.layout.blocks:
        block.attention.attn_logit_softcapping = 0.5
    got = attention.rows(lm, sequence(40), Span(30, 40))
    assert torch.allclose(got, full(lm, sequence(40))[:, :, 30:40], atol=1e-5)
    assert not torch.allclose(got, base, atol=1e-2)


def test_memory_is_bounded_by_a_few_rows_of_one_layer(any_lm, monkeypatch):
    """Neither the rows handed out nor what any attention forms is larger, also in a model that attends plainly itself."""
    n_heads = any_lm.layout.n_heads
    monkeypatch.setattr(attention, "ROW_NUMBERS", n_heads * 200 * 5)
    shapes, formed = [], []

    def watch(layer, attend, query, key, value):
        output, weights = attend(query, key, value)
        formed.append(0 if weights is None else weights.numel())
        return output, weights

    with hooks.wrap_attention(any_lm.layout, watch):
        attention.read(any_lm, [sequence(200)], [Span(150, 199)], lambda rows: shapes.append(rows.weights.shape))
    assert max(shape.numel() for shape in shapes) <= n_heads * 200 * 5
    assert 0 < max(formed) <= n_heads * 200 * 5
    assert sum(shape[2] for shape in shapes) == 49 * any_lm.layout.n_layers


def test_the_implementation_comes_back_after_an_error(llama):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = llama.model.config._attn_implementation
    before = {*ALL_ATTENTION_FUNCTIONS}, {*ALL_MASK_ATTENTION_FUNCTIONS}

    def broken(rows: attention.Rows) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        attention.read(llama, [sequence(9)], [Span(5, 8)], broken)
    assert llama.model.config._attn_implementation == own
    assert ({*ALL_ATTENTION_FUNCTIONS}, {*ALL_MASK_ATTENTION_FUNCTIONS}) == before


def test_standing_where_a_layer_attends_changes_nothing(any_lm, ids):
    with torch.no_grad():
        want = any_lm.model(ids).logits
        with hooks.wrap_attention(any_lm.layout, lambda layer, attend, q, k, v: attend(q, k, v)):
            got = any_lm.model(ids).logits
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("n", "span", "message"),
    [
        (10, Span(4, 4), r"Sequence 0 has 10 tokens, its queries are \[4, 4\)"),
        (10, Span(4, 11), r"queries are \[4, 11\).*inside the sequence"),
        (600, Span(590, 600), r"has 600 tokens.*more than the 512 of tiny llama"),
    ],
)
def test_bad_queries_are_refused(llama, n, span, message):
    with pytest.raises(ValueError, match=message):
        attention.rows(llama, sequence(n), span)


def test_sequences_and_spans_must_pair(llama):
    with pytest.raises(ValueError, match="2 sequences and 1 spans"):
        attention.read(llama, [sequence(5), sequence(5)], [Span(1, 3)], lambda rows: None)


# --- masks ---------------------------------------------------------------------------------------------------

HEADS = ((0, 1), (1, 0), (1, 3), (2, 2))


def plan_of(lm: LM, strength: float = 1.0) -> Plan:
    chosen = tuple(HeadEdit(min(layer, lm.layout.n_layers - 1), head, "scale", strength) for layer, head in HEADS)
    return Plan(chosen, None, "some heads", lm.provenance())


@pytest.fixture
def reference(mixed_rollouts):
    cache: dict[int, Moments] = {}

    def of(lm: LM) -> Moments:
        if id(lm) not in cache:
            cache[id(lm)] = collect.moments(lm, mixed_rollouts[:6], lambda r: "a" if r.closed else "b", kinds=("z",))
        return cache[id(lm)]

    return of


@torch.no_grad()
def logits(lm: LM, ids: torch.Tensor, *acts) -> torch.Tensor:
    with Condition(lm, acts).active():
        return lm.model(ids).logits


@torch.no_grad()
def replaced(lm: LM, ids: torch.Tensor, plan: Plan, target) -> torch.Tensor:
    """Logits when z_h(t) of the plan's heads is target(layer, head, t), set entry by entry."""

    def write(layer: int) -> hooks.Rewrite:
        def fn(value: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
            new = value.clone()
            for edit in plan.edits:
                if edit.layer == layer:
                    for b in range(len(value)):
                        for t in range(value.shape[1]):
                            new[b, t, lm.layout.head(edit.layer, edit.head)] = target(layer, edit.head, b, t).to(value)
            return new

        return fn

    with hooks.rewrite(lm.layout, {Site("z", layer): write(layer) for layer in {e.layer for e in plan.edits}}):
        return lm.model(ids).logits


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def test_zero_ablation_equals_zeros_and_the_weight_edit(any_lm, ids):
    plan = plan_of(any_lm)
    got = logits(any_lm, ids, masks.masking(plan, "zero", during="all"))
    assert near(got, replaced(any_lm, ids, plan, lambda *_: torch.zeros(any_lm.layout.head_dim)))
    assert near(got, logits(edits.apply(any_lm, plan), ids))


def test_mean_ablation_equals_the_mean_over_reference_examples(any_lm, ids, reference, mixed_rollouts):
    moments, layout = reference(any_lm), any_lm.layout
    chosen = [r for r in mixed_rollouts[:6] if r.think_tokens]
    mean = torch.zeros(layout.n_layers, layout.width("z"), dtype=torch.float64)
    for r in chosen:
        with hooks.record(layout, [Site("z", layer) for layer in range(layout.n_layers)]) as z, torch.no_grad():
            any_lm.model(torch.tensor([r.token_ids]))
        for layer in range(layout.n_layers):
            where = range(r.think.start - 1, r.think.stop - 1)
            mean[layer] += sum(z[Site("z", layer)][0, t].double() for t in where) / len(where) / len(chosen)
    plan = plan_of(any_lm)
    got = logits(any_lm, ids, masks.masking(plan, "mean", during="all", reference=moments))
    assert near(got, replaced(any_lm, ids, plan, lambda layer, head, b, t: mean[layer, layout.head(layer, head)]))


def test_uniform_ablation_equals_the_mean_of_the_visible_values(any_lm, ids):
    """One layer only, so that its values are those of the unmasked model; windows as the layer has them."""
    layout, plan = any_lm.layout, plan_of(any_lm)
    layer = 1
    plan = Plan(tuple(e for e in plan.edits if e.layer == layer), None, "one layer", plan.provenance)
    n = ids.shape[1]
    visible = [full(any_lm, row.tolist())[layer] > 0 for row in ids]
    values = torch.zeros(len(ids), n, layout.n_heads, layout.head_dim)

    def take(rows: attention.Rows) -> None:
        if rows.layer == layer:
            for b, example in enumerate(rows.examples):
                for j in range(n):
                    values[example, j] = rows.value_at(torch.full(rows.weights.shape[:3], j))[b, :, 0]

    attention.read(any_lm, ids.tolist(), [Span(0, n)] * len(ids), take)

    def uniform(layer: int, head: int, b: int, t: int) -> torch.Tensor:
        seen = [j for j in range(n) if visible[b][head, t, j]]
        return sum(values[b, j, head] for j in seen) / len(seen)

    got = logits(any_lm, ids, masks.masking(plan, "uniform", during="all"))
    assert near(got, replaced(any_lm, ids, plan, uniform))
    assert not near(got, logits(any_lm, ids), 1e-3)


@pytest.mark.parametrize("op", masks.ABLATIONS)
def test_masking_with_strength_zero_or_no_head_is_the_base_model(op, llama, ids, reference):
    given = reference(llama) if op == "mean" else None
    for plan in (plan_of(llama, 0.0), Plan((), None, "none", llama.provenance())):
        assert torch.equal(logits(llama, ids, masks.masking(plan, op, during="all", reference=given)), logits(llama, ids))


@pytest.mark.parametrize("op", masks.ABLATIONS)
@pytest.mark.parametrize("during", ["newest", "all"])
def test_masked_decoding_equals_a_teacher_forced_pass(op, during, tiny, problems_of, reference):
    """Batched, left padded, with a KV cache: greedy tokens are the arg max of one pass over prompt and response."""
    act = masks.masking(plan_of(tiny), op, during=during, reference=reference(tiny) if op == "mean" else None)
    found = rollouts(
        Condition(tiny, (act,)), problems_of(4), Sampling(temperature=0.0, max_new_tokens=12, details=True), progress=False
    )
    for r in found:
        logp = collect.logits(tiny, r, act).log_softmax(dim=-1)
        chosen = logp[torch.arange(r.response_tokens), list(r.token_ids[r.prompt_len :])]
        assert torch.allclose(chosen, torch.tensor(r.logprobs), atol=1e-4)


@pytest.mark.parametrize("op", masks.ABLATIONS)
@torch.no_grad()
def test_in_decode_only_leaves_the_prompt_and_its_cache_alone(op, any_lm, reference):
    """The prompt's states are the base model's up to its last position, which is masked."""
    layout, last = any_lm.layout, any_lm.layout.n_layers - 1
    act = masks.masking(plan_of(any_lm), op, during=masks.DECODE, reference=reference(any_lm) if op == "mean" else None)
    prompt = torch.tensor([sequence(20)])
    with hooks.record(layout, [Site("resid_post", last)]) as base:
        any_lm.model(prompt, use_cache=True)
    from transformers import DynamicCache

    with Condition(any_lm, (act,)).active(), hooks.record(layout, [Site("resid_post", last)]) as masked:
        any_lm.model(prompt, past_key_values=DynamicCache(config=any_lm.model.config), use_cache=True)
    site = Site("resid_post", last)
    assert near(masked[site][:, :-1], base[site][:, :-1], 1e-5)
    assert not near(masked[site][:, -1], base[site][:, -1], 1e-3)


def test_masks_nest_with_rows_of_attention(llama):
    """What is read inside a uniform mask is uniform."""
    ids, plan = sequence(12), Plan((HeadEdit(1, 2, "scale", 1.0),), None, "one", llama.provenance())
    with Condition(llama, (masks.masking(plan, "uniform", during="all"),)).active():
        got = attention.rows(llama, ids, Span(4, 12))
    base = attention.rows(llama, ids, Span(4, 12))
    for q, t in enumerate(range(4, 12)):
        assert torch.allclose(got[1, 2, q, : t + 1], torch.full((t + 1,), 1 / (t + 1)))
    assert torch.allclose(got[1, 1], base[1, 1], atol=1e-6)


def test_conditions_tell_masks_apart(llama, reference):
    acts = [
        masks.masking(plan_of(llama), op, during=during, reference=reference(llama) if op == "mean" else None)
        for op in masks.ABLATIONS
        for during in ("newest", "all", "think")
    ]
    assert len({str(act) for act in acts}) == 9
    assert str(acts[3]).startswith("mean ablation over think (6 examples, ")
    assert ") of heads [(0, 1, 1.0), (1, 0, 1.0)" in str(acts[3])
    assert acts[0].during == Scope(newest=True)


def test_two_references_of_equal_counts_are_two_interventions(llama, reference):
    moments = reference(llama)
    other = replace(moments, sums={"z": moments.sums["z"] * 1.001})
    one, two = (masks.masking(plan_of(llama), "mean", during="all", reference=given) for given in (moments, other))
    assert str(one) != str(two) and str(one) == str(masks.masking(plan_of(llama), "mean", during="all", reference=moments))


def test_bad_masks_are_refused(llama, model_of, reference):
    plan = plan_of(llama)
    with pytest.raises(ValueError, match="op='noise': choose one of zero, mean, uniform"):
        masks.masking(plan, "noise", during="all")
    with pytest.raises(ValueError, match="pass reference=moments with 'mean'"):
        masks.masking(plan, "mean", during="all")
    with pytest.raises(ValueError, match="pass reference=moments with 'mean'"):
        masks.masking(plan, "zero", during="all", reference=reference(llama))
    with pytest.raises(ValueError, match="strength in \\[0, 1\\]"):
        masks.masking(plan_of(llama, 1.5), "zero", during="all")
    with (
        pytest.raises(WrongModelError, match="differ from those of tiny qwen2"),
        masks.masking(plan, "zero", during="all")(model_of("qwen2")),
    ):
        pass
    other = plan_of(model_of("qwen2"))
    with pytest.raises(WrongModelError, match="reference means were collected from tiny llama"):
        masks.masking(other, "mean", during="all", reference=reference(llama))(model_of("qwen2"))
    bad = Plan((HeadEdit(0, 9, "scale", 1.0),), None, "bad", llama.provenance())
    with pytest.raises(IndexError, match=r"Head 0\.9 does not exist"), masks.masking(bad, "zero", during="all")(llama):
        pass
