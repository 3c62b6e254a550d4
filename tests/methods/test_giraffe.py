"""Giraffe: frequencies against the formulas, and a changed model against transformers' own forms, on several architectures."""

from __future__ import annotations

import math

import pytest
import torch

from toolkit import lm as lms
from toolkit.methods import giraffe
from toolkit.methods.giraffe import by_parts, frequencies, linear, power, random_positions, truncated
from toolkit.sites import UnsupportedModelError

ROTARY = ["llama", "qwen3", "gpt_neox"]


def logits(lm, ids):
    with torch.inference_mode():
        return lm.model(ids).logits


# --- frequencies ---------------------------------------------------------------------------------------------


def test_frequencies_are_those_of_the_formulas_written_out():
    theta = frequencies(64)
    for i in range(32):
        expected = 10000 ** (-2 * i / 64)
        assert theta[i].item() == pytest.approx(expected)
        assert linear(theta, 16.0)[i].item() == pytest.approx(expected / 16)
        assert power(theta, 0.5)[i].item() == pytest.approx(expected * (1 - i / 32) ** 0.5)
        turn = 2 * math.pi / 2048
        cut = expected if expected >= turn else turn / 16 if expected >= turn / 8 else 0.0
        assert truncated(theta, 2048)[i].item() == pytest.approx(cut)


def test_a_truncated_basis_of_64_entries_keeps_21_frequencies_replaces_7_and_drops_4():
    theta = frequencies(64)
    cut = truncated(theta, 2048)
    assert (int((cut == theta).sum()), int(((cut != theta) & (cut > 0)).sum()), int((cut == 0).sum())) == (21, 7, 4)


def test_by_parts_keeps_fast_pairs_and_divides_slow_ones():
    theta = frequencies(64)
    new = by_parts(theta, 8.0, 2048)
    turns = 2048 * theta / (2 * math.pi)
    assert torch.equal(new[turns > 40], theta[turns > 40])
    assert torch.allclose(new[turns < 0.7], theta[turns < 0.7] / 8)
    assert bool((new.diff() < 0).all()), "still falling"


def test_random_positions_increase_span_the_text_and_have_the_right_spread():
    drawn = torch.stack([random_positions(200, seed=seed) for seed in range(300)])
    assert bool((drawn.diff(dim=1) > 0).all()) and torch.allclose(drawn[:, -1], torch.tensor(199.0))
    assert drawn.diff(dim=1).mean().item() == pytest.approx(1, abs=0.01)
    assert drawn.diff(dim=1).std().item() == pytest.approx(1 / math.sqrt(3), rel=0.1)  # of U(0, 2)


@pytest.mark.parametrize(
    "call", [lambda t: linear(t, 0.0), lambda t: power(t, -1.0), lambda t: truncated(t, -5), lambda t: by_parts(t, 0.0, 9)]
)
def test_impossible_settings_are_refused(call):
    with pytest.raises(ValueError, match=r"expected|needs"):
        call(frequencies(8))


# --- a changed model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROTARY)
def test_no_change_leaves_the_logits_bit_identical(name, model_of, ids):
    lm = model_of(name)
    theta, _, _ = giraffe.trained(lm)
    for same in (giraffe.with_frequencies(lm, power(theta, 0.0)), giraffe.with_linear(lm, 1.0)):
        assert torch.equal(logits(same, ids), logits(lm, ids))


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("form", ["linear", "parts"])
def test_our_frequencies_equal_transformers_where_it_has_the_form(name, form, model_of, ids):
    lm = model_of(name)
    theta, base, context = giraffe.trained(lm)
    if form == "linear":
        ours, theirs = linear(theta, 4.0), giraffe.with_linear(lm, 4.0)
    else:
        ours, theirs = by_parts(theta, 4.0, context, base), giraffe.with_parts(lm, 4.0)
    assert torch.allclose(logits(giraffe.with_frequencies(lm, ours), ids), logits(theirs, ids), atol=1e-5)
    assert not torch.allclose(logits(theirs, ids), logits(lm, ids), atol=1e-5)


@pytest.mark.parametrize("name", ROTARY)
def test_positions_divided_by_two_are_the_linear_scaling(name, model_of, ids):
    lm = model_of(name)
    with torch.inference_mode():
        halved = lm.model(ids, position_ids=torch.arange(ids.shape[1])[None].float() / 2).logits
    assert torch.allclose(logits(giraffe.with_linear(lm, 2.0), ids), halved, atol=1e-5)


@pytest.mark.parametrize("name", ROTARY)
def test_a_saved_model_computes_the_same_when_transformers_loads_it(name, model_of, ids, tmp_path):
    lm = model_of(name)
    theta, _, window = giraffe.trained(lm)
    changed = giraffe.with_frequencies(lm, truncated(theta, 12), context=4 * window)
    changed.save(tmp_path / "changed")
    again = lms.load(tmp_path / "changed", device="cpu")
    assert torch.equal(logits(again, ids), logits(changed, ids))
    assert again.model.config.max_position_embeddings == 4 * window
    assert again.fingerprint == changed.fingerprint != lm.fingerprint


def test_the_old_model_is_unchanged_and_shares_its_weights(llama, ids):
    before = logits(llama, ids)
    changed = giraffe.with_linear(llama, 8.0)
    assert torch.equal(logits(llama, ids), before)
    own = {p.data_ptr() for p in llama.model.parameters()}
    assert {p.data_ptr() for p in changed.model.parameters()} == own


def test_frequencies_of_zero_are_blind_to_positions(llama, ids):
    theta, _, _ = giraffe.trained(llama)
    blind = giraffe.with_frequencies(llama, torch.zeros_like(theta))
    elsewhere = torch.randint(0, 3000, ids.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        moved = [lm.model(ids, position_ids=elsewhere).logits for lm in (blind, llama)]
    assert torch.allclose(moved[0], logits(blind, ids), atol=1e-5)
    assert not torch.allclose(moved[1], logits(llama, ids), atol=1e-2)


def test_models_without_one_set_of_frequencies_are_refused(model_of, llama):
    for name in ("gpt2", "gemma3"):
        with pytest.raises(UnsupportedModelError, match="expected one set for all layers"):
            giraffe.with_linear(model_of(name), 2.0)
    with pytest.raises(UnsupportedModelError, match="changed already"):
        giraffe.with_linear(giraffe.with_linear(llama, 2.0), 2.0)
    with pytest.raises(ValueError, match="expected"):
        giraffe.with_frequencies(llama, torch.ones(3))
