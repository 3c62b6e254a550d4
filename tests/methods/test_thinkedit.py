"""ThinkEdit and its moments against naive re-typed formulas: python loops, one example at a time, fp64.

The oracles below know nothing of batching, padding, running sums, or the projected form of the head score.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import typer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from toolkit import collect, directions, edits, hooks, jobs, passes
from toolkit.cli.help import app
from toolkit.lm import LM, NoThinkTagsError
from toolkit.methods import thinkedit
from toolkit.positions import THINK
from toolkit.sites import Site
from toolkit.types import Direction, Moments, Rollout, Span

POST_NORM_GAIN = {"Gemma2RMSNorm": 1.0, "Gemma3RMSNorm": 1.0, "Olmo2RMSNorm": 0.0}  # what is added to the weight


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether a equals b relative to b's largest entry, layer by layer."""
    a, b = a.detach().double().flatten(1), b.detach().double().flatten(1)
    return bool(((a - b).abs().amax(1) <= tolerance * b.abs().amax(1)).all())


# --- oracles -------------------------------------------------------------------------------------------------


PASSES: dict[tuple, dict[Site, Tensor]] = {}  # each sequence runs once a model, for all oracles


@torch.no_grad()
def one_pass(lm: LM, rollout: Rollout, kind: str) -> list[Tensor]:
    """Activations ``[seq, width]`` of every layer for one sequence by itself, nothing padded."""
    layers, key = range(lm.layout.n_layers), (lm.name, lm.fingerprint, rollout.token_ids)
    if key not in PASSES:
        wanted = [Site(k, layer) for k in ("resid_pre", "resid_mid", "resid_post", "z", "attn_out") for layer in layers]
        with hooks.record(lm.layout, wanted) as PASSES[key]:
            lm.model(input_ids=torch.tensor([rollout.token_ids]), use_cache=False)
    return [PASSES[key][Site(kind, layer)][0].double() for layer in layers]


def naive_mean(lm: LM, rollouts: Sequence[Rollout], kind: str) -> Tensor:
    """Mean over examples of the mean over positions start-1 .. stop-2, by loops."""
    total = torch.zeros(lm.layout.n_layers, lm.layout.width(kind), dtype=torch.float64)
    for rollout in rollouts:
        values = one_pass(lm, rollout, kind)
        for layer, value in enumerate(values):
            mean = torch.zeros(lm.layout.width(kind), dtype=torch.float64)
            count = 0
            for t in range(rollout.think.start - 1, rollout.think.stop - 1):
                mean += value[t]
                count += 1
            total[layer] += mean / count
    return total / len(rollouts)


def gain(lm: LM, layer: int) -> Tensor:
    """Gain of the post-norm behind attention, read off its weight by family; ones where there is none."""
    norm = lm.layout.blocks[layer].post_attention_norm
    if norm is None:
        return torch.ones(lm.layout.d_model, dtype=torch.float64)
    return norm.weight.detach().double() + POST_NORM_GAIN[type(norm).__name__]


def naive_unit(lm: LM, v: Tensor, layer: int) -> Tensor:
    """What is projected out of the output projection, so that nothing along v is left behind the norm."""
    carried = gain(lm, layer) * v.double()
    return carried / carried.norm()


def naive_written(lm: LM, rollout: Rollout, layer: int) -> Tensor:
    """What each head adds to the residual stream, ``[seq, heads, d_model]``, position by position, behind the norm if there is one.

    Checked on the way: with the bias, the heads add up to what attention really adds.
    """
    layout = lm.layout
    z, attn_out, before, after = (one_pass(lm, rollout, kind)[layer] for kind in ("z", "attn_out", "resid_pre", "resid_mid"))
    out, norm = layout.blocks[layer].out, layout.blocks[layer].post_attention_norm
    weight = out.weight.detach().double()
    W = weight.T if "Conv1D" in type(out).__name__ else weight
    written = torch.zeros(len(z), layout.n_heads, layout.d_model, dtype=torch.float64)
    for t in range(len(z)):
        denominator = 1.0
        if norm is not None:
            eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
            denominator = (sum(x * x for x in attn_out[t].tolist()) / layout.d_model + eps) ** 0.5
        for h in range(layout.n_heads):
            columns = slice(h * layout.head_dim, (h + 1) * layout.head_dim)
            written[t, h] = gain(lm, layer) * (W[:, columns] @ z[t, columns]) / denominator
        bias = 0.0 if getattr(out, "bias", None) is None else gain(lm, layer) * out.bias.detach().double() / denominator
        assert close((written[t].sum(dim=0) + bias)[None], (after - before)[t][None], 1e-3)
    return written


