"""Edits are values before they are acts: written into weights or applied at run time they agree, and touch nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolkit import collect, edits, hooks
from toolkit import lm as lms
from toolkit.edits import RuntimeEdit, Steering
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition
from toolkit.sites import Site
from toolkit.store import WrongModelError
from toolkit.types import Direction, HeadEdit, HeadScores, Plan

HALF = (torch.bfloat16, torch.float16)


def direction_of(lm: LM, seed: int = 0, kind: str = "resid_mid", scale: float = 1.0) -> Direction:
    generator = torch.Generator().manual_seed(seed)
    vector = scale * torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=generator)
    return Direction(vector, kind, "think", "by hand", 5, 5, lm.provenance())


def plan_of(lm: LM, heads, *, strength: float = 1.0, op: str = "project_out", seed: int = 0) -> Plan:
    chosen = tuple(HeadEdit(layer, head, op, strength) for layer, head in heads)
    direction = direction_of(lm, seed) if op == "project_out" else None
    return Plan(chosen, direction, f"by hand, seed {seed}", lm.provenance())


def all_heads(lm: LM) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(lm.layout.n_layers) for head in range(lm.layout.n_heads)]


def weights(lm: LM) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in lm.model.state_dict().items()}


def unit_of(lm: LM, plan: Plan, layer: int) -> Tensor:
    v = lm.layout.to_attn_out(layer, plan.direction.vector[layer]).double()
    return v / v.norm()


# --- weight edit = run-time edit -----------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["project_out", "scale"])
def test_weight_edit_equals_run_time_edit_in_logits(any_lm, rollout_of, op):
    plan = plan_of(any_lm, [(1, 0), (1, 3), (2, 1)], strength=0.8, op=op)
    rollout = rollout_of(30)
    base = collect.logits(any_lm, rollout)
    written = collect.logits(edits.apply(any_lm, plan), rollout)
    at_run_time = collect.logits(any_lm, rollout, RuntimeEdit(plan))
    scale = base.abs().max()
    assert (written - at_run_time).abs().max() <= 1e-5 * scale
    assert (written - base).abs().max() > 1e-3 * scale, "the edit did nothing, so nothing was compared"


@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weight_edit_equals_run_time_edit_in_half_precision_up_to_its_rounding(family, dtype, model_of, rollout_of):
    """Neither is exact: the written weights are rounded once, the run-time output at every position. The difference has to be
    of the size of rounding noise, and far below what the edit itself does."""
    lm = model_of(family, dtype)
    plan = plan_of(lm, all_heads(lm))
    rollout = rollout_of(30)
    base = collect.logits(lm, rollout)
    written = collect.logits(edits.apply(lm, plan), rollout)
    at_run_time = collect.logits(lm, rollout, RuntimeEdit(plan))
    error, effect = (written - at_run_time).norm(), (written - base).norm()
    assert written.isfinite().all() and at_run_time.isfinite().all()
    allowed = 0.10 if dtype == torch.bfloat16 else 0.0125
    assert error <= allowed * effect, (error / effect).item()


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_weight_edit_and_run_time_edit_generate_the_same_tokens(any_lm, problems_of, temperature):
    plan = plan_of(any_lm, all_heads(any_lm), strength=3.0)
    sampling = Sampling(n=1, temperature=temperature, max_new_tokens=24, seed=4)
    problems = problems_of(3)
    written = rollouts(edits.apply(any_lm, plan), problems, sampling, progress=False)
    at_run_time = rollouts(Condition(any_lm, (RuntimeEdit(plan),)), problems, sampling, progress=False)
    assert [r.token_ids for r in written] == [r.token_ids for r in at_run_time]
    if temperature:  # a greedy random model may repeat one token with or without the edit
        unedited = rollouts(any_lm, problems, sampling, progress=False)
        assert [r.token_ids for r in written] != [r.token_ids for r in unedited]


def test_several_edits_of_one_head_compose_alike_in_weights_and_at_run_time(llama, rollout_of):
    """Two halves of a projection, then a scaling, of the same head."""
    v = direction_of(llama)
    chosen = (HeadEdit(1, 2, "project_out", 0.5), HeadEdit(1, 2, "project_out", 0.5), HeadEdit(1, 2, "scale", 0.5))
    plan = Plan(chosen, v, "composed", llama.provenance())
    written = collect.logits(edits.apply(llama, plan), rollout_of(20))
    at_run_time = collect.logits(llama, rollout_of(20), RuntimeEdit(plan))
    assert (written - at_run_time).abs().max() <= 1e-5 * written.abs().max()


# --- what reaches the stream ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resid_mid", "resid_post", "attn_out"])
@torch.no_grad()
def test_an_edited_head_adds_nothing_along_the_direction_to_the_stream_at_any_position(any_lm, kind, rollout_of):
    """Behind the norm where one follows, over that position's own denominator. A direction at ``attn_out`` is read
    before the norm, where it lives."""
    layer, head, lm = 1, 2, any_lm
    plan = Plan((HeadEdit(layer, head, "project_out", 1.0),), direction_of(lm, kind=kind), "one head", lm.provenance())
    unit, columns, norm = (
        plan.direction.unit()[layer].float(),
        lm.layout.head(layer, head),
        lm.layout.blocks[layer].post_attention_norm,
    )

    def along(model: LM) -> tuple[Tensor, Tensor]:
        wanted = [Site(site, layer) for site in ("z", "attn_out")]
        with hooks.record(model.layout, wanted) as seen:
            model.model(input_ids=torch.tensor([rollout_of(20).token_ids]))
        z, attn_out = (seen[site][0] for site in wanted)
        written = z[:, columns] @ model.layout.W_O(layer)[:, columns].T
        if norm is not None and kind != "attn_out":
            gain = norm(torch.ones(lm.layout.d_model))
            written = gain * written / attn_out.pow(2).mean(dim=-1, keepdim=True).sqrt()
        return (written @ unit).abs() / written.norm(dim=-1), written.norm(dim=-1)

    (share, size), (before, _) = along(edits.apply(lm, plan)), along(lm)
    assert (share < 1e-5).all() and (size > 0).all()
    assert (before > 1e-5).any(), "there was nothing to remove"


# --- what the projection does --------------------------------------------------------------------------------


heads_of_three_layers = st.sets(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=6)


@given(
    family=st.sampled_from(FAMILIES),
    heads=heads_of_three_layers,
    seed=st.integers(0, 1000),
    strength=st.floats(-1, 2, allow_subnormal=False),
)
def test_projection_scales_the_component_by_one_minus_strength(model_of, family, heads, seed, strength):
    lm = model_of(family)
    plan = plan_of(lm, sorted(heads), strength=strength, seed=seed)
    edited = edits.apply(lm, plan)
    for layer, head in heads:
        columns, unit = lm.layout.head(layer, head), unit_of(lm, plan, layer)
        before, after = (m.layout.W_O(layer)[:, columns].double() for m in (lm, edited))
        assert torch.allclose(unit @ after, (1 - strength) * (unit @ before), atol=1e-5)
        across = torch.eye(len(unit), dtype=unit.dtype) - torch.outer(unit, unit)
        assert torch.allclose(across @ after, across @ before, atol=1e-5), "something besides the component changed"


@given(family=st.sampled_from(FAMILIES), heads=heads_of_three_layers, seed=st.integers(0, 1000))
def test_projection_is_idempotent(model_of, family, heads, seed):
    lm = model_of(family)
    plan = plan_of(lm, sorted(heads), seed=seed)
    once = edits.apply(lm, plan)
    twice = edits.apply(once, replace(plan, provenance=once.provenance()))
    for layer in range(3):
        assert torch.allclose(twice.layout.W_O(layer), once.layout.W_O(layer), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=["float32", "bfloat16", "float16"])
def test_projection_removes_the_component_in_every_weight_type(dtype, model_of):
    lm = model_of("qwen3", dtype)
    plan = plan_of(lm, all_heads(lm))
    edited = edits.apply(lm, plan)
    for layer in range(3):
        unit, W = unit_of(lm, plan, layer), edited.layout.W_O(layer)
        assert W.dtype == dtype
        # One rounding of each of the 32 entries of a column is what may be left.
        assert (unit @ W.double()).abs().max() <= torch.finfo(dtype).eps * W.double().norm(dim=0).max()


def test_scale_at_strength_1_silences_the_head_and_no_other(lm):
    edited = edits.apply(lm, plan_of(lm, [(1, 2)], op="scale"))
    W, before, columns = edited.layout.W_O(1), lm.layout.W_O(1), lm.layout.head(1, 2)
    assert not W[:, columns].any()
    rest = torch.ones(W.shape[1], dtype=torch.bool)
    rest[columns] = False
    assert torch.equal(W[:, rest], before[:, rest])


# --- what is not touched -------------------------------------------------------------------------------------


def test_untouched_weights_are_shared_and_bitwise_equal_tensor_by_tensor(any_lm):
    plan = plan_of(any_lm, [(1, 0), (1, 2)])
    edited = edits.apply(any_lm, plan)
    mine, theirs = dict(any_lm.model.named_parameters()), dict(edited.model.named_parameters())
    assert mine.keys() == theirs.keys()
    target = any_lm.layout.blocks[1].out.weight
    changed = [name for name, value in mine.items() if value is target]
    assert len(changed) == 1
    for name, value in mine.items():
        if name in changed:
            assert value.data_ptr() != theirs[name].data_ptr()
            assert not torch.equal(value, theirs[name])
        else:
            assert value.data_ptr() == theirs[name].data_ptr(), name
            assert torch.equal(value, theirs[name]), name
    buffers = dict(edited.model.named_buffers())
    assert all(value is buffers[name] for name, value in any_lm.model.named_buffers())
    unit = any_lm.layout.head(1, 1)
    assert torch.equal(edited.layout.W_O(1)[:, unit], any_lm.layout.W_O(1)[:, unit]), "a neighbouring head changed"


def test_the_base_model_is_not_modified(any_lm, rollout_of):
    before, logits, fingerprint = weights(any_lm), collect.logits(any_lm, rollout_of(10)), any_lm.fingerprint
    plan = plan_of(any_lm, all_heads(any_lm))
    edited = edits.apply(any_lm, plan)
    collect.logits(any_lm, rollout_of(10), RuntimeEdit(plan))
    collect.logits(any_lm, rollout_of(10), Steering(direction_of(any_lm), 3.0))
    after = any_lm.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(collect.logits(any_lm, rollout_of(10)), logits)
    assert replace(any_lm).fingerprint == fingerprint != edited.fingerprint
    assert edited.parent == fingerprint


def test_applying_twice_gives_the_same_model_twice(llama):
    plan = plan_of(llama, [(0, 0), (2, 3)])
    assert edits.apply(llama, plan).fingerprint == edits.apply(llama, plan).fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=["float32", "bfloat16", "float16"])
def test_strength_0_is_bitwise_the_base_model(dtype, model_of, rollout_of):
    for family in FAMILIES:
        lm = model_of(family, dtype)
        base = collect.logits(lm, rollout_of(12))
        assert edits.apply(lm, plan_of(lm, all_heads(lm), strength=0.0)).fingerprint == lm.fingerprint, family
        for kind in ("resid_mid", "resid_post", "resid_pre", "attn_out"):
            steered = collect.logits(lm, rollout_of(12), Steering(direction_of(lm, kind=kind, scale=50.0), 0.0))
            assert torch.equal(steered, base), (family, kind)


# --- steering ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resid_mid", "resid_post"])
def test_steering_adds_strength_times_the_direction_at_every_position(lm, kind, rollout_of):
    """Against raw hooks that add to what attention, or the block, puts out."""
    v, strength, rollout = direction_of(lm, kind=kind), 0.7, rollout_of(15)

    def add(layer):
        def hook(module, args, output):
            shift = strength * v.vector[layer]
            return (output[0] + shift, *output[1:]) if isinstance(output, tuple) else output + shift

        return hook

    handles = []
    for layer, block in enumerate(lm.layout.blocks):
        module = block.block if kind == "resid_post" else (block.post_attention_norm or block.attention)
        handles.append(module.register_forward_hook(add(layer)))
    try:
        expected = collect.logits(lm, rollout)
    finally:
        for handle in handles:
            handle.remove()
    steered = collect.logits(lm, rollout, Steering(v, strength))
    base = collect.logits(lm, rollout)
    assert (steered - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (steered - base).abs().max() > 1e-2 * base.abs().max()


def test_steering_some_layers_leaves_the_others(llama, rollout_of):
    v = direction_of(llama, kind="resid_post")
    masked = v.vector.clone()
    masked[[0, 2]] = 0
    some = collect.logits(llama, rollout_of(9), Steering(v, 0.5, layers=(1,)))
    assert torch.equal(some, collect.logits(llama, rollout_of(9), Steering(replace(v, vector=masked), 0.5)))
    assert not torch.equal(some, collect.logits(llama, rollout_of(9), Steering(v, 0.5)))


def test_relative_dose_is_the_size_of_the_push_beside_the_activations(llama):
    v = direction_of(llama)
    dose = Steering(v, -0.5).relative_dose(torch.tensor([1.0, 2.0, 4.0]))
    assert torch.allclose(dose, 0.5 * v.vector.norm(dim=1) / torch.tensor([1.0, 2.0, 4.0]))


def test_a_direction_of_another_shape_is_refused(llama, tiny):
    with pytest.raises(WrongModelError, match=r"\(\d+, \d+\).*tiny llama has 3 layers of width 32"):
        Steering(direction_of(tiny), 1.0)(llama)


def test_interventions_of_a_condition_act_together(llama, problems_of):
    plan, v = plan_of(llama, all_heads(llama)), direction_of(llama, kind="resid_post", scale=0.3)
    sampling, problems = Sampling(max_new_tokens=12), problems_of(2)
    both = rollouts(Condition(llama, (RuntimeEdit(plan), Steering(v, 1.0))), problems, sampling, progress=False)
    edited = Condition(edits.apply(llama, plan), (Steering(v, 1.0),))
    assert [r.token_ids for r in both] == [r.token_ids for r in rollouts(edited, problems, sampling, progress=False)]


# --- plans and controls --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scores(llama) -> HeadScores:
    return HeadScores(torch.arange(12, dtype=torch.float64).view(3, 4) % 7, "by hand", "none", llama.provenance())


def test_a_plan_takes_the_highest_scores(scores, llama):
    plan = edits.plan(scores, direction_of(llama), count=3, strength=0.5)
    assert plan.heads[0] == (1, 2)
    taken = [scores.score[head].item() for head in plan.heads]
    assert sorted(taken) == sorted(scores.score.flatten().tolist())[-3:]
    assert {edit.strength for edit in plan.edits} == {0.5}


@pytest.mark.parametrize(("fraction", "heads"), [(0.04, 1), (0.25, 3), (1.0, 12), (0.3, 4)])
def test_a_fraction_is_a_share_of_all_heads_and_at_least_one(fraction, heads, scores, llama):
    assert len(edits.plan(scores, direction_of(llama), fraction=fraction).edits) == heads


@pytest.mark.parametrize("fraction", [0.0, 1.5, -0.1, None])
def test_a_fraction_outside_its_range_is_refused(fraction, scores, llama):
    with pytest.raises(ValueError, match=rf"fraction={fraction}: need 0 < fraction <= 1, or count"):
        edits.plan(scores, direction_of(llama), fraction=fraction)


@pytest.mark.parametrize("count", [0, 13, -1])
def test_a_count_outside_its_range_is_refused(count, scores, llama):
    with pytest.raises(ValueError, match=rf"count={count}: the model has 12 heads"):
        edits.plan(scores, direction_of(llama), count=count)


def test_a_projection_without_a_direction_is_refused(llama):
    with pytest.raises(ValueError, match=r"direction is None: pass direction="):
        Plan((HeadEdit(0, 0, "project_out", 1.0),), None, "x", llama.provenance())


@given(
    heads=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=6, unique=True),
    seed=st.integers(0, 2**31),
    strengths=st.lists(st.floats(0, 2, allow_subnormal=False), min_size=6, max_size=6),
)
def test_random_heads_never_hit_targets_and_are_matched_layer_by_layer(llama, heads, seed, strengths):
    chosen = tuple(HeadEdit(*at, "project_out", s) for at, s in zip(heads, strengths, strict=False))
    plan = Plan(chosen, direction_of(llama), "targets", llama.provenance())
    control = edits.random_heads(plan, llama.layout, seed=seed)
    assert not set(control.heads) & set(plan.heads)
    assert len(set(control.heads)) == len(control.heads)
    assert Counter(layer for layer, _ in control.heads) == Counter(layer for layer, _ in plan.heads)
    for layer in range(3):
        by_layer = [sorted(e.strength for e in p.edits if e.layer == layer) for p in (plan, control)]
        assert by_layer[0] == by_layer[1]
    assert all(0 <= head < llama.layout.n_heads for _, head in control.heads)
    assert control.edits == edits.random_heads(plan, llama.layout, seed=seed).edits
    assert control.direction is plan.direction and control.provenance == plan.provenance


def test_random_heads_reach_every_free_head(llama):
    plan = plan_of(llama, [(1, 0)])
    assert {edits.random_heads(plan, llama.layout, seed=s).heads[0] for s in range(40)} == {(1, 1), (1, 2), (1, 3)}


@pytest.mark.parametrize("seed", range(5))
def test_random_heads_that_a_crowded_layer_cannot_match_come_from_the_nearest(seed, llama):
    targets = [(1, 0), (1, 1), (1, 2), (0, 3), (0, 2)]
    control = edits.random_heads(plan_of(llama, targets), llama.layout, seed=seed).heads
    assert len({*control}) == len(targets) and not {*control} & {*targets}
    assert {(1, 3), (0, 0), (0, 1)} < {*control}  # all that these layers have
    assert sorted(layer for layer, _ in control) == [0, 0, 1, 2, 2]


def test_more_heads_than_others_are_left_have_no_control(llama):
    targets = [(layer, head) for layer in (0, 1) for head in range(4)]
    assert llama.layout.n_layers == 3
    with pytest.raises(ValueError, match="8 of 12 heads are edited: a control needs as many others"):
        edits.random_heads(plan_of(llama, targets), llama.layout, seed=0)


@pytest.mark.parametrize("act", [edits.apply, lambda lm, plan: RuntimeEdit(plan)(lm)], ids=["weights", "run time"])
def test_a_plan_of_another_model_is_refused_with_both_names_and_no_hash(act, llama, model_of):
    other = model_of("qwen2")
    plan = plan_of(other, [(0, 0)])
    with pytest.raises(WrongModelError) as caught:
        act(llama, plan)
    for part in ("tiny qwen2", "tiny llama", "rollouts"):
        assert part in str(caught.value), part
    assert other.fingerprint[:12] not in str(caught.value)


def test_a_plan_is_refused_on_the_model_it_already_edited(llama):
    plan = plan_of(llama, [(0, 0)])
    with pytest.raises(WrongModelError):
        edits.apply(edits.apply(llama, plan), plan)


# --- saved checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, dtype) for family in FAMILIES for dtype in (torch.float32, *HALF)), ("tiny-reasoner", torch.float32)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_a_saved_edited_checkpoint_reloads_to_the_same_weights(family, dtype, model_of, tmp_path, rollout_of):
    lm = model_of(family, dtype)
    edited = edits.apply(lm, plan_of(lm, [(0, 1), (2, 0)]))
    path = edited.save(tmp_path / "edited")
    again = lms.load(path, dtype=dtype, device="cpu")
    assert again.fingerprint == edited.fingerprint
    assert again.tokenizer.chat_template == lm.tokenizer.chat_template
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    assert lms.wrap(plain, AutoTokenizer.from_pretrained(path), name="plain").fingerprint == edited.fingerprint
    ids = torch.tensor([rollout_of(10).token_ids])
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, again.model(ids).logits)
        if dtype == torch.float32:  # casting a whole model also rounds its rotary frequencies, loading it does not
            assert torch.equal(plain(ids).logits, edited.model(ids).logits)
    assert {p.name for p in path.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_saving_into_a_directory_with_something_in_it_is_refused(llama, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"full.*not empty.*another directory"):
        llama.save(tmp_path / "full")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_a_save_that_fails_leaves_no_checkpoint(llama, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(llama.tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        llama.save(tmp_path / "new")
    target = tmp_path / "new"
    assert not target.exists() or not any(target.iterdir())
    monkeypatch.undo()
    assert lms.load(llama.save(target), device="cpu").fingerprint == llama.fingerprint


def test_column_norms_are_those_of_the_edited_heads(llama):
    plan = plan_of(llama, [(1, 2)], op="scale", strength=0.25)
    row = edits.column_norms(llama, edits.apply(llama, plan), plan)[0]
    before = llama.layout.W_O(1)[:, 16:24].norm().item()
    assert row == {"layer": 1, "head": 2, "before": pytest.approx(before), "after": pytest.approx(0.75 * before)}
