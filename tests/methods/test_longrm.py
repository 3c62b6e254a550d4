"""LongRM: padded texts that hold their critical chunks, losses against the formulas, accuracies as counted by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolkit.methods import longrm
from toolkit.methods.longrm import (
    accuracy_by_length,
    consistent_pairs,
    length_normalised_preference_loss,
    long_pairs,
    pad_to_length,
)

DISTRACTORS = [f"No {i} one asks{' why' * (i % 3)}." for i in range(60)]


def count(text: str) -> int:
    return len(text.split())


@given(st.integers(8, 150), st.sampled_from(["random", "start", "middle", "end"]), st.integers(0, 5))
def test_a_padded_text_holds_every_critical_chunk_at_its_range_and_fills_but_never_exceeds_the_length(n, placement, seed):
    critical = ["The mill is red.", "It stands."]
    padded = pad_to_length(critical, DISTRACTORS, n, count, placement=placement, seed=seed)
    assert [padded.text[start:stop] for start, stop in padded.needed] == critical
    assert n - 6 < count(padded.text) <= n, "as many chunks as fit; the longest distractor has 6 words"
    rest = padded.text
    for chunk in critical:
        rest = rest.replace(chunk, "")
    used = [d for d in DISTRACTORS if d in rest]
    assert rest.split() == [w for d in sorted(used, key=rest.index) for w in d.split()], "nothing else, and nothing twice"


def test_placement_puts_the_critical_chunks_where_it_says():
    for placement, low, high in (("start", 0, 0), ("middle", 0.4, 0.6), ("end", 0.9, 1)):
        padded = pad_to_length(["XX."], DISTRACTORS, 100, count, placement=placement)
        assert low <= padded.needed[0][0] / len(padded.text) <= high
    places = {round(pad_to_length(["XX."], DISTRACTORS, 100, count, seed=s).needed[0][0] / 400, 1) for s in range(20)}
    assert len(places) > 4, "random places vary with the seed"


def test_longer_texts_of_a_seed_contain_the_chunks_of_shorter_ones():
    pairs = long_pairs(["XX."], ("good", "bad"), DISTRACTORS, (20, 60, 120), count, seed=3)
    chunks = [set(pair.context.text.split(". ")) for pair in pairs]
    assert [pair.length for pair in pairs] == [20, 60, 120] and {(p.chosen, p.rejected) for p in pairs} == {("good", "bad")}
    assert all(len(a - b) <= 1 for a, b in itertools.pairwise(chunks))  # the last chunk of a text ends without a space


def test_texts_that_cannot_be_padded_are_refused():
    with pytest.raises(ValueError, match="3 tokens, n_tokens=2"):
        pad_to_length(["a b c."], DISTRACTORS, 2, count)
    with pytest.raises(ValueError, match="All 60 distractors make a text of"):
        pad_to_length(["a b c."], DISTRACTORS, 10_000, count)
    with pytest.raises(ValueError, match="none given"):
        pad_to_length([], DISTRACTORS, 9, count)


# --- losses --------------------------------------------------------------------------------------------------


def test_the_logo_loss_is_the_golden_one_and_that_of_a_loop():
    ten = torch.tensor([10.0])
    golden = length_normalised_preference_loss(-ten, ten, torch.tensor([[-20.0, -30.0]]), torch.tensor([[10.0, 10.0]]))
    assert golden.item() == pytest.approx(1.91022, abs=5e-6)
    g = torch.Generator().manual_seed(0)
    w, others, nw, n_others = (
        -40 * torch.rand(4, generator=g),
        -40 * torch.rand(4, 3, generator=g),
        torch.arange(3.0, 7),
        2 + torch.arange(12.0).view(4, 3),
    )
    expected = 0.0
    for b in range(4):
        reward = 1.5 * w[b] / nw[b] - 1.5 / 3 * sum(others[b, j] / n_others[b, j] for j in range(3)) - 0.7
        expected += math.log1p(math.exp(-reward)) / 4
    assert length_normalised_preference_loss(w, nw, others, n_others, beta=1.5, gamma=0.7).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_the_loss_of_a_pair_falls_as_its_rewards_part():
    assert longrm.preference_loss(torch.zeros(2), torch.zeros(2)).item() == pytest.approx(math.log(2))
    assert longrm.preference_loss(torch.tensor([2.0]), torch.tensor([-1.0])).item() == pytest.approx(math.log1p(math.exp(-3)))


def test_pairs_are_kept_if_enough_models_agree():
    scores = np.random.default_rng(0).normal(size=(3, 6))
    for agreement in (0.6, 1.0):
        found = {tuple(pair) for pair in consistent_pairs(scores, agreement=agreement).tolist()}
        assert found == {(i, j) for i in range(6) for j in range(6) if sum(m[i] > m[j] for m in scores) >= agreement * 3 - 1e-9}
    assert not len(consistent_pairs(np.ones((2, 3))))
    with pytest.raises(ValueError, match=r"above 0\.5"):
        consistent_pairs(scores, agreement=0.5)


# --- evaluation ----------------------------------------------------------------------------------------------


def test_accuracies_are_those_counted_by_hand():
    scores = np.array([[3.0, 1, 2], [1, 2, 0], [5, 5, 5], [0, 1, 2]])
    found = accuracy_by_length(scores, [64, 64, 128, 128], ["a", "b", "a", "b"]).set_index(["length", "metric"])
    assert found["mean"].to_dict() == pytest.approx(
        {(64, "pairwise"): 0.75, (64, "best_of_n"): 0.5, (128, "pairwise"): 0.25, (128, "best_of_n"): 1 / 6}
    )
    assert found["chance"].to_dict()[64, "best_of_n"] == pytest.approx(1 / 3) and (found["low"] <= found["mean"]).all()