def naive_head_scores(lm: LM, rollouts: Sequence[Rollout], v: Tensor) -> Tensor:
    """Mean over short examples of <mean_t what the head adds to the stream, -v/|v|>."""
    score = torch.zeros(lm.layout.n_layers, lm.layout.n_heads, dtype=torch.float64)
    for rollout in rollouts:
        for layer in range(lm.layout.n_layers):
            mean = naive_written(lm, rollout, layer)[rollout.think.start - 1 : rollout.think.stop - 1].mean(dim=0)
            score[layer] -= mean @ (v[layer].double() / v[layer].double().norm())
    return score / len(rollouts)


def naive_edit(lm: LM, W: Tensor, v: Tensor, layer: int, heads: Sequence[int], strength: float) -> Tensor:
    """W_h <- (I - lambda v v^T) W_h, entry by entry, in fp64."""
    W = W.detach()
    new, unit = W.double().clone(), naive_unit(lm, v, layer)
    for h in heads:
        for j in range(h * lm.layout.head_dim, (h + 1) * lm.layout.head_dim):
            along = sum(float(unit[k]) * float(W[k, j]) for k in range(len(unit)))
            for i in range(len(unit)):
                new[i, j] -= strength * float(unit[i]) * along
    return new


# --- fixtures ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moments_of(mixed_rollouts, by_length):
    @functools.cache
    def make(lm_name: str, lm_id: int) -> Moments:
        return collect.moments(cache[lm_id], mixed_rollouts, by_length, second=("resid_mid",))

    cache: dict[int, LM] = {}

    def get(lm: LM) -> Moments:
        cache[id(lm)] = lm
        return make(lm.name, id(lm))

    return get


@pytest.fixture(scope="module")
def classes(mixed_rollouts, by_length) -> dict[str, list[Rollout]]:
    return {name: [r for r in mixed_rollouts if by_length(r) == name and r.think_tokens] for name in ("long", "short")}


# --- the published formulas ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resid_mid", "resid_post"])
def test_direction_equals_the_naive_difference_of_means(any_lm, kind, moments_of, classes):
    ours = thinkedit.direction(moments_of(any_lm), kind)
    long, short = naive_mean(any_lm, classes["long"], kind), naive_mean(any_lm, classes["short"], kind)
    assert close(ours.vector, long - short)
    assert (ours.n_pos, ours.n_neg, ours.kind) == (len(classes["long"]), len(classes["short"]), kind)
    assert ours.provenance.fingerprint == any_lm.fingerprint


def test_head_scores_equal_explicit_head_contributions(any_lm, moments_of, classes):
    moments = moments_of(any_lm)
    v = thinkedit.direction(moments)
    ours = thinkedit.head_scores(moments, v, any_lm).score
    assert not ours.requires_grad, "scores are numbers, to be printed and drawn"
    naive = naive_head_scores(any_lm, classes["short"], v.vector)
    assert close(ours.flatten()[None], naive.flatten()[None])
    contrast = thinkedit.contrast_scores(moments, v, any_lm).score
    last = v.vector[-1:].repeat(len(v.vector), 1)
    naive = naive_head_scores(any_lm, classes["short"], last) - naive_head_scores(any_lm, classes["long"], last)
    assert close(contrast.flatten()[None], naive.flatten()[None])


