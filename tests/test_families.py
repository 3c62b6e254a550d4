"""Every family that the README lists: what the toolkit relies on holds on a tiny random model of it; other families are refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
import zoo

from toolkit import attention, bridges, collect, edits, entropies, families, figures, hooks, masks, sites, store, vectors
from toolkit import lm as lms
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition, UnsupportedModelError
from toolkit.methods import retrieval_heads, thinkedit
from toolkit.needles import Example
from toolkit.sites import Site
from toolkit.types import Direction, HeadEdit, HeadScores, Moments, Plan, Problem, Rollout, Span

# One model type for each row of sites.ROWS and each structure: experts, latent attention, hybrid stacks, sizes per layer, gates, sinks.
STRUCTURES = (
    "qwen3_next", "qwen3_5_text", "gemma4_text", "lfm2", "granitemoehybrid", "bamba", "llama4_text", "deepseek_v2", "deepseek_v3", "gpt_oss",
    "glm4", "afmoe", "granitemoe", "granite", "phi", "exaone4", "olmo3", "bitnet",
)  # fmt: skip
SAMPLING = Sampling(n=2, max_new_tokens=16, details=True)
EVERYWHERE = collect.Positions("everywhere", lambda r: range(len(r.token_ids)))
PROBLEMS = [
    Problem(f"p{i}", ({"role": "user", "content": text},), "3") for i, text in enumerate(["1+1=?", "17+5-9+23=?", "2+2-1+30=?"])
]


@cache
def model(model_type: str) -> LM:
    return zoo.model_of_type(model_type)


@cache
def sampled(model_type: str) -> list[Rollout]:
    return rollouts(model(model_type), PROBLEMS, SAMPLING, progress=False)


def direction(lm: LM, kind: str = "resid_mid") -> Direction:
    vector = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(0))
    return Direction(vector, kind, "think", "random", 1, 1, lm.provenance())


@torch.no_grad()
def logits(lm: LM, r: Rollout, act=None) -> torch.Tensor:
    """Logits that predict the response, in one pass without a cache."""
    condition = Condition(lm, (act,) if act else ())
    with condition.active():
        return lm.model(input_ids=torch.tensor([r.token_ids]), use_cache=False).logits[0, r.prompt_len - 1 : -1].float()


def logprobs(lm: LM, r: Rollout, act=None) -> torch.Tensor:
    return logits(lm, r, act).log_softmax(-1).gather(1, torch.tensor(r.token_ids[r.prompt_len :])[:, None])[:, 0]


@pytest.mark.parametrize("model_type", families.SUPPORTED)
def test_a_family_of_the_table_qualifies_and_is_sampled_steered_and_padded_exactly(model_type):
    lm = model(model_type)
    lms.qualify(lm)
    act = edits.steering(direction(lm), 0.3)
    steered = rollouts(Condition(lm, (act,)), PROBLEMS, SAMPLING, progress=False)
    for r in sampled(model_type):  # a batch of unequal prompts, with a cache, against one pass
        assert torch.allclose(torch.tensor(r.logprobs), logprobs(lm, r), atol=2e-3)
    for r in steered:
        assert torch.allclose(torch.tensor(r.logprobs), logprobs(lm, r, act), atol=2e-3)
    assert any(a.logprobs != b.logprobs for a, b in zip(steered, sampled(model_type), strict=True))


@pytest.mark.parametrize("model_type", STRUCTURES)
def test_a_structure_qualifies_in_half_precision(model_type):
    lm = zoo.model_of_type(model_type)
    assert lms.qualify(replace(lm, model=lm.model.to(torch.bfloat16)))


def test_scales_of_blocks_that_later_gains_make_up_for_change_no_ranking():
    """Gemma 4: block 1's output times 4, and all that later blocks add times 4, which the final norm undoes."""
    lm, changed = (zoo.model_of_type("gemma4_text", hidden_size_per_layer_input=0) for _ in range(2))
    blocks = changed.layout.blocks
    with torch.no_grad():
        blocks[1].block.layer_scalar.mul_(4)
        for block in blocks[2:]:
            for norm in (block.post_attention_norm, block.post_mlp_norm):
                norm.weight.mul_(4)
    found = rollouts(lm, PROBLEMS, SAMPLING, progress=False)
    assert torch.allclose(logits(lm, found[0]), logits(changed, found[0]), atol=1e-3)
    ranked = []
    for each in (lm, changed):
        by = lambda r: thinkedit.LONG if r.problem_id == found[0].problem_id else thinkedit.SHORT  # noqa: E731
        moments = collect.moments(each, found, by, kinds=("resid_post", "z"), positions=EVERYWHERE)
        v = thinkedit.direction(moments, "resid_post")
        ranked.append((thinkedit.head_scores(moments, v, each).ranked(), thinkedit.contrast_scores(moments, v, each).ranked()))
    assert ranked[0] == ranked[1]


