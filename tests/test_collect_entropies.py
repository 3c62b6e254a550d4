"""Moments and entropies of one pass are those of two."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from toolkit import collect, entropies
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM
from toolkit.sites import UnsupportedModelError


def by_length(r) -> str | None:
    return None if r.sample == 2 else "long" if r.response_tokens > 12 else "short"


def sampled(lm: LM, problems_of):
    found = rollouts(lm, problems_of(4), Sampling(n=3, max_new_tokens=24, seed=1), progress=False)
    return [r for r in found if collect.THINK.of(r)] or pytest.skip("no thinking was sampled")


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "gpt2", "tiny-reasoner"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_pass_gives_what_two_give(name, temperature, model_of, problems_of, monkeypatch):
    lm = model_of(name)
    monkeypatch.setattr(collect, "LOGITS", 103 * 5)  # a few rows at a time
    found = sampled(lm, problems_of)
    moments, seen = collect.moments_and_entropies(lm, found, by_length, temperature=temperature)
    expected = collect.moments(lm, found, by_length)
    assert moments.labels == expected.labels and moments.n == expected.n
    for kind, value in expected.sums.items():
        assert torch.equal(moments.sums[kind], value)
    measured = entropies.with_entropies(lm, found, temperature=temperature)
    for r, now, then in zip(found, seen, measured, strict=True):
        if by_length(r) is None:
            assert now is r
            continue
        assert now.token_ids == r.token_ids
        assert now.entropies == pytest.approx(then.entropies, abs=1e-3)
        assert now.logprobs == pytest.approx(then.logprobs, abs=1e-3)


def test_a_model_that_does_more_than_its_head_is_refused(llama, problems_of, monkeypatch):
    found, forward = sampled(llama, problems_of), llama.model.forward
    monkeypatch.setattr(llama.model, "forward", lambda **given: SimpleNamespace(logits=2 * forward(**given).logits))
    with pytest.raises(UnsupportedModelError, match=r"entropies\.with_entropies"):
        collect.moments_and_entropies(llama, found, by_length)


def test_a_temperature_must_be_positive(llama):
    with pytest.raises(ValueError, match="above 0"):
        collect.moments_and_entropies(llama, [], by_length, temperature=0.0)


def test_a_rollout_that_is_in_the_list_twice_is_measured_at_both_places(model_of, problems_of):
    lm = model_of("tiny-reasoner")
    found = sampled(lm, problems_of)
    measured = collect.moments_and_entropies(lm, found, lambda r: "all")[1]
    again = collect.moments_and_entropies(lm, [found[0], *found], lambda r: "all")[1]
    assert len(again) == len(found) + 1 and again[0] == again[1]
    for now, then in zip(again[1:], measured, strict=True):
        assert now.entropies == pytest.approx(then.entropies, abs=1e-4)


def test_second_moments_of_a_kind_that_is_not_collected_are_refused_before_the_pass(model_of, problems_of, monkeypatch):
    lm = model_of("tiny-reasoner")
    found = sampled(lm, problems_of)
    monkeypatch.setattr(collect, "forward", None)  # any pass fails
    with pytest.raises(
        ValueError, match=r"second=\('resid_post',\): outer products of 'resid_post' need its sums too, but kinds is \('resid_mid'"
    ):
        collect.moments(lm, found, lambda r: "all", kinds=("resid_mid",), second=("resid_post",))