def test_the_written_direction_is_what_the_heads_add_to_the_stream_in_long_minus_short_thinking(any_lm, moments_of, classes):
    """It lives before the norm, where there is one: times the norm's gain it is what reaches the stream."""
    heads = [(0, 1), (1, 0), (1, 3)]
    ours = thinkedit.written_direction(moments_of(any_lm), heads, any_lm)
    assert (ours.kind, ours.estimator) == ("attn_out", "written_by_heads")
    for layer in range(any_lm.layout.n_layers):
        expected = torch.zeros(any_lm.layout.d_model, dtype=torch.float64)
        for name, sign in (("long", 1), ("short", -1)):
            for rollout in classes[name]:
                where = slice(rollout.think.start - 1, rollout.think.stop - 1)
                mean = naive_written(any_lm, rollout, layer)[where].mean(dim=0)
                expected += sign * sum(mean[h] for at, h in heads if at == layer) / len(classes[name])
        assert close((gain(any_lm, layer) * ours.vector[layer])[None], expected[None])


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_edited_weights_equal_the_naive_edit(any_lm, strength, moments_of):
    v = thinkedit.direction(moments_of(any_lm))
    scores = thinkedit.head_scores(moments_of(any_lm), v, any_lm)
    plan = edits.plan(scores, v, count=5, strength=strength)
    edited = edits.apply(any_lm, plan)
    for layer in range(any_lm.layout.n_layers):
        heads = [head for at, head in plan.heads if at == layer]
        W = any_lm.layout.W_O(layer)
        expected = naive_edit(any_lm, W, v.vector[layer], layer, heads, strength)
        assert close(edited.layout.W_O(layer)[None], expected[None])
        if heads:
            assert not close(W[None], expected[None]), "the oracle itself changed nothing"


def test_the_whole_path_equals_the_naive_path(any_lm, mixed_rollouts, by_length, moments_of, classes):
    """From rollouts to the chosen heads without one number of ours in between."""
    v = naive_mean(any_lm, classes["long"], "resid_mid") - naive_mean(any_lm, classes["short"], "resid_mid")
    naive = naive_head_scores(any_lm, classes["short"], v)
    order = naive.flatten().argsort(descending=True)[:3].tolist()
    moments = moments_of(any_lm)
    found = thinkedit.direction(moments)
    plan = edits.plan(thinkedit.head_scores(moments, found, any_lm), found, count=3)
    assert plan.heads == [divmod(i, any_lm.layout.n_heads) for i in order]


def test_a_head_that_writes_minus_v_in_short_thinking_ranks_first(model_of, moments_of, mixed_rollouts, by_length):
    """Planted: head (1, 2) is made to write along -v whenever its z points where it does in short thinking."""
    lm = model_of("qwen3")
    before = moments_of(lm)
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=generator)
    v = Direction(vector, "resid_mid", "think", "by hand", 1, 1, lm.provenance())
    columns = lm.layout.head(1, 2)
    z = before.mean("z", "short")[1, columns].float()
    nothing = edits.Plan((edits.HeadEdit(1, 2, "scale", 0.0),), None, "a copy of layer 1", lm.provenance())
    planted = edits.apply(lm, nothing)
    with torch.no_grad():
        planted.layout.W_O(1)[:, columns] = -30 * torch.outer(v.unit()[1], z / z.norm())
    after = collect.moments(planted, mixed_rollouts, by_length)
    scores = thinkedit.head_scores(after, v, planted)
    assert scores.ranked()[0] == (1, 2)
    assert scores.score[1, 2].item() == pytest.approx(30 * z.norm().item(), rel=1e-4)
    flipped = thinkedit.head_scores(after, replace(v, vector=-v.vector), planted)
    assert flipped.ranked()[-1] == (1, 2)


def test_plus_is_longer(any_lm, moments_of):
    moments = moments_of(any_lm)
    v = thinkedit.direction(moments)
    gap = ((moments.mean("resid_mid", "long") - moments.mean("resid_mid", "short")) * v.vector).sum(dim=-1)
    assert (gap > 0).all()
    assert (directions.separation(moments, v) > 0).all()


