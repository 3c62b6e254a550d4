"""Neighbours: our hooks, TransformerLens and nnsight hold the same weights, read the same numbers and write the same change."""

from __future__ import annotations

import copy
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import cache

import pytest
import torch
from families import COMMON, FAMILIES, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from toolkit import bridges, collect, edits, hooks, origins, sites
from toolkit import lm as lms
from toolkit.bridges import NeighbourError, Place
from toolkit.lm import LM
from toolkit.sites import KINDS, Site
from toolkit.types import Direction, HeadEdit, Plan

ASKED = ("tiny-reasoner", "llama", "qwen2", "qwen3", "gpt2")
ALL = ("tiny-reasoner", *FAMILIES)
POST_NORM = ("gemma2", "gemma3", "olmo2")
LAYER = 1


@pytest.fixture(scope="module")
def lens(model_of):
    """``lens(family)``: a TransformerLens bridge of each model, made once."""
    return cache(lambda name: bridges.to_transformer_lens(model_of(name)))


@pytest.fixture(scope="module")
def sight(model_of):
    """``sight(family)``: an nnsight model of each model, made once."""
    return cache(lambda name: bridges.to_nnsight(model_of(name)))


def everything(lm: LM) -> list[Site]:
    return [Site(kind, layer) for kind in KINDS for layer in range(lm.layout.n_layers)]


@torch.no_grad()
def logits(lm: LM, ids: Tensor) -> Tensor:
    return lm.model(input_ids=ids).logits


@torch.no_grad()
def nnsight_logits(model, ids: Tensor) -> Tensor:
    with model.trace(ids):
        found = model.output.logits.save()
    return found


@torch.no_grad()
def recorded(lm: LM, ids: Tensor) -> dict[Site, Tensor]:
    with hooks.record(lm.layout, everything(lm)) as values:
        lm.model(input_ids=ids)
    return values


@torch.no_grad()
def saved(lm: LM, model, ids: Tensor, wanted=None) -> dict[Site, Tensor]:
    wanted = everything(lm) if wanted is None else wanted
    with model.trace(ids):
        values = bridges.from_nnsight(lm, model, wanted)
    return values


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal up to ``tolerance`` times the largest entry (the random models' activations are far from 1)."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item()))


def vector(lm: LM, seed: int = 0) -> Tensor:
    return torch.randn(lm.layout.d_model, generator=torch.Generator().manual_seed(seed))


def added(lm: LM, site: Site, v: Tensor):
    return hooks.rewrite(lm.layout, {site: lambda value, inputs: value + v})


def traces(lm: LM) -> dict:
    """What a neighbour could leave behind on a model."""
    return {
        name: (type(m), frozenset(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks), m.training)
        for name, m in lm.model.named_modules()
    }


# --- the same weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ASKED)
def test_both_hold_the_very_same_weights_in_memory(name, model_of, lens, sight):
    lm = model_of(name)
    ours = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}
    for model in (lens(name).original_model, sight(name)._module):
        # GPT-2's fused query-key-value weights are split into views, so it is storages that are compared.
        theirs = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert theirs == ours


def test_in_gpt_neox_transformer_lens_copies_the_fused_weights_and_nothing_else(model_of, lens):
    ours = {p.untyped_storage().data_ptr() for p in model_of("gpt_neox").model.parameters()}
    copies = [n for n, p in lens("gpt_neox").named_parameters() if p.untyped_storage().data_ptr() not in ours]
    assert copies
    assert all(".attention." in n and any(f".{part}." in n for part in "qkv") for n in copies)


@pytest.mark.parametrize("name", ALL)
def test_both_compute_the_same_logits(name, model_of, lens, sight, ids):
    expected = logits(model_of(name), ids)
    with torch.no_grad():
        assert close(lens(name)(ids), expected)
    assert torch.equal(nnsight_logits(sight(name), ids), expected)