@pytest.mark.parametrize("model_type", STRUCTURES)
def test_rows_of_a_batch_are_those_of_single_prompts(model_type):
    alone = rollouts(model(model_type), PROBLEMS, replace(SAMPLING, batch_size=1), progress=False)
    assert [r.token_ids for r in alone] == [r.token_ids for r in sampled(model_type)]


@pytest.mark.parametrize("model_type", STRUCTURES)
def test_a_head_edit_in_the_weights_is_the_edit_at_run_time_and_survives_saving(model_type, tmp_path):
    lm, r = model(model_type), sampled(model_type)[0]
    heads = [(layer, head) for layer in lm.layout.attention_layers for head in (0, lm.layout.heads[layer] - 1)]
    plan = Plan(tuple(HeadEdit(*head, "project_out", 1.0) for head in heads), direction(lm), "plan", lm.provenance())
    edited = edits.apply(lm, plan)
    now, written, before = logits(lm, r, edits.RuntimeEdit(plan)), logits(edited, r), logits(lm, r)
    assert (now - written).abs().max() < 1e-4 * written.abs().max() and (written - before).abs().max() > 1e-4
    edited.save(tmp_path / "edited")
    back = lms.load(tmp_path / "edited", device="cpu")
    assert back.fingerprint == edited.fingerprint and torch.allclose(logits(back, r), written, atol=1e-5)


@pytest.mark.parametrize("model_type", STRUCTURES)
def test_scores_of_all_heads_sum_to_what_attention_writes_along_the_direction(model_type):
    """The bias of W_O aside, and times the factors with which the layer's output reaches the stream."""
    lm, found = model(model_type), sampled(model_type)
    v = direction(lm)
    moments = collect.moments(lm, found, lambda r: thinkedit.SHORT, kinds=("resid_pre", "resid_mid", "z"), positions=EVERYWHERE)
    scores = thinkedit.head_scores(moments, v, lm)
    added = moments.mean("resid_mid", thinkedit.SHORT) - moments.mean("resid_pre", thinkedit.SHORT)
    for layer in range(lm.layout.n_layers):
        if layer not in lm.layout.attention_layers:
            assert scores.score[layer].isnan().all()
            continue
        if lm.layout.b_O(layer) is None:
            expected = -(added[layer] @ v.unit()[layer].double()) * lm.layout.to_end(layer) / lm.layout.factor
            assert scores.score[layer].nansum().item() == pytest.approx(expected.item(), abs=1e-3)
    assert {head for head in scores.ranked()} == {*lm.layout.all_heads}


@pytest.mark.parametrize("model_type", STRUCTURES)
def test_entropies_read_in_chunks_are_those_recorded_while_sampling(model_type):
    lm, found = model(model_type), sampled(model_type)
    bare = [replace(r, entropies=None, logprobs=None) for r in found]
    for r, measured in zip(found, entropies.with_entropies(lm, bare, chunk=5 * 103 * len(found)), strict=True):
        assert measured.entropies == pytest.approx(r.entropies, abs=2e-3)


@pytest.mark.parametrize("model_type", STRUCTURES)
def test_masking_heads_at_run_time_is_silencing_them_in_the_weights(model_type):
    lm, r = model(model_type), sampled(model_type)[1]
    layer = lm.layout.attention_layers[-1]
    plan = Plan((HeadEdit(layer, 1, "scale", 1.0),), None, "plan", lm.provenance())
    masked, silenced = logits(lm, r, masks.masking(plan, "zero", during="all")), logits(edits.apply(lm, plan), r)
    assert torch.allclose(masked, silenced, atol=1e-3) and (masked - logits(lm, r)).abs().max() > 1e-5
    spread = logits(lm, r, masks.masking(plan, "uniform", during="all"))
    assert (spread - logits(lm, r)).abs().max() > 1e-6