@torch.no_grad()
def test_strength_1_leaves_no_component_along_v_in_what_attention_adds(any_lm, moments_of, mixed_rollouts):
    """All heads of a layer edited: after the post-norm, where there is one, nothing is left along v but the bias's share."""
    v = thinkedit.direction(moments_of(any_lm))
    layer, layout = 1, any_lm.layout
    every = tuple(edits.HeadEdit(layer, h, "project_out", 1.0) for h in range(layout.n_heads))
    edited = edits.apply(any_lm, edits.Plan(every, v, "all heads", any_lm.provenance()))
    unit = v.unit()[layer].float()

    def along(lm: LM) -> Tensor:
        with hooks.record(lm.layout, [Site("resid_pre", layer), Site("resid_mid", layer)]) as values:
            lm.model(input_ids=torch.tensor([mixed_rollouts[0].token_ids]))
        added = values[Site("resid_mid", layer)] - values[Site("resid_pre", layer)]
        bias = lm.layout.b_O(layer)
        added = added - (0 if bias is None else bias)
        return (added @ unit).abs().max() / added.norm(dim=-1).max()

    assert along(edited) < 1e-5
    assert along(any_lm) > 1e-3


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2"])
@torch.no_grad()
def test_edited_heads_of_a_post_norm_model_write_nothing_along_v_after_the_norm(family, model_of, moments_of, ids):
    lm = model_of(family)
    v = thinkedit.direction(moments_of(lm))
    plan = edits.plan(thinkedit.head_scores(moments_of(lm), v, lm), v, count=4)
    edited = edits.apply(lm, plan)
    wanted = [Site(kind, layer) for kind in ("z", "attn_out") for layer in range(3)]
    with hooks.record(edited.layout, wanted) as values:
        edited.model(input_ids=ids)
    for layer, head in plan.heads:
        columns, norm = lm.layout.head(layer, head), lm.layout.blocks[layer].post_attention_norm
        rms = values[Site("attn_out", layer)].pow(2).mean(-1, keepdim=True).sqrt()
        for model, zero in ((edited, True), (lm, False)):
            contribution = values[Site("z", layer)][..., columns] @ model.layout.W_O(layer)[:, columns].T
            after_norm = gain(lm, layer).float() * contribution / rms
            share = (after_norm @ v.unit()[layer].float()).abs().max() / after_norm.norm(dim=-1).max()
            assert (share < 1e-5) == zero, (layer, head, share)
        assert norm is not None


# --- moments -------------------------------------------------------------------------------------------------


def test_moments_do_not_depend_on_order_or_batches(any_lm, mixed_rollouts, by_length, moments_of, monkeypatch):
    base = moments_of(any_lm)
    shuffled = random.Random(5).sample(mixed_rollouts, len(mixed_rollouts))
    monkeypatch.setattr(passes, "BATCH_TOKENS", 100)
    single = collect.moments(any_lm, shuffled, by_length, second=("resid_mid",))
    assert (single.labels, single.n) == (base.labels, base.n)
    for kind in base.sums:
        assert close(single.sums[kind].flatten(0, 1), base.sums[kind].flatten(0, 1)), kind
    assert close(single.outer["resid_mid"].flatten(0, 1), base.outer["resid_mid"].flatten(0, 1))


def test_padding_never_reaches_a_mean(llama, rollout_of, by_length):
    """A short example's sums are the same beside a long one as alone."""
    short, long = rollout_of(4, name="a"), rollout_of(60, name="b")
    alone = collect.moments(llama, [short], by_length)
    together = collect.moments(llama, [short, long], by_length)
    for kind in alone.sums:
        assert close(alone.mean(kind, "short"), together.mean(kind, "short"), 1e-6)


def test_shards_merge(any_lm, mixed_rollouts, by_length, moments_of):
    first, second = mixed_rollouts[::2], mixed_rollouts[1::2]
    parts = [collect.moments(any_lm, part, by_length, second=("resid_mid",)) for part in (first, second)]
    merged, base = parts[0] + parts[1], moments_of(any_lm)
    assert (merged.labels, merged.n, merged.positions) == (base.labels, base.n, base.positions)
    for kind in base.sums:
        assert close(merged.sums[kind].flatten(0, 1), base.sums[kind].flatten(0, 1))
    assert close(merged.covariance("resid_mid").flatten(1), base.covariance("resid_mid").flatten(1))


def test_a_shard_that_happens_to_lack_a_class_merges(llama, mixed_rollouts, by_length, moments_of):
    parts = [
        collect.moments(llama, [r for r in mixed_rollouts if by_length(r) == name], by_length, second=("resid_mid",))
        for name in ("long", "short")
    ]
    merged, base = parts[0] + parts[1], moments_of(llama)
    assert (merged.labels, merged.n) == (base.labels, base.n)
    for kind in base.sums:
        assert close(merged.mean(kind, "long"), base.mean(kind, "long"))


def test_moments_of_another_model_are_not_merged(llama, model_of, moments_of):
    with pytest.raises(ValueError, match="cannot be added"):
        moments_of(llama) + moments_of(model_of("qwen2"))