def test_the_lm_is_left_exactly_as_it_was(model_of, ids):
    lm = lms.wrap(AutoModelForCausalLM.from_config(LlamaConfig(**COMMON)), tokenizer(), name="fresh")
    before, config, padding, expected = traces(lm), lm.model.config.to_dict(), lm.tokenizer.padding_side, logits(lm, ids)
    bos, attention = lm.tokenizer.bos_token, lm.model.config._attn_implementation
    bridges.to_transformer_lens(lm)
    nnsight_logits(bridges.to_nnsight(lm), ids)
    assert traces(lm) == before
    assert (lm.model.config.to_dict(), lm.model.config._attn_implementation) == (config, attention)
    assert (lm.tokenizer.padding_side, lm.tokenizer.bos_token) == (padding, bos)
    assert torch.equal(logits(lm, ids), expected)


def test_no_call_of_ours_installs_anything(llama, tmp_path, monkeypatch):
    """TransformerLens runs pip for a multimodal model's processor. Whatever starts a process fails here."""
    import subprocess

    from test_adapters import multimodal

    lm = lms.load(multimodal(tmp_path / "model"), device="cpu", tags=lms.ThinkTags(None, None))

    def forbidden(*args, **kwargs):
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    for name in ("run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, forbidden)
    with pytest.raises(NeighbourError, match=r"is multimodal.*Use to_nnsight"):
        bridges.to_transformer_lens(lm)
    assert bridges.to_nnsight(lm) is not None
    assert bridges.to_transformer_lens(llama) is not None


def test_text_means_the_same_tokens_there(tiny, lens, sight):
    """TransformerLens would put a BOS in front, here even an end token for want of one."""
    wanted = tiny.tokenizer("1+2=")["input_ids"]
    assert lens("tiny-reasoner").to_tokens("1+2=").tolist() == [wanted]
    assert sight("tiny-reasoner").tokenizer("1+2=")["input_ids"] == wanted


def test_a_tokenizer_with_a_bos_is_taken_as_it_is_and_not_loaded_again(llama):
    own = copy.deepcopy(llama.tokenizer)
    own.bos_token, own.chat_template = "<|end|>", "mine"
    own.init_kwargs["name_or_path"] = "/nowhere"
    bridge = bridges.to_transformer_lens(replace(llama, tokenizer=own))
    assert bridge.tokenizer.chat_template == "mine"
    assert bridge.to_tokens("1+2=").tolist() == [own("1+2=")["input_ids"]]


def test_half_precision_models_are_taken_too(model_of, ids):
    lm = model_of("qwen3", torch.bfloat16)
    bridge = bridges.to_transformer_lens(lm)
    with torch.no_grad():
        assert bridge(ids).dtype == torch.bfloat16
        assert close(bridge(ids).float(), logits(lm, ids).float(), 5e-2)
    assert torch.equal(nnsight_logits(bridges.to_nnsight(lm), ids), logits(lm, ids))


# --- the same numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_all_three_read_the_same_numbers_at_every_site(name, model_of, lens, sight, ids):
    lm = model_of(name)
    ours = recorded(lm, ids)
    with torch.no_grad():
        kept = lens(name).run_with_cache(ids)[1]
    theirs = {"TransformerLens": bridges.from_transformer_lens(lm, kept), "nnsight": saved(lm, sight(name), ids)}
    for neighbour, values in theirs.items():
        assert values.keys() == ours.keys(), neighbour
        for site in ours:
            assert close(values[site], ours[site]), (neighbour, site)


def test_heads_are_an_axis_of_their_own_in_transformer_lens(model_of, lens, ids):
    lm = model_of("qwen3")
    z = lens("qwen3").run_with_cache(ids)[1]["blocks.1.attn.hook_z"]
    assert z.shape == (*ids.shape, lm.layout.n_heads, lm.layout.head_dim)
    ours = recorded(lm, ids)[Site("z", 1)]
    assert close(z[:, :, 2].detach(), ours[..., lm.layout.head(1, 2)])


def test_one_site_can_be_read_alone(model_of, lens, sight, ids):
    lm, site = model_of("llama"), Site("resid_mid", 2)
    ours = recorded(lm, ids)[site]
    assert close(saved(lm, sight("llama"), ids, [site])[site], ours)
    _, kept = lens("llama").run_with_cache(ids, names_filter=bridges.transformer_lens_name(lm, site))
    found = bridges.from_transformer_lens(lm, kept)
    assert set(found) == {site}
    assert close(found[site].detach(), ours)


# --- the same change -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "z"])
@pytest.mark.parametrize("name", ALL)
def test_a_vector_added_in_each_gives_the_same_logits(name, kind, model_of, lens, sight, ids):
    lm, site = model_of(name), Site(kind, LAYER)
    v, bridge, model = vector(lm), lens(name), sight(name)
    with added(lm, site, v):
        expected = logits(lm, ids)
    assert not close(expected, logits(lm, ids), 1e-2)
    with torch.no_grad():
        hook = bridges.transformer_lens_name(lm, site, write=True)
        assert close(bridge.run_with_hooks(ids, fwd_hooks=[(hook, lambda value, hook: value + v)]), expected)
        place = bridges.nnsight_path(lm, site)
        with model.trace(ids):
            envoy = model.get(place.module)
            if place.side == "input":
                envoy.input = envoy.input + v
            elif isinstance(envoy.output, tuple):
                envoy.output = (envoy.output[0] + v, *envoy.output[1:])
            else:
                envoy.output = envoy.output + v
            found = model.output.logits.save()
    assert close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_our_interventions_act_there(name, kind, model_of, lens, sight, ids):
    lm, site = model_of(name), Site(kind, LAYER)
    v = vector(lm) if kind != "z" else torch.randn(lm.layout.width("z"), generator=torch.Generator().manual_seed(1))
    base = logits(lm, ids)
    with torch.no_grad():
        with added(lm, site, v):
            expected, seen = logits(lm, ids), lens(name)(ids)
            traced = nnsight_logits(sight(name), ids)
        assert not close(expected, base, 1e-2)
        assert close(seen, expected)
        assert torch.equal(traced, expected)
        # Nothing stays behind in either.
        assert close(lens(name)(ids), base)
    assert torch.equal(nnsight_logits(sight(name), ids), base)


@pytest.mark.parametrize("name", ["tiny-reasoner", "gpt2"])
def test_steering_acts_there_in_its_phase_too(name, model_of, lens, sight, rollout_of):
    lm = model_of(name)
    ids = torch.tensor([rollout_of(9).token_ids])
    generator = torch.Generator().manual_seed(2)
    numbers = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=generator)
    direction = Direction(numbers, "resid_post", "think", "random", 1, 1, lm.provenance())
    for during in ("all", "think"):
        with edits.steering(direction, 0.5, during=during)(lm), torch.no_grad():
            expected, seen = logits(lm, ids), lens(name)(ids)
            traced = nnsight_logits(sight(name), ids)
        assert not close(expected, logits(lm, ids), 1e-3)
        assert close(seen, expected)
        assert torch.equal(traced, expected)


