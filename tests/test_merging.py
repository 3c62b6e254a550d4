"""Update-selective merging keeps exactly the largest changes, scaled, and touches nothing else."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit import edits, merging
from toolkit import lm as lms
from toolkit.lm import LM
from toolkit.merging import DifferentModelsError, selective_merge


@pytest.fixture
def base() -> LM:
    return lms.load("tiny-reasoner")


def trained(base: LM, seed: int = 0, unchanged: str = "") -> LM:
    """The base after made-up training: changes of every size, larger in some tensors than in others."""
    generator, model = torch.Generator().manual_seed(seed), copy.deepcopy(base.model)
    with torch.no_grad():
        for i, (name, weight) in enumerate(model.named_parameters()):
            if not unchanged or unchanged not in name:
                weight += 1e-3 * (1 + i) * torch.randn(weight.shape, generator=generator)
    return lms.child(base, model, "trained")


def changes(base: LM, other: LM) -> dict[str, torch.Tensor]:
    before = dict(base.model.named_parameters())
    return {name: (w - before[name]).detach() for name, w in other.model.named_parameters()}


@pytest.mark.parametrize("scope", merging.SCOPES)
def test_the_largest_quarter_of_the_changes_is_kept_and_scaled(base, scope):
    other = trained(base)
    merged, full = changes(base, selective_merge(base, other, scope=scope)), changes(base, other)
    every = torch.cat([delta.abs().flatten() for delta in full.values()]).sort(descending=True).values
    for name, delta in full.items():
        flat = delta.abs().flatten().sort(descending=True).values
        least = every[round(0.25 * len(every)) - 1] if scope == "global" else flat[round(0.25 * len(flat)) - 1]
        expected = torch.where(delta.abs() >= least, 0.7 * delta, torch.zeros_like(delta))
        torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=1e-4)
    shares = [float((delta != 0).float().mean()) for delta in merged.values()]
    if scope == "tensor":
        assert all(abs(share - 0.25) < 0.01 for share in shares)
    else:
        assert max(shares) > 0.5 and min(shares) < 0.05  # tensors that changed more keep more
        assert abs(sum((d != 0).sum().item() for d in merged.values()) / len(every) - 0.25) < 1e-3


@pytest.mark.parametrize("scope", merging.SCOPES)
def test_everything_kept_in_full_is_the_trained_model_and_nothing_scaled_is_the_base(base, scope):
    other = trained(base)
    whole = selective_merge(base, other, keep=1.0, scale=1.0, scope=scope)
    for a, b in zip(whole.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)
    none = selective_merge(base, other, scale=0.0, scope=scope)
    assert none.fingerprint == base.fingerprint


def test_the_base_is_untouched_and_is_the_parent(base):
    before = base.fingerprint
    merged = selective_merge(base, trained(base))
    assert lms.load("tiny-reasoner").fingerprint == before == merged.parent
    assert merged.fingerprint != before and "25%" in merged.name


def test_a_tensor_that_training_left_alone_stays(base):
    name = "layers.1."
    merged = changes(base, selective_merge(base, trained(base, unchanged=name)))
    assert all((delta == 0).all() for key, delta in merged.items() if name in key)
    assert any((delta != 0).any() for delta in merged.values())


@pytest.mark.parametrize("scope", merging.SCOPES)
def test_a_small_change_of_a_bfloat16_base_is_in_the_merged_model(scope):
    base = lms.load("tiny-reasoner", dtype=torch.bfloat16)
    model = copy.deepcopy(base.model).float()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 2**-12)  # an eighth of what bfloat16 can hold
    other = lms.child(base, model, "trained")
    start, learned, merged = (
        dict(lm.model.named_parameters()) for lm in (base, other, selective_merge(base, other, keep=1.0, scale=1.0, scope=scope))
    )
    assert all(torch.equal(merged[name], learned[name]) for name in start)
    narrow = selective_merge(base, other, keep=1.0, scale=1.0, scope=scope, dtype=torch.bfloat16)
    assert all(torch.equal(weight, start[name]) for name, weight in narrow.model.named_parameters())
    assert narrow.name.endswith("bfloat16 keeps 0.0% of the change, with an error of 100.0% of its size")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e3, 1e3, width=32, allow_subnormal=False), min_size=1, max_size=30), min_size=1, max_size=4),
    st.floats(0.01, 1.0, allow_subnormal=False),
)
def test_the_threshold_is_the_kth_largest(tensors, keep):
    arrays = [torch.tensor(values, dtype=torch.float32) for values in tensors]
    ordered = np.sort(np.abs(np.concatenate([a.numpy() for a in arrays])))[::-1]
    assert merging.threshold(lambda: arrays, keep) == ordered[max(1, round(keep * len(ordered))) - 1]


def test_models_that_do_not_belong_together_are_refused(base):
    config = copy.deepcopy(base.model.config)
    config.num_hidden_layers -= 1
    shallow = replace(base, model=type(base.model)(config))
    with pytest.raises(DifferentModelsError, match="Give a model and its base"):
        selective_merge(base, shallow)
    with pytest.raises(ValueError, match="keep=0"):
        selective_merge(base, base, keep=0.0)
    with pytest.raises(ValueError, match="scope='layer'"):
        selective_merge(base, base, scope="layer")
    broken = trained(base)
    with torch.no_grad():
        next(broken.model.parameters())[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        selective_merge(base, broken)


def test_the_merge_is_also_among_the_edits():
    assert edits.selective_merge is selective_merge
