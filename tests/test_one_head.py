"""One head: its contributions, against what masking a head changes and what attention adds; tokens against full logits."""

from __future__ import annotations

import pytest
import torch

from toolkit import attention, collect, hooks, masks, one_head
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM
from toolkit.methods import thinkedit
from toolkit.sites import Site
from toolkit.types import HeadEdit, Plan, Span


def sequence(n: int, seed: int = 0) -> list[int]:
    return torch.randint(5, 103, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def stream(lm: LM, ids: list[int], layer: int) -> dict[str, torch.Tensor]:
    sites = {name: Site(name, layer) for name in ("resid_pre", "resid_mid", "attn_out")}
    with hooks.record(lm.layout, sites.values()) as values:
        lm.model(torch.tensor([ids]))
    return {name: values[site][0].float() for name, site in sites.items()}


def test_the_contributions_of_all_heads_add_up_to_what_attention_adds(any_lm):
    layer, ids = any_lm.layout.attention_layers[-1], sequence(20)
    heads = [one_head.contribution(any_lm, ids, layer, h) for h in range(any_lm.layout.heads[layer])]
    values = stream(any_lm, ids, layer)
    added = (values["resid_mid"] - values["resid_pre"]) * any_lm.layout.to_end(layer) / any_lm.layout.factor
    # The biases of W_O and of a norm belong to no head.
    norm, bias = any_lm.layout.norm(layer), any_lm.layout.b_O(layer)
    if norm is not None:
        scaled = values["attn_out"] / norm.scale(values["attn_out"])
        torch.testing.assert_close(added, one_head.in_stream(any_lm.layout, layer, scaled), rtol=1e-3, atol=1e-4)
    elif bias is not None:
        added = added - bias * any_lm.layout.to_end(layer)
    torch.testing.assert_close(torch.stack(heads).sum(0), added, rtol=1e-3, atol=1e-4)


def test_masking_a_head_removes_its_contribution_and_nothing_else(tiny):
    ids = sequence(24)
    plan = Plan((HeadEdit(2, 4, "scale", 1.0),), None, "head 2.4", tiny.provenance())
    before = stream(tiny, ids, 2)["resid_mid"]
    with masks.masking(plan, "zero", during="all")(tiny):
        after = stream(tiny, ids, 2)["resid_mid"]
    torch.testing.assert_close(before - after, one_head.contribution(tiny, ids, 2, 4), rtol=1e-4, atol=1e-4)


def test_a_part_of_attention_moves_along_a_direction_as_the_direction_says_at_attn_out(any_lm):
    layer = any_lm.layout.attention_layers[0]
    v, part = torch.randn(2, any_lm.layout.d_model, generator=torch.Generator().manual_seed(1))
    got = v @ one_head.in_stream(any_lm.layout, layer, part)
    torch.testing.assert_close(got, any_lm.layout.to_attn_out(layer, v) @ part, rtol=1e-4, atol=1e-4)


def test_the_mean_contribution_along_the_direction_is_the_published_score_with_the_sign_turned(tiny, problems_of):
    sampled = rollouts(tiny, problems_of(4), Sampling(n=4, max_new_tokens=200), progress=False)
    classes = thinkedit.quantile_classes(sampled, share=0.5, at_least=1)
    moments = collect.moments(tiny, sampled, by=classes, kinds=("resid_mid", "z"))
    v = thinkedit.direction(moments)
    layer, head = 3, 2
    unit = v.unit()[layer].float()
    means = []
    for r in (r for r in sampled if classes(r) == "short"):
        along = one_head.contribution(tiny, r.token_ids, layer, head) @ unit
        means.append(along[list(collect.THINK.of(r))].mean())
    score = thinkedit.head_scores(moments, v, tiny).score[layer, head]
    assert float(torch.stack(means).mean()) == pytest.approx(-float(score), rel=1e-3, abs=1e-4)


def test_tokens_are_those_whose_centred_logits_change_most(tiny):
    vector = torch.randn(tiny.layout.d_model, generator=torch.Generator().manual_seed(0))
    W_U = tiny.model.get_output_embeddings().weight.detach()
    change = [float((W_U[t] - W_U.mean(0)) @ vector) for t in range(len(tiny.tokenizer))]
    order = sorted(range(len(change)), key=lambda t: -change[t])
    raised, lowered = one_head.token_effects(tiny, vector, 3)
    assert [text for text, _ in raised] == [tiny.text([t]) for t in order[:3]]
    assert [text for text, _ in lowered] == [tiny.text([t]) for t in order[:-4:-1]]
    assert raised[0][1] == pytest.approx(change[order[0]], abs=1e-4)


def test_rows_of_one_head_are_those_of_all_heads(any_lm):
    ids, span, layer = sequence(30), Span(10, 29), any_lm.layout.attention_layers[-1]
    torch.testing.assert_close(one_head.attention_rows(any_lm, ids, span, layer, 1), attention.rows(any_lm, ids, span)[layer, 1])


def test_a_head_that_does_not_exist_is_refused(tiny):
    with pytest.raises(IndexError, match=r"Head 1\.8 does not exist"):
        one_head.attention_rows(tiny, sequence(8), Span(2, 5), 1, 8)
    with pytest.raises(IndexError, match=r"Head 1\.8 does not exist"):
        one_head.contribution(tiny, sequence(8), 1, 8)