@pytest.mark.parametrize("name", ["tiny-reasoner", "llama"])
def test_cached_decoding_there_is_steered_in_its_phase(name, model_of, lens, sight, token):
    """Prompt and think tokens pass one at a time, each steered by its own phase, in all three."""
    lm = model_of(name)
    numbers = 3 * torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(2))
    direction = Direction(numbers, "resid_post", "think", "random", 1, 1, lm.provenance())
    ids = torch.tensor([[20, 21, 22, token("<think>")]])
    how = {"do_sample": False, "max_new_tokens": 8}
    with edits.steering(direction, 1.0, during="think")(lm), torch.no_grad():
        expected = lm.model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=-1, **how)
        seen = lens(name).generate(ids, stop_at_eos=False, verbose=False, **how)
        with sight(name).generate(ids, eos_token_id=-1, **how) as tracer:
            traced = tracer.result.save()
    assert torch.equal(seen, expected)
    assert torch.equal(traced, expected)
    if name == "llama":
        plain = lm.model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=-1, **how)
        assert not torch.equal(plain, expected)


def test_an_edited_model_is_its_own_neighbour(tiny, ids):
    plan = Plan((HeadEdit(1, 0, "scale", 1.0), HeadEdit(0, 1, "scale", 0.5)), None, "two heads", tiny.provenance())
    edited = edits.apply(tiny, plan)
    expected = logits(edited, ids)
    assert not close(expected, logits(tiny, ids), 1e-3)
    bridge = bridges.to_transformer_lens(edited)
    with torch.no_grad():
        assert close(bridge(ids), expected)
    assert torch.equal(nnsight_logits(bridges.to_nnsight(edited), ids), expected)
    pointer = edited.layout.blocks[1].out.weight.data_ptr()
    assert bridge.blocks[1].attn.o.original_component.weight.data_ptr() == pointer


