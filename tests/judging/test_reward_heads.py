"""Reward heads: states equal those of whole passes on several architectures; a head learns what is there, and not from shuffled labels."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from toolkit import collect, judging
from toolkit.judging import RewardHead, best_of, flipped
from toolkit.positions import Positions
from toolkit.types import Rollout

OWN = Positions("own", lambda r: range(r.prompt_len, len(r.token_ids)))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "gemma2"])
def test_states_with_a_shared_prompt_equal_those_of_whole_passes(name, model_of):
    lm = model_of(name)
    prompt, responses = [5, 9, 3, 7, 11, 2], [[4], [8, 6, 10], [8, 6, 10, 12, 3, 3, 9]]
    found = judging.response_states(lm, prompt, responses)
    rollouts = [Rollout("p", i, (*prompt, *r), len(prompt), None, None, "stop", "", True) for i, r in enumerate(responses)]
    expected = collect.states(lm, rollouts, "resid_post", positions=OWN).values
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[1], found[2], atol=1e-3)


@pytest.mark.parametrize(("prompt", "responses"), [([], [[1]]), ([1], []), ([1], [[1], []])])
def test_nothing_to_judge_is_refused(prompt, responses, model_of):
    with pytest.raises(ValueError, match="need at least one token in each"):
        judging.response_states(model_of("llama"), prompt, responses)


@pytest.fixture(scope="module")
def preferences():
    """Features with one preferred direction under larger noise along others; pairs of rows, the better one first."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 12)) * np.linspace(0.1, 3, 12)
    quality = 4 * x[:, 0] + 0.3 * rng.normal(size=400)
    rows = rng.permutation(400).reshape(-1, 2)
    return x, np.where((quality[rows[:, 0]] > quality[rows[:, 1]])[:, None], rows, rows[:, ::-1])


def agreement(head, x, pairs):
    z = head.score(x)
    return float(np.mean(z[pairs[:, 0]] > z[pairs[:, 1]]))


def test_a_head_learns_preferences_and_from_shuffled_labels_it_does_not(preferences):
    x, pairs = preferences
    head = judging.fit(x, pairs[:120], layer=3, fingerprint="f", strength=1.0)
    assert agreement(head, x, pairs[120:]) > 0.75
    controls = [
        agreement(judging.fit(x, flipped(pairs[:120], seed=s), layer=3, fingerprint="f", strength=1.0), x, pairs[120:])
        for s in range(20)
    ]
    # Their mean is near one half by symmetry, whatever they learn; so the head must beat nearly every single one.
    assert abs(np.mean(controls) - 0.5) < 0.12 and agreement(head, x, pairs[120:]) > np.quantile(controls, 0.975)


def test_the_weights_maximise_the_penalised_bradley_terry_likelihood(preferences):
    x, pairs = preferences
    head = judging.fit(x, pairs, layer=0, fingerprint="f", strength=0.5)
    scale = x[np.unique(pairs)].std(axis=0)
    d = torch.tensor((x[pairs[:, 0]] - x[pairs[:, 1]]) / scale)
    w = torch.tensor(head.weight * scale, requires_grad=True)
    # Both orders of each pair: the loss counts twice.
    (2 * 0.5 * torch.nn.functional.softplus(-(d @ w)).sum() + 0.5 * w @ w).backward()
    assert w.grad.abs().max() < 0.02


def test_flipped_reverses_about_half_of_the_pairs_and_keeps_them_otherwise(preferences):
    _, pairs = preferences
    new = flipped(pairs, seed=1)
    same, reversed_ = (new == pairs).all(axis=1), (new == pairs[:, ::-1]).all(axis=1)
    assert (same ^ reversed_).all() and 0.35 < same.mean() < 0.65
    assert (new == flipped(pairs, seed=1)).all() and (new != flipped(pairs, seed=2)).any()


def test_a_head_is_saved_as_json_and_read_back(preferences):
    x, pairs = preferences
    head = judging.fit(x, pairs, layer=2, fingerprint="abc")
    again = RewardHead.from_state_dict(json.loads(json.dumps(head.state_dict())))
    assert np.array_equal(again.score(x), head.score(x)) and (again.layer, again.fingerprint) == (2, "abc")


def test_best_of_shares_ties():
    right = np.array([[True, False, False]] * 3)
    assert best_of(np.array([[2.0, 1, 1], [1, 2, 0], [1, 1, 1]]), right).tolist() == pytest.approx([1, 0, 1 / 3])