def test_covariance_equals_the_naive_one(llama, moments_of, classes):
    """Pooled over classes; within an example every position weighs the same, every example weighs 1."""
    expected = torch.zeros(3, 32, 32, dtype=torch.float64)
    for name in ("long", "short"):
        mean = naive_mean(llama, classes[name], "resid_mid")
        for rollout in classes[name]:
            for layer, value in enumerate(one_pass(llama, rollout, "resid_mid")):
                where = value[rollout.think.start - 1 : rollout.think.stop - 1]
                expected[layer] += sum(torch.outer(x, x) for x in where - mean[layer]) / len(where)
                # Cross terms: example means are not the class mean.
    expected /= len(classes["long"]) + len(classes["short"])
    assert close(moments_of(llama).covariance("resid_mid").flatten(1), expected.flatten(1))


def test_sums_do_not_grow_with_the_number_of_rollouts(llama, rollout_of, by_length):
    def size(n: int) -> int:
        found = collect.moments(llama, [rollout_of(5, seed=i, name=str(i)) for i in range(n)], by_length)
        return sum(t.untyped_storage().nbytes() for t in found.sums.values())

    assert size(2) == size(40) == 3 * (32 + 32 + 32) * 8


class Largest(TorchDispatchMode):
    """Remembers the largest tensor, and every shape, that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.shapes = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.shapes.add(tuple(leaf.shape))
                self.numel = max(self.numel, leaf.numel())
        return result


def test_no_tensor_of_tokens_by_heads_by_d_model_and_no_logits_are_ever_made(model_of, rollout_of, by_length):
    """The published code's ``[tokens, heads, d_model]`` would be the largest tensor by far."""
    lm = model_of("qwen3")
    rollouts = [rollout_of(40, seed=i, name=str(i)) for i in range(8)]
    tokens = sum(len(r.token_ids) for r in rollouts)
    with Largest() as seen:
        collect.moments(lm, rollouts, by_length, second=("resid_mid",))
    assert seen.numel < tokens * lm.layout.n_heads * lm.layout.d_model
    assert not any(shape and shape[-1] == 103 for shape in seen.shapes), "logits were computed"


def test_peak_size_does_not_grow_with_the_number_of_rollouts(llama, rollout_of, by_length, monkeypatch):
    monkeypatch.setattr(passes, "BATCH_TOKENS", 200)

    def peak(n: int) -> int:
        with Largest() as seen:
            collect.moments(llama, [rollout_of(30, seed=i, name=str(i)) for i in range(n)], by_length)
        return seen.numel

    assert peak(8) == peak(40)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 1 TB")])
def test_running_out_of_memory_halves_the_batch_and_counts_nothing_twice(error, llama, mixed_rollouts, by_length, moments_of):
    """Memory runs out *inside* the pass, at the second layer, whenever more than 3 rows are in it."""
    sizes = []

    def crowded(module, args, output):
        sizes.append(len(output[0] if isinstance(output, tuple) else output))
        if sizes[-1] > 3:
            raise error

    handle = llama.layout.blocks[1].mlp.register_forward_hook(crowded)
    try:
        found = collect.moments(llama, mixed_rollouts, by_length)
    finally:
        handle.remove()
    assert max(sizes) > 3 >= min(sizes)
    assert found.n == moments_of(llama).n
    for kind in found.sums:
        assert close(found.sums[kind].flatten(0, 1), moments_of(llama).sums[kind].flatten(0, 1))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("shape mismatch")])
def test_an_error_that_halving_cannot_help_is_raised(error, llama, mixed_rollouts, by_length):
    sizes = []

    def fail(module, args, output):
        sizes.append(len(output))
        raise error

    handle = llama.layout.blocks[1].mlp.register_forward_hook(fail)
    try:
        with pytest.raises(type(error), match=str(error)):
            collect.moments(llama, mixed_rollouts, by_length)
    finally:
        handle.remove()
    if isinstance(error, torch.OutOfMemoryError):
        assert sizes[-1] == 1
    else:
        assert len(sizes) == 1


def test_moments_need_a_class_with_positions(llama, rollout_of):
    with pytest.raises(NoThinkTagsError, match=r"None of the 2 rollouts of tiny llama .*'think'.*--think 'response'"):
        collect.moments(llama, [rollout_of(0), rollout_of(5)], lambda r: None if r.think_tokens else "short")


def test_unknown_classes_and_sites_are_named(llama, moments_of):
    moments = moments_of(llama)
    with pytest.raises(KeyError, match=r"No class 'medium'.*long, short"):
        moments.mean("z", "medium")
    with pytest.raises(KeyError, match=r"'mlp_out' was not collected.*resid_mid, resid_post, z"):
        moments.mean("mlp_out", "long")
    with pytest.raises(KeyError, match=r"second=\('z',\)"):
        moments.covariance("z")


