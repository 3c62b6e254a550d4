"""Weights that are tied, shared, offloaded or quantised: what is read and hashed, and that everything but weight edits works on them."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
import zoo
from families import FAMILIES
from families import family as tiny

from toolkit import collect, edits, jobs, merging, passes, tensors, vectors
from toolkit import lm as lms
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition, UnsupportedModelError
from toolkit.positions import THINK
from toolkit.types import Direction, HeadEdit, Plan, Problem

PROBLEMS = [Problem(f"p{i}", ({"role": "user", "content": text},), "3") for i, text in enumerate(["1+1=?", "17+5-9+23=?"])]
SAMPLING = Sampling(n=2, max_new_tokens=12, details=True)


@pytest.fixture(scope="module", params=["qwen3", "gemma3", "gpt2"])
def plain(request, tmp_path_factory) -> LM:
    """A model of a family, read from a directory."""
    return lms.load(tiny(request.param).save(tmp_path_factory.mktemp("model") / request.param))


def offloaded(lm: LM) -> LM:
    """The same model with one block on the disk and one on the CPU, both empty (meta) until they run."""
    names = {
        name: "cpu"
        for name, _ in lm.model.named_modules()
        if name and name.count(".") < 2 and "layers" not in name and ".h" not in name
    }
    blocks = {id(block.block): layer for layer, block in enumerate(lm.layout.blocks)}
    of_blocks = {name: "disk" if blocks[id(m)] == 1 else "cpu" for name, m in lm.model.named_modules() if id(m) in blocks}
    parents = {name.rpartition(".")[0] for name in (*names, *of_blocks)}
    return lms.load(lm.name, device_map={k: v for k, v in (names | of_blocks).items() if k not in parents})


def direction(lm: LM) -> Direction:
    vector = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(0))
    return Direction(vector, "resid_mid", "think", "random", 1, 1, lm.provenance())


def plan(lm: LM) -> Plan:
    heads = (HeadEdit(1, 0, "project_out", 1.0), HeadEdit(2, 3, "project_out", 0.5))
    return Plan(heads, direction(lm), "two heads", lm.provenance())


def logprobs(condition: Condition | LM) -> list[list[float]]:
    return [r.logprobs for r in rollouts(condition, PROBLEMS, SAMPLING, progress=False)]


# --- hashes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_saved_tensor_has_the_digest_of_its_shape_type_and_bytes(family):
    model = tiny(family).model
    expected = {
        name: hashlib.sha256(f"{tuple(v.shape)}{tuple(v.shape)}{v.dtype}".encode() + v.numpy().tobytes()).hexdigest()
        for name, v in model.state_dict().items()
    }
    assert tensors.digests(model, {}) == expected


def test_tied_weights_are_hashed_once(monkeypatch):
    model = tiny("gpt2").model  # its embedding is its LM head
    hashed: list[tuple[int, ...]] = []
    digest = tensors._digest
    monkeypatch.setattr(tensors, "_digest", lambda value: hashed.append(value.shape) or digest(value))
    found = tensors.digests(model, {})
    assert found["lm_head.weight"] == found["transformer.wte.weight"]
    assert hashed.count(model.lm_head.weight.shape) == 1 and len(hashed) == len(found) - 1


def test_an_edited_model_hashes_only_the_edited_projections_and_has_the_fingerprint_of_a_fresh_copy(monkeypatch, tmp_path):
    lm = tiny("llama")
    _ = lm.fingerprint
    hashed = []
    digest = tensors._digest
    monkeypatch.setattr(tensors, "_digest", lambda value: hashed.append(value.data_ptr()) or digest(value))
    edited = edits.apply(lm, plan(lm))
    assert edited.fingerprint != lm.fingerprint
    assert sorted(hashed) == sorted(edited.layout.blocks[layer].out.weight.data_ptr() for layer in (1, 2))
    assert lms.load(edited.save(tmp_path / "edited")).fingerprint == edited.fingerprint


def test_a_copy_with_another_model_inherits_no_hashes():
    lm = tiny("llama")
    edited = edits.apply(lm, plan(lm))
    assert edited.known_digests
    other = replace(edited, model=tiny("llama").model)
    assert not other.known_digests and other.fingerprint == lm.fingerprint


@pytest.mark.parametrize("change", ["value", "name", "shape", "type", "config"])
def test_any_change_of_a_weight_or_of_the_config_changes_the_fingerprint(change):
    import copy

    lm = tiny("llama")
    model = copy.deepcopy(lm.model)
    out = model.model.layers[0].self_attn.o_proj
    match change:
        case "value":
            out.weight.data[3, 5] += 1e-6
        case "name":
            first, second = model.model.layers[0].self_attn.k_proj, model.model.layers[0].self_attn.v_proj
            first.weight, second.weight = second.weight, first.weight
        case "shape":
            out.weight = torch.nn.Parameter(out.weight.detach().reshape(16, 64))
        case "type":
            out.weight.data = out.weight.data.double()
        case "config":
            model.config.rms_norm_eps *= 2
    assert replace(lm, model=model).fingerprint != lm.fingerprint


# --- offloaded -----------------------------------------------------------------------------------------------


def test_an_offloaded_model_is_the_same_model(plain):
    lm = offloaded(plain)
    assert tensors.storage(lm.model) == "offloaded" and any(p.is_meta for p in lm.model.parameters())
    assert lm.fingerprint == plain.fingerprint and lm.device == torch.device("cpu")
    for layer in range(plain.layout.n_layers):
        assert torch.allclose(lm.layout.W_O(layer), plain.layout.W_O(layer), atol=1e-6)
        bias = plain.layout.b_O(layer)
        assert bias is None or torch.equal(lm.layout.b_O(layer), bias)
    assert logprobs(lm) == logprobs(plain)
    act = edits.steering(direction(plain), 0.3)
    assert logprobs(Condition(lm, (act,))) == logprobs(Condition(plain, (act,)))


def test_activations_and_run_time_edits_of_an_offloaded_model_are_those_of_the_plain_one(plain):
    lm = offloaded(plain)
    samples = rollouts(plain, PROBLEMS, SAMPLING, progress=False)
    everywhere = collect.Positions("everywhere", lambda r: range(len(r.token_ids)))
    one, other = (
        collect.moments(each, samples, lambda r: r.problem_id, kinds=("resid_mid", "z"), positions=everywhere)
        for each in (lm, plain)
    )
    assert one.sums.keys() == other.sums.keys() and one.sums
    for key, value in one.sums.items():
        assert torch.allclose(value, other.sums[key])
    edit = edits.RuntimeEdit(plan(plain))
    for a, b in zip(logprobs(Condition(lm, (edit,))), logprobs(Condition(plain, (edit,))), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_an_offloaded_model_is_saved_whole(plain, tmp_path):
    assert lms.load(offloaded(plain).save(tmp_path / "saved")).fingerprint == plain.fingerprint


# --- quantised -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["4bit", "8bit"])
def quantised(request, tmp_path_factory) -> LM:
    pytest.importorskip("bitsandbytes")
    # bitsandbytes packs 4-bit weights again on CPUs with avx512_bf16, and then needs layers with a multiple of 32 outputs.
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 64}
    folder = zoo.model_of_type("qwen3", **sizes).save(tmp_path_factory.mktemp("model") / "qwen3")
    return lms.load(folder, quantization=request.param)


def test_heads_of_a_quantised_model_sum_to_its_attention(quantised):
    """W_O of a quantised layer is found by running the layer on the unit vectors."""
    layout = quantised.layout
    assert tensors.storage(quantised.model) == "quantised" and tensors.is_packed(layout.blocks[0].out)
    assert layout.W_O(0).shape == (64, 64) and layout.heads == (8,) * 4
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    expected = layout.blocks[0].out(x)
    assert (x @ layout.W_O(0).T - expected).norm() < 0.02 * expected.norm()  # 8bit rounds the inputs, too
    lms.qualify(quantised)


def test_the_fingerprint_of_a_quantised_model_covers_its_scales(quantised):
    before = tensors.digests(quantised.model, {})
    rollouts(quantised, PROBLEMS, SAMPLING, progress=False)  # a first pass moves the scales of 8-bit layers
    assert tensors.digests(quantised.model, {}) == before
    scales = [name for name in before if name.startswith("model.layers.0.self_attn.o_proj.") and not name.endswith(".weight")]
    assert scales


def test_a_quantised_model_is_steered_and_edited_at_run_time(quantised):
    base = logprobs(quantised)
    for act in (edits.steering(direction(quantised), 0.5), edits.RuntimeEdit(plan(quantised))):
        assert logprobs(Condition(quantised, (act,))) != base


def test_the_adapter_of_an_edit_computes_what_the_run_time_edit_does(quantised, tmp_path):
    peft = pytest.importorskip("peft")
    edit = plan(quantised)
    vectors.save_adapter(quantised, edit, tmp_path / "adapter")
    ids = torch.tensor([quantised.prompt_ids(PROBLEMS[1].messages)])
    with Condition(quantised, (edits.RuntimeEdit(edit),)).active(), torch.no_grad():
        expected = quantised.model(input_ids=ids).logits
    with torch.no_grad():
        base = quantised.model(input_ids=ids).logits
        adapted = peft.PeftModel.from_pretrained(quantised.model, tmp_path / "adapter")
        actual = adapted(input_ids=ids).logits
        adapted.unload()
    assert (actual - expected).norm() < 0.02 * (expected - base).norm()


def test_a_quantised_model_is_saved_and_read_again(quantised, tmp_path):
    again = lms.load(quantised.save(tmp_path / "saved"))
    assert tensors.storage(again.model) == "quantised" and again.fingerprint == quantised.fingerprint


def test_thinkedit_on_a_quantised_model_judges_run_time_edits_and_saves_an_adapter(tmp_path):
    pytest.importorskip("bitsandbytes")
    study = jobs.Study(problems=30, samples=2, max_new_tokens=120)
    lm = lms.load("tiny-reasoner", quantization="4bit")
    samples = rollouts(lm, study.load("train", lm), study.sampling, progress=False)
    settings = jobs.EditSettings(fraction=0.06, draws=1)
    found = jobs.find_heads(lm, samples, settings, jobs.form_named("published"), origin={})
    conditions = jobs.edit_conditions(lm, {"edited": found}, settings)
    assert all(c.lm is lm for c in conditions.values()) and len(conditions["edited"].during) == 1
    summary, measured = jobs.edit_and_measure(lm, found, replace(study, problems=6), settings)
    assert not jobs.is_saved(lm, found, tmp_path / "edited")
    saved = jobs.save_edited(lm, found, measured, summary, tmp_path / "edited")
    assert (saved / "adapter_model.safetensors").is_file() and not (saved / "model.safetensors").exists()
    assert jobs.is_saved(lm, found, saved)


# --- refusals: one sentence with a remedy --------------------------------------------------------------------


def refusals(lm: LM, tmp_path):
    edit = plan(lm)
    yield "RuntimeEdit", lambda: edits.apply(lm, edit)
    yield "without quantization", lambda: merging.selective_merge(lm, lm)
    yield "edits.steering", lambda: vectors.bake(lm, direction(lm), 1.0)


def test_a_change_of_weights_that_are_not_plain_is_refused_with_a_remedy(quantised, tmp_path):
    for remedy, change in refusals(quantised, tmp_path):
        with pytest.raises(UnsupportedModelError, match=remedy) as error:
            change()
        assert "quantised" in str(error.value) and len(str(error.value)) < 400


def test_training_of_a_quantised_model_is_refused_before_anything_is_written(quantised, tmp_path):
    pytest.importorskip("trl")
    from toolkit.grpo import recipes
    from toolkit.grpo.run import Run, train

    with pytest.raises(UnsupportedModelError, match="quantised weights, so training is not possible"):
        train(quantised, recipes.grpo_lambda(), PROBLEMS, Run(tmp_path / "run", steps=1))
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_not_merged_into_quantised_weights(tmp_path):
    pytest.importorskip("peft")
    lm = tiny("llama")
    base = lms.load(lm.save(tmp_path / "base"))
    vectors.save_adapter(base, plan(base), tmp_path / "adapter")
    with pytest.raises(UnsupportedModelError, match="Save the merged model first"):
        lms.load(tmp_path / "adapter", quantization="4bit")


def test_a_device_and_a_device_map_exclude_each_other():
    with pytest.raises(ValueError, match="give one of them"):
        lms.load("tiny-reasoner", device="cpu", device_map="auto")


def test_a_model_with_a_device_map_is_not_moved_again(monkeypatch):
    """Its modules are where the map puts them. To move a model that is spread over GPUs to one of them would undo the map."""
    moved: list[str] = []
    move = torch.nn.Module.to

    def to(self, *args, **kwargs):
        moved.append(type(self).__name__)
        return move(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    mapped = lms.load("tiny-reasoner", device_map={"": "cpu"})
    assert not moved and mapped.device.type == "cpu"
    assert lms.load("tiny-reasoner", device="cpu").fingerprint == mapped.fingerprint and moved


def test_activations_are_read_on_the_device_of_their_layer(rollout_of):
    """Stand-in for a layer on another GPU: activations on the meta device."""
    lm = tiny("llama")
    chosen = passes.examples_of(lm, [rollout_of(4), rollout_of(7)], lambda r: "all", THINK)
    pick = passes.Picker(chosen, lm)
    value, classes = torch.zeros(*pick.ids.shape, 3, device="meta"), torch.ones(1, 2, device="meta")
    assert pick.ids.device.type == "cpu"
    for read in (pick.means(value), pick.rows(value), pick.weights_of(classes)):
        assert read.device.type == "meta"


def test_an_unknown_quantisation_is_named():
    with pytest.raises(ValueError, match="'4bit' or '8bit'"):
        lms.load(str(lms.tiny_reasoner_path()), quantization="3bit")