@pytest.mark.parametrize("model_type", STRUCTURES)
def test_the_write_score_adds_up_to_what_a_head_writes_if_the_needle_is_all_it_can_read(model_type):
    """With a needle of one token and all of a head's attention on it, the score is the head's contribution: a gate included."""
    lm, r = model(model_type), sampled(model_type)[0]
    seen = {}

    def take(rows: attention.Rows) -> None:
        n, size = lm.layout.heads[rows.layer], lm.layout.head_dims[rows.layer]
        keys = rows.weights.shape[-1]
        read = sum(
            rows.value_at(torch.full((1, n, rows.queries.shape[1]), key)) * rows.weights[..., key, None] for key in range(keys)
        )  # [1, heads, queries, head_dim]
        seen[rows.layer] = (read * rows.gate.transpose(1, 2)).transpose(1, 2).reshape(rows.queries.shape[1], n * size)

    last = Span(len(r.token_ids) - 1, len(r.token_ids))
    attention.read(lm, [r.token_ids], [last], take)
    wanted = [Site("z", layer) for layer in lm.layout.attention_layers]
    with torch.no_grad(), hooks.record(lm.layout, wanted) as z:
        lm.model(input_ids=torch.tensor([r.token_ids]), use_cache=False)
    for site in wanted:
        if (
            lm.model.config.model_type not in ("bitnet",) and len(r.token_ids) < 16
        ):  # windows of 16 tokens: older keys are not cached
            assert torch.allclose(seen[site.layer][0], z[site][0, -1], atol=1e-3), site


@pytest.mark.parametrize("model_type", ["qwen3_next", "gemma4_text", "lfm2"])
def test_retrieval_scores_of_a_layer_without_heads_are_missing(model_type):
    lm, r = model(model_type), sampled(model_type)[0]
    example = Example(r, Span(1, 3), query=Span(3, 5))
    scores = retrieval_heads.scores(retrieval_heads.measure(lm, [example]), "write")
    assert [*scores.score.isnan().all(dim=1).numpy().nonzero()[0]] == [i for i in range(4) if i not in lm.layout.attention_layers]
    assert len(retrieval_heads.mask_plan(scores, len(lm.layout.all_heads)).heads) == len(lm.layout.all_heads)


def test_only_the_listed_hybrids_have_layers_without_heads():
    assert {t for t in families.SUPPORTED if 0 in model(t).layout.heads} == families.HYBRID - families.MULTIMODAL.keys()


def test_a_site_of_a_layer_without_heads_is_refused_with_the_layers_that_have_some():
    lm = model("qwen3_next")
    with pytest.raises(IndexError, match=r"layer 0 has no attention heads \(it is Qwen3NextGatedDeltaNet\); layers 1, 3 have"):
        lm.layout.head(0, 0)
    with pytest.raises(IndexError, match="no attention heads"):
        edits.apply(lm, Plan((HeadEdit(2, 0, "scale", 1.0),), None, "plan", lm.provenance()))


REFUSED = (
    "falcon_h1",
    "nemotron_h",
    "mamba",
    "jamba",
    "gemma3n_text",
    "diffllama",
    "minicpm3",
    "kimi_linear",
    "opt",
    "bloom",
    "moshi",
    "zaya",
)


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_family_that_does_not_hold_is_refused_by_name_in_one_sentence(model_type):
    with pytest.raises(UnsupportedModelError, match=rf"(?i){model_type.replace('_', '.?').removesuffix('.?text')}") as caught:
        lms.qualify(zoo.model_of_type(model_type))
    assert len(str(caught.value)) <= sites.LONGEST and "\n" not in str(caught.value)


def test_moments_of_layers_with_other_head_sizes_are_padded_with_zeros():
    lm = model("gemma4_text")
    moments: Moments = collect.moments(lm, sampled("gemma4_text"), lambda r: "all", kinds=("z",))
    assert lm.layout.head_dims == (8, 8, 8, 16) or len({*lm.layout.head_dims}) == 2
    narrow = lm.layout.heads[0] * lm.layout.head_dims[0]
    assert (moments.sums["z"][:, 0, narrow:] == 0).all() and (moments.sums["z"][:, 0, :narrow] != 0).any()


