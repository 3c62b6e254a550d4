"""Patching heads: identities, a naive version in one pass without a cache, and sampling with rows that end at different times."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zoo

from toolkit import collect, edits, hooks, tasks
from toolkit.entropies import with_entropies
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition
from toolkit.patching import patch, patched
from toolkit.sites import Site
from toolkit.steering import steering
from toolkit.store import WrongModelError
from toolkit.types import Direction, HeadEdit, Plan, Rollout, Span

TYPES = ("qwen3", "gemma2", "gpt2")  # plain; a norm after W_O and sliding windows; biases and transposed weights
HEADS = ((1, 2), (3, 0))


def rollout(n: int = 24, seed: int = 0) -> Rollout:
    ids = tuple(torch.randint(5, 103, (n,), generator=torch.Generator().manual_seed(seed)).tolist())
    return Rollout("p", seed, ids, 9, Span(10, n - 5), Span(n - 4, n), "stop", "", correct=True)


def edited(lm: LM, heads=HEADS, strength: float = 0.7) -> LM:
    plan = Plan(tuple(HeadEdit(*h, "scale", strength) for h in heads), None, "scaled", lm.provenance())
    return edits.apply(lm, plan)


def steered(lm: LM, strength: float = 1.0) -> Condition:
    vector = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(3))
    v = Direction(vector, "resid_mid", "all", "made up", 0, 0, lm.provenance())
    return Condition(lm, (steering(v, strength),))


@pytest.fixture(scope="module", params=TYPES)
def model(request) -> LM:
    return zoo.model_of_type(request.param)


@torch.no_grad()
def naive(target: Condition, donor: Condition, heads, r: Rollout) -> torch.Tensor:
    """Return the logits of the patched model in one pass without a cache: the donor first, then the model."""
    ids, layout = torch.tensor([r.token_ids[:-1]]), target.lm.layout
    with donor.active(), hooks.record(donor.lm.layout, [Site("z", layer) for layer, _ in heads]) as z:
        donor.lm.model(ids)

    def replaced(layer: int):
        def fn(value: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
            for at, head in heads:
                if at == layer:
                    c = layout.head(layer, head)
                    value = value - inputs[..., c] @ layout.W_O(layer)[:, c].T
                    value = value + z[Site("z", layer)][..., c] @ donor.lm.layout.W_O(layer)[:, c].T
            return value

        return fn

    with target.active(), hooks.rewrite(layout, {Site("attn_out", layer): replaced(layer) for layer, _ in heads}):
        return target.lm.model(ids).logits[0, r.prompt_len - 1 :].float()


def test_a_patch_equals_a_naive_version_in_one_pass(model):
    other = edited(model, model.layout.all_heads, 0.4)
    for target, donor in (
        (Condition(model), Condition(other)),
        (Condition(other), Condition(model)),
        (Condition(model), steered(model)),
    ):
        got = collect.logits(target.lm, rollout(), patch(donor, HEADS))
        torch.testing.assert_close(got, naive(target, donor, HEADS, rollout()), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(got, collect.logits(target.lm, rollout()), atol=1e-2)


def test_one_donor_serves_patches_of_several_heads(model):
    donor = patch(edited(model, model.layout.all_heads, 0.4), model.layout.all_heads)
    for head in HEADS:
        assert torch.equal(
            collect.logits(model, rollout(), donor.only(head)), collect.logits(model, rollout(), patch(donor.donor, [head]))
        )
    with pytest.raises(ValueError, match="given twice"):
        donor.only((0, 0), (0, 0))


def test_a_model_patched_from_itself_is_unchanged(model):
    before = collect.logits(model, rollout())
    assert torch.equal(before, collect.logits(model, rollout(), patch(model, model.layout.all_heads)))


def test_all_heads_put_back_give_base_if_only_heads_were_changed(model):
    other = edited(model)
    back = collect.logits(other, rollout(), patch(model, model.layout.all_heads))
    torch.testing.assert_close(back, collect.logits(model, rollout()), rtol=1e-3, atol=1e-3)
    there = collect.logits(model, rollout(), patch(other, model.layout.all_heads))
    torch.testing.assert_close(there, collect.logits(other, rollout()), rtol=1e-3, atol=1e-3)


def test_a_donor_is_not_steered_by_the_steering_of_the_model_that_it_is_a_copy_of(model):
    target, heads = steered(model), model.layout.all_heads
    from_itself = patch(model, heads)  # made before the steering acts
    with target.active():
        got = collect.logits(model, rollout(), from_itself)
    torch.testing.assert_close(got, naive(target, Condition(model), heads, rollout()), rtol=1e-3, atol=1e-3)


def test_batches_of_responses_of_different_lengths_are_read_as_single_ones(model):
    other, some = edited(model), [rollout(n, n) for n in (24, 17, 31)]
    some = [replace(r, prompt_len=r.prompt_len - i) for i, r in enumerate(some)]
    condition = patched(model, patch(other, HEADS))
    together = with_entropies(condition, some)
    for r, alone in zip(together, (with_entropies(condition, [r])[0] for r in some), strict=True):
        assert r.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        assert r.logprobs != pytest.approx(with_entropies(model, [r])[0].logprobs, abs=1e-3)


def test_sampling_with_all_heads_put_back_gives_the_tokens_of_base(tiny):
    problems, sampling = tasks.load("arithmetic", "dev", 6), Sampling(n=3, max_new_tokens=60, seed=1)
    other = edited(tiny, ((2, 4), (3, 1)), 1.0)
    base, changed = rollouts(tiny, problems, sampling), rollouts(other, problems, sampling)
    back = rollouts(patched(other, patch(tiny, tiny.layout.all_heads)), problems, sampling)
    assert [r.token_ids for r in back] == [r.token_ids for r in base] != [r.token_ids for r in changed]


def test_models_of_other_shapes_and_heads_given_twice_are_refused(tiny):
    with pytest.raises(WrongModelError, match="patch between models of one architecture"):
        Condition(tiny, (patch(zoo.model_of_type("qwen3"), HEADS),)).during[0](tiny)
    with pytest.raises(ValueError, match="given twice"):
        patch(tiny, [(0, 0), (0, 0)])
    with pytest.raises(IndexError, match="layer 0 has heads"):
        patch(tiny, [(0, 99)])


def test_a_cache_that_was_begun_outside_is_refused(tiny):
    ids = torch.tensor([rollout().token_ids])
    cache = tiny.model(ids, use_cache=True).past_key_values
    with patch(tiny, [(0, 0)])(tiny), pytest.raises(ValueError, match="begun outside the patch"):
        tiny.model(ids[:, :1], past_key_values=cache, use_cache=True)


def test_the_text_of_a_patch_names_the_donor_and_the_heads(tiny):
    texts = {str(patch(donor, heads)) for donor in (tiny, edited(tiny), steered(tiny)) for heads in ([(0, 1)], [(1, 0)])}
    assert len(texts) == 6