def test_step_starts_are_the_first_predictor_and_the_ends_of_lines(tiny, token):
    newline = tiny.tokenizer.encode("\n")[-1]
    ids = (5, 6, token("<think>"), 20, newline, 21, 22, newline, 23, token("</think>"), 30)
    rollout = Rollout("p", 0, ids, 2, Span(3, 9), Span(10, 11), "stop", "", False)
    # Predictors are 2..7: position 2 opens, 4 and 7 hold a newline; 8 is not a predictor of a think token.
    assert list(collect.step_starts(tiny).of(rollout)) == [2, 4, 7]
    assert list(collect.THINK.of(rollout)) == [2, 3, 4, 5, 6, 7]


# --- directions ----------------------------------------------------------------------------------------------


def test_whitened_solves_the_shrunk_covariance_and_keeps_the_norm(any_lm, moments_of):
    moments = moments_of(any_lm)
    plain, ours = directions.mean_difference(moments, "resid_mid"), directions.whitened(moments, "resid_mid", shrinkage=0.2)
    covariance = moments.covariance("resid_mid")
    for layer in range(any_lm.layout.n_layers):
        C = covariance[layer]
        shrunk = 0.8 * C + 0.2 * (C.trace() / len(C)) * torch.eye(len(C), dtype=C.dtype)
        back = shrunk @ ours.vector[layer]
        assert torch.cosine_similarity(back, plain.vector[layer], dim=0) == pytest.approx(1, abs=1e-8)
    assert torch.allclose(ours.norms, plain.norms)
    assert ours.estimator == "whitened"


def test_full_shrinkage_is_the_mean_difference(llama, moments_of):
    full = directions.whitened(moments_of(llama), "resid_mid", shrinkage=1.0)
    assert torch.allclose(full.vector, directions.mean_difference(moments_of(llama), "resid_mid").vector)


def test_a_layer_without_a_difference_has_the_zero_direction_not_nan(llama, moments_of):
    moments = moments_of(llama)
    same = moments.sums["resid_mid"].clone()
    same[:, 1] = torch.tensor(moments.n)[:, None] * torch.ones(32, dtype=same.dtype)
    flat = replace(moments, sums={**moments.sums, "resid_mid": same})
    for estimator in (directions.mean_difference, directions.whitened):
        v = estimator(flat, "resid_mid")
        assert torch.isfinite(v.vector).all()
        assert not v.unit()[1].any() and torch.allclose(v.unit()[0].norm(), torch.tensor(1.0, dtype=torch.float64))
        assert torch.isfinite(directions.random_like(v, seed=0).vector).all()


@pytest.mark.parametrize("shrinkage", [0.0, 1.5, -0.1])
def test_shrinkage_outside_its_range_is_refused(shrinkage, llama, moments_of):
    with pytest.raises(ValueError, match=f"shrinkage={shrinkage}: need 0 < shrinkage <= 1"):
        directions.whitened(moments_of(llama), "resid_mid", shrinkage=shrinkage)