def test_scores_of_a_model_with_layers_without_heads_are_saved_and_read_and_a_real_nan_is_still_refused(tmp_path):
    lm = model("qwen3_next")
    moments = collect.moments(lm, sampled("qwen3_next"), lambda r: thinkedit.SHORT, kinds=("resid_mid", "z"), positions=EVERYWHERE)
    scores = thinkedit.head_scores(moments, direction(lm), lm)
    back = store.load(store.save(scores, tmp_path / "scores.safetensors"), HeadScores)
    assert torch.equal(back.score.nan_to_num(7), scores.score.nan_to_num(7))
    assert back.ranked() == scores.ranked() and back.absent == lm.layout.absent
    broken = replace(scores, score=scores.score.index_fill(1, torch.tensor([1]), torch.nan))
    with pytest.raises(ValueError, match="hold NaN"):
        edits.plan(broken, direction(lm))
    with pytest.raises(ValueError, match="NaN or infinity"):
        store.save(broken, tmp_path / "broken.safetensors")


def test_copy_scores_of_layers_without_heads_survive_the_published_format():
    copy = torch.tensor([[[0.5, 0.0], [torch.nan, torch.nan]], [[1.0, 0.0], [torch.nan, torch.nan]]], dtype=torch.float64)
    lists = retrieval_heads.to_lists(copy)
    assert lists["1-0"] == [] and torch.equal(retrieval_heads.from_lists(lists).isnan(), copy.isnan())
    assert retrieval_heads.statistics(copy)["share_zero"] == 0.5
    with pytest.raises(ValueError, match="count=3 of 2 heads"):
        retrieval_heads.stability(copy, 1, 3)


def test_the_nnsight_place_of_a_layer_without_heads_is_the_module_in_attentions_place():
    lm = model("qwen3_next")
    assert bridges.nnsight_path(lm, Site("attn_out", 0)).module.endswith("layers.0.linear_attn")


def test_a_bias_that_steers_is_divided_by_the_factor_on_the_stream():
    lm = zoo.model_of_type("granite", attention_bias=True, mlp_bias=True)
    r = rollouts(lm, PROBLEMS, SAMPLING, progress=False)[0]
    for kind in ("resid_mid", "resid_post", "attn_out"):
        v = direction(lm, kind)
        baked = vectors.bake(lm, v, 0.3)
        assert torch.allclose(logits(baked, r), logits(lm, r, edits.steering(v, 0.3)), atol=1e-3), kind


def test_sums_are_added_once_if_memory_runs_out_before_they_are_added(monkeypatch):
    lm, found = zoo.model_of_type("olmo2"), sampled("olmo2")
    by = lambda r: "all"  # noqa: E731
    whole = collect.moments(lm, found, by, kinds=("resid_mid",), second=("resid_mid",), positions=EVERYWHERE)
    real, failed = torch.Tensor.to, []

    def hungry(value, *args, **kwargs):
        if value.ndim == 4 and value.shape[-1] == value.shape[-2] == 32 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("full")
        return real(value, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", hungry)
    halved = collect.moments(lm, found, by, kinds=("resid_mid",), second=("resid_mid",), positions=EVERYWHERE)
    assert failed and torch.allclose(halved.sums["resid_mid"], whole.sums["resid_mid"], atol=1e-4) and halved.n == whole.n


@pytest.mark.parametrize(
    ("without", "expected"),
    [((), ""), ((1,), "layer 1 has none"), ((0, 2), "layers 0, 2 have none"), ((0, 1, 2, 4), "layers 0-2, 4 have none")],
)
def test_plan_and_figure_say_which_layers_have_no_heads(without, expected):
    absent = tuple(
        (layer, head) for layer in (*without, 3) for head in range(2) if layer in without or head == 1
    )  # layer 3 has one head
    scores = HeadScores(torch.rand(6, 2), "short_thinking", "nats", model("lfm2").provenance(), absent)
    assert scores.headless == expected
    v = Direction(torch.ones(6, 8), "resid_mid", "think", "random", 1, 1, scores.provenance)
    plan = edits.plan(scores, v, count=1)
    title = figures.head_scores(scores, plan).layout.title.text
    for text in (plan.name, title):
        assert (expected in text) if expected else ("none" not in text)


def test_the_plan_of_a_hybrid_model_names_the_layers_that_it_cannot_edit():
    lm = model("lfm2")
    scores = HeadScores(
        torch.rand(lm.layout.n_layers, lm.layout.n_heads), "short_thinking", "nats", lm.provenance(), lm.layout.absent
    )
    assert edits.plan(scores, direction(lm), count=2).name == "top 2 of 8 heads (layers 0, 2 have none), random"