# --- limits, shown ---------------------------------------------------------------------------------------------


def test_a_write_at_hook_resid_mid_reaches_the_mlp_only(model_of, lens, ids):
    """Why ``write=True`` gives another name: the residual stream itself passes that hook by."""
    lm, site = model_of("llama"), Site("resid_mid", LAYER)
    v = vector(lm)
    with added(lm, site, v):
        expected = logits(lm, ids)
    hook = (bridges.transformer_lens_name(lm, site), lambda value, hook: value + v)
    with torch.no_grad():
        assert not close(lens("llama").run_with_hooks(ids, fwd_hooks=[hook]), expected, 1e-2)


# At these sites a neighbour's own hook comes before ours, at the others after.
SHOWN_BEFORE_THE_WRITE = {
    "TransformerLens": {"resid_pre", "z", "mlp_out"},
    "nnsight": {"attn_out", "resid_mid", "mlp_out", "resid_post"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_what_a_neighbour_shows_at_a_site_that_we_write_to(name, kind, model_of, lens, sight, ids):
    lm, at = model_of(name), Site(kind, LAYER)
    base, after = recorded(lm, ids), Site("resid_pre", LAYER + 1)
    change = torch.randn(lm.layout.width(kind), generator=torch.Generator().manual_seed(3))
    with added(lm, at, change), torch.no_grad():
        expected = recorded(lm, ids)
        shown = {
            "TransformerLens": bridges.from_transformer_lens(lm, lens(name).run_with_cache(ids)[1]),
            "nnsight": saved(lm, sight(name), ids),
        }
    for neighbour, values in shown.items():
        before = kind in SHOWN_BEFORE_THE_WRITE[neighbour]
        assert close(values[at], base[at] if before else base[at] + change), neighbour
        assert close(values[after], expected[after]), neighbour


def test_with_use_attn_result_the_output_projection_is_not_called(model_of, ids):
    lm, site = model_of("llama"), Site("attn_out", LAYER)
    bridge = bridges.to_transformer_lens(lm)
    bridge.set_use_attn_result(True)
    base = logits(lm, ids)
    with added(lm, site, vector(lm)), torch.no_grad():
        assert close(bridge(ids), base)


def test_a_model_that_transformer_lens_does_not_know_is_a_named_error():
    class UnheardConfig(LlamaConfig):
        model_type = "unheard"

    class Unheard(LlamaForCausalLM):
        config_class = UnheardConfig

    unheard = lms.wrap(Unheard(UnheardConfig(**COMMON)), tokenizer(), name="unheard")
    with pytest.raises(NeighbourError, match=r"cannot take Unheard: .*architecture.*to_nnsight"):
        bridges.to_transformer_lens(unheard)


def test_a_model_that_transformer_lens_computes_otherwise_is_a_named_error(model_of, monkeypatch):
    """Attention scaled in a way that the reimplementation cannot know."""
    lm = model_of("llama")
    attention = lm.layout.blocks[0].attention
    forward = type(attention).forward

    def doubled(self, *args, **kwargs):
        out, weights = forward(self, *args, **kwargs)
        return 2 * out, weights

    monkeypatch.setattr(type(attention), "forward", doubled)
    with pytest.raises(NeighbourError, match=r"it computed Site\(kind='resid_mid', layer=0\) 1 times.*relative deviation"):
        bridges.to_transformer_lens(lm)


@pytest.mark.parametrize(("make", "module"), [("to_transformer_lens", "transformer_lens"), ("to_nnsight", "nnsight")])
def test_without_the_extra_the_error_says_what_to_install(make, module, model_of, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'reasoning-length-toolkit\[lens\]'"):
        getattr(bridges, make)(model_of("llama"))


def test_importing_the_room_imports_neither_neighbour():
    code = "import sys, toolkit.bridges; assert not {'transformer_lens', 'nnsight'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_names_go_both_ways_at_every_site(name, model_of, lens):
    lm, known = model_of(name), lens(name).hook_dict
    for site in everything(lm):
        assert bridges.site_of_nnsight(lm, bridges.nnsight_path(lm, site)) == site
        if (name, site.kind) != ("gpt_neox", "resid_mid"):
            there = bridges.transformer_lens_name(lm, site)
            assert there in known
            assert bridges.site_of_transformer_lens(lm, there) == site
        assert bridges.transformer_lens_name(lm, site, write=True) in known


def test_names_are_the_usual_ones(model_of):
    lm = model_of("llama")
    usual = ["hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"]
    assert [bridges.transformer_lens_name(lm, Site(kind, 2)) for kind in KINDS] == [f"blocks.2.{name}" for name in usual]
    block = "model.layers.2"
    assert [bridges.nnsight_path(lm, Site(kind, 2)) for kind in KINDS] == [
        Place(block, "input"),
        Place(f"{block}.self_attn.o_proj", "input"),
        Place(f"{block}.self_attn.o_proj", "output"),
        Place(f"{block}.self_attn", "output", plus=block),
        Place(f"{block}.mlp", "output"),
        Place(block, "output"),
    ]


@pytest.mark.parametrize("name", POST_NORM)
def test_in_post_norm_families_the_usual_name_is_refused_because_it_is_another_tensor(name, model_of, lens, ids):
    lm = model_of(name)
    kept = lens(name).run_with_cache(ids)[1]
    ours = recorded(lm, ids)
    for part in ("attn", "mlp"):
        assert not close(kept[f"blocks.1.hook_{part}_out"].detach(), ours[Site(f"{part}_out", 1)], 1e-2)
        assert bridges.transformer_lens_name(lm, Site(f"{part}_out", 1)) == f"blocks.1.{part}.hook_out"
        with pytest.raises(NeighbourError, match=rf"after the post-norm.*blocks\.1\.{part}\.hook_out"):
            bridges.site_of_transformer_lens(lm, f"blocks.1.hook_{part}_out")


def test_parallel_blocks_have_no_resid_mid_there(model_of, lens):
    lm = model_of("gpt_neox")
    assert "blocks.0.hook_resid_mid" not in lens("gpt_neox").hook_dict
    with pytest.raises(NeighbourError, match=r"run in parallel.*hook_resid_pre and hook_attn_out"):
        bridges.transformer_lens_name(lm, Site("resid_mid", 0))
    with pytest.raises(NeighbourError, match="not a site"):
        bridges.site_of_transformer_lens(lm, "blocks.0.hook_resid_mid")


@pytest.mark.parametrize("name", ["blocks.0.attn.hook_pattern", "hook_embed", "blocks.x.hook_resid_post", ""])
def test_a_hook_that_is_no_site_is_a_named_error(name, model_of):
    with pytest.raises(NeighbourError, match=r"not a site.*hook_resid_post"):
        bridges.site_of_transformer_lens(model_of("llama"), name)


def test_a_layer_that_does_not_exist_is_an_index_error(model_of):
    lm, beyond = model_of("llama"), Site("resid_post", 3)
    with pytest.raises(IndexError, match=r"layers 0\.\.2"):
        bridges.transformer_lens_name(lm, beyond)
    with pytest.raises(IndexError, match=r"layers 0\.\.2"):
        bridges.site_of_transformer_lens(lm, "blocks.3.hook_resid_post")
    with pytest.raises(IndexError, match=r"layers 0\.\.2"):
        bridges.nnsight_path(lm, beyond)


def test_the_output_of_attention_alone_is_no_site(model_of):
    with pytest.raises(NeighbourError, match=r"not a site of tiny llama.*plus='model\.layers\.0'"):
        bridges.site_of_nnsight(model_of("llama"), Place("model.layers.0.self_attn", "output"))


# --- moments -------------------------------------------------------------------------------------------------


def captured(lm: LM, rollouts, by, capture):
    """``(rollout, class, activations)``, one rollout at a time."""
    for rollout in rollouts:
        if (label := by(rollout)) is not None:
            yield rollout, label, capture(torch.tensor([rollout.token_ids]))


@pytest.mark.parametrize("name", ["tiny-reasoner", "qwen3", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("neighbour", ["TransformerLens", "nnsight"])
def test_moments_from_a_neighbour_equal_ours(name, neighbour, model_of, lens, sight, mixed_rollouts, by_length):
    lm = model_of(name)

    def cached(ids: Tensor) -> dict[Site, Tensor]:
        with torch.no_grad():
            return bridges.from_transformer_lens(lm, lens(name).run_with_cache(ids)[1])

    capture = cached if neighbour == "TransformerLens" else lambda ids: saved(lm, sight(name), ids)
    theirs = bridges.moments(lm, captured(lm, mixed_rollouts, by_length, capture), collect.THINK.of, name="think")
    ours = collect.moments(lm, mixed_rollouts, by_length, kinds=KINDS)
    assert (theirs.labels, theirs.n, theirs.positions) == (ours.labels, ours.n, "think")
    read = origins.record(r.problem_id for r in mixed_rollouts if by_length(r))
    assert replace(theirs.provenance, notes={}) == replace(ours.provenance, notes={}) and theirs.provenance.notes == read
    assert theirs.sums.keys() == ours.sums.keys()
    for kind in KINDS:
        for label in ours.labels:
            assert close(theirs.mean(kind, label), ours.mean(kind, label)), (kind, label)
    merged = ours + theirs
    assert merged.n == tuple(2 * n for n in ours.n)


def test_moments_keep_one_example_at_a_time(llama, mixed_rollouts, by_length):
    """The next example is asked for only when nothing of the last is held."""
    alive: list[weakref.ref] = []

    def examples():
        for rollout in mixed_rollouts[:8]:
            assert sum(ref() is not None for ref in alive) <= 1
            value = torch.zeros(len(rollout.token_ids), llama.layout.d_model)
            alive.append(weakref.ref(value))
            yield rollout, "all", {Site("resid_post", layer): value for layer in range(3)}
            del value

    assert bridges.moments(llama, examples(), collect.THINK.of, name="think").sums["resid_post"].dtype == torch.float64


def test_activations_that_do_not_fit_are_named_errors(llama, rollout_of):
    rollout = rollout_of(6, name="p7")
    n, width = len(rollout.token_ids), llama.layout.d_model
    good = {Site("resid_post", layer): torch.zeros(1, n, width) for layer in range(3)}

    def run(*values):
        return bridges.moments(llama, [(rollout, "all", v) for v in values], collect.THINK.of, name="think")

    assert run(good).n == (1,)
    with pytest.raises(NeighbourError, match=r"p7: .*layer=2\) is missing"):
        run({site: value for site, value in good.items() if site.layer < 2})
    with pytest.raises(NeighbourError, match=rf"is \(1, {n + 1}, {width}\).*need \({n}, {width}\).*BOS"):
        run({site: torch.zeros(1, n + 1, width) for site in good})
    with pytest.raises(NeighbourError, match="is \\(2, "):
        run({site: torch.zeros(2, n, width) for site in good})
    with pytest.raises(NeighbourError, match="record the same for all"):
        run(good, {**good, **{replace(site, kind="mlp_out"): value for site, value in good.items()}})
    with pytest.raises(lms.NoThinkTagsError, match="positions 'think'"):
        run()
    with pytest.raises(NeighbourError, match=r"blocks\.0\.hook_resid_post"):
        bridges.from_transformer_lens(llama, {"hook_embed": torch.zeros(1)})


def test_a_bridge_that_ran_leaves_no_hook_and_every_hidden_state_once(tiny, ids):
    pytest.importorskip("transformer_lens")
    lm = replace(tiny, model=copy.deepcopy(tiny.model))
    lm = replace(lm, layout=sites.find(lm.model))
    before = traces(lm)
    found = bridges.detect_heads(lm, [[10, 11, 12, 10, 11, 12]])
    assert traces(lm) == before
    assert all(scores.score.max() > 0 for scores in found.values())
    states = lm.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(states) == lm.layout.n_layers + 1