def test_the_random_control_has_equal_norms_and_follows_its_seed(tiny, moments_of):
    v = thinkedit.direction(moments_of(tiny))
    a, b, c = (directions.random_like(v, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.vector, b.vector) and not torch.equal(a.vector, c.vector)
    assert torch.allclose(a.norms, v.norms)
    assert directions.cosine(a, v).abs().max() < 0.5
    assert torch.allclose(a.vector @ a.vector.T, v.vector @ v.vector.T), "its layers have the cosines of the direction's"
    assert a.kind == v.kind and a.estimator == "random(seed=0)"


# --- classes -------------------------------------------------------------------------------------------------


def test_absolute_classes_are_strict_as_published(rollout_of):
    classes = thinkedit.LengthClasses(100.0, 1000.0)
    lengths = {99: "short", 100: None, 1000: None, 1001: "long"}
    assert {n: classes(rollout_of(n)) for n in lengths} == lengths
    assert (thinkedit.PUBLISHED_SHORT, thinkedit.PUBLISHED_LONG) == (100, 1000)


def test_a_response_that_never_closed_or_never_opened_is_in_no_class(rollout_of):
    classes = thinkedit.LengthClasses(10.0, 20.0)
    assert classes(rollout_of(50, closed=False)) is None
    assert classes(replace(rollout_of(5), think=None)) is None
    assert classes(rollout_of(0)) is None, "an empty span has no position to read"
    assert classes(rollout_of(1)) == "short"


def test_at_least_counts_only_responses_that_give_activations(rollout_of):
    """Empty spans set no threshold and fill no class, so that the short class is as large as the mean over it."""
    empty = [rollout_of(0, seed=i, name=f"e{i}") for i in range(30)]
    rollouts = [rollout_of(50 + i, name=str(i)) for i in range(70)]
    classes = thinkedit.quantile_classes([*empty, *rollouts])
    assert classes == thinkedit.quantile_classes(rollouts)
    short = [r for r in (*empty, *rollouts) if classes(r) == "short"]
    assert len(short) >= 7 and all(len(THINK.of(r)) for r in short)
    with pytest.raises(thinkedit.ClassTooSmallError, match=r"^0 rollouts think .*70 thought and .* while 30 closed an empty one"):
        thinkedit.length_classes([*empty, *rollouts], short_below=20.0, long_above=60.0)
    with pytest.raises(thinkedit.ClassTooSmallError, match=r"None of the 30 .* while 30 closed an empty one"):
        thinkedit.quantile_classes(empty)


def test_a_class_too_small_is_an_error_with_counts_lengths_and_a_remedy(rollout_of):
    rollouts = [rollout_of(50 + i, name=str(i)) for i in range(20)] + [rollout_of(2000, name="l")]
    with pytest.raises(thinkedit.ClassTooSmallError) as caught:
        thinkedit.length_classes(rollouts)
    for part in ("20 rollouts", "1 more than 1000", "needs 8", "21", "60", "quantile_classes(share=)"):
        assert part in str(caught.value), part
    commands = typer.main.get_command(app).commands
    named = re.findall(r"toolkit (\w+)", str(caught.value).partition("--share of")[2])
    assert len(named) == 2 and all("--share" in [o for p in commands[name].params for o in p.opts] for name in named)


@pytest.mark.parametrize("share", [0.0, 0.6, -1.0])
def test_a_share_outside_its_range_is_refused(share, rollout_of):
    with pytest.raises(ValueError, match=rf"share={share}: need 0 < share <= 0\.5"):
        thinkedit.quantile_classes([rollout_of(3)], share=share)


def test_quantile_classes_take_the_ends(rollout_of):
    rollouts = [rollout_of(n, name=str(n)) for n in range(10, 60)]
    classes = thinkedit.quantile_classes(rollouts, share=0.2)
    labels = [classes(r) for r in rollouts]
    assert labels == ["short"] * 10 + [None] * 30 + ["long"] * 10


def test_quantile_classes_of_equal_lengths_are_refused(rollout_of):
    rollouts = [rollout_of(30, seed=i, name=str(i)) for i in range(40)]
    with pytest.raises(thinkedit.ClassTooSmallError, match=r"lengths: \[30\.0, 30\.0, 30\.0\]"):
        thinkedit.quantile_classes(rollouts)


def test_quantile_classes_never_put_a_length_into_both_ends(rollout_of):
    """Nearly all lengths equal: the ends cannot be told apart, whatever the share."""
    rollouts = [rollout_of(30 + (i > 20), seed=i, name=str(i)) for i in range(40)]
    classes = thinkedit.quantile_classes(rollouts, share=0.4)
    assert {r.think_tokens for r in rollouts if classes(r) == "short"} == {30}
    assert {r.think_tokens for r in rollouts if classes(r) == "long"} == {31}


def test_quantile_classes_without_a_closed_span_say_so(rollout_of):
    with pytest.raises(thinkedit.ClassTooSmallError, match="None of the 3 rollouts has a closed think span"):
        thinkedit.quantile_classes([rollout_of(9, closed=False, name=str(i)) for i in range(3)])


def test_overlapping_thresholds_are_refused(rollout_of):
    with pytest.raises(ValueError, match=r"short_below=50\.0 lies above long_above=20\.0"):
        thinkedit.length_classes([rollout_of(3)], short_below=50.0, long_above=20.0)


def test_half_given_thresholds_are_refused(mixed_rollouts):
    with pytest.raises(ValueError, match="Give both short_below and long_above, or neither"):
        jobs.EditSettings(short_below=10.0).classes(mixed_rollouts)
