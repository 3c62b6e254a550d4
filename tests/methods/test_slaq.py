"""SLAQ's analysis: attributions against derivatives and ablations, similarities and momentum against counting by hand."""

from __future__ import annotations

from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolkit import hooks
from toolkit.methods import slaq, slaq_positions
from toolkit.probes import Protocol, TooFewProblemsError
from toolkit.sites import Site
from toolkit.types import Span

FAMILIES = ["llama", "qwen3", "gpt2", "gpt_neox", "gemma2"]
IDS = [7, 11, 30, 12, 9, 44, 18, 25, 31, 8]
ANSWER = Span(6, 9)
numbers = st.lists(st.floats(-5, 5).map(lambda v: round(v, 2)), min_size=2, max_size=8)


def log_odds(lm, ids=IDS, span=ANSWER) -> float:
    with torch.inference_mode():
        rows = lm.model(torch.tensor([ids])).logits[0].double().softmax(-1)
    p = [float(rows[t - 1, ids[t]]) for t in range(span.start, span.stop)]
    return float(np.mean([np.log(x / (1 - x)) for x in p]))


# --- attribution ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_an_attribution_is_the_derivative_by_the_size_of_a_components_output(name, model_of):
    lm = model_of(name)
    a = slaq.attribute(lm, IDS, [ANSWER])[0]
    assert a.log_odds == pytest.approx(log_odds(lm), abs=1e-4)
    layer, head, h = lm.layout.n_layers - 1, 1, 0.02

    def scaled(site, where, factor):
        def fn(value, inputs):
            value = value.clone()
            value[..., where] *= factor
            return value

        with hooks.rewrite(lm.layout, {site: fn}):
            return log_odds(lm)

    for site, where, value in (
        (Site("z", layer), lm.layout.head(layer, head), a.heads[layer, head]),
        (Site("mlp_out", 0), slice(None), a.mlps[0]),
    ):
        numeric = (scaled(site, where, 1 + h) - scaled(site, where, 1 - h)) / (2 * h)
        assert float(value) == pytest.approx(numeric, abs=2e-4, rel=0.02)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_neurons_of_an_mlp_without_bias_sum_to_the_mlp(name, model_of):
    a = slaq.attribute(model_of(name), IDS, [ANSWER])[0]
    assert torch.allclose(a.neurons.sum(dim=1), a.mlps, atol=1e-5)
    assert a.neurons.abs().sum() > 0


def test_several_answers_of_one_sequence_are_attributed_as_one_by_one(llama):
    spans = [Span(3, 5), Span(6, 9)]
    both = slaq.attribute(llama, IDS, spans)
    for a, span in zip(both, spans, strict=True):
        alone = slaq.attribute(llama, IDS, [span])[0]
        assert torch.allclose(a.heads, alone.heads, atol=1e-6) and torch.allclose(a.neurons, alone.neurons, atol=1e-6)
    assert not torch.allclose(both[0].heads, both[1].heads)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ablation_is_the_drop_when_one_component_is_zero(name, model_of):
    lm = model_of(name)
    found = slaq.ablation(lm, IDS, ANSWER)
    layer, head = 1, 2

    def cut(value, inputs):
        value = value.clone()
        value[..., lm.layout.head(layer, head)] = 0
        return value

    assert float(found.heads[layer, head]) == pytest.approx(log_odds(lm) - log_odds_inside(lm, Site("z", layer), cut), abs=1e-5)
    with hooks.rewrite(lm.layout, {Site("mlp_out", layer): lambda value, inputs: value * 0}):
        without = log_odds(lm)
    assert float(found.mlps[layer]) == pytest.approx(log_odds(lm) - without, abs=1e-5)


def log_odds_inside(lm, site, fn) -> float:
    with hooks.rewrite(lm.layout, {site: fn}):
        return log_odds(lm)


def test_a_head_whose_output_is_zero_has_attribution_and_ablation_zero(llama):
    def cut(value, inputs):
        value = value.clone()
        value[..., llama.layout.head(1, 0)] = 0
        return value

    with hooks.rewrite(llama.layout, {Site("z", 1): cut}):
        assert float(slaq.attribute(llama, IDS, [ANSWER])[0].heads[1, 0]) == 0
        assert float(slaq.ablation(llama, IDS, ANSWER).heads[1, 0]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("span", [Span(0, 2), Span(4, 4), Span(8, 11)])
def test_an_answer_outside_the_sequence_is_refused(llama, span):
    for call in (lambda: slaq.attribute(llama, IDS, [span]), lambda: slaq.ablation(llama, IDS, span)):
        with pytest.raises(ValueError, match="at least one token, after the first"):
            call()


# --- similarity ----------------------------------------------------------------------------------------------


@given(numbers, st.sampled_from([0.3, 0.5, 0.9, 1.0]))
def test_a_minimal_set_is_the_smallest_that_covers_the_share(values, share):
    a = np.array(values)
    found, total = slaq.minimal_set(a, share), np.maximum(a, 0).sum()
    covers = [
        subset
        for size in range(len(a) + 1)
        for subset in combinations(range(len(a)), size)
        if sum(max(a[i], 0) for i in subset) >= share * total * (1 - 1e-9)
    ]
    assert found.sum() == min(map(len, covers))
    assert np.maximum(a, 0)[found].sum() >= share * total * (1 - 1e-9)


@given(numbers, st.randoms(use_true_random=False))
def test_similarities_are_those_of_the_formulas_written_out(values, rng):
    a = np.array(values)
    b = np.array(rng.sample(values, len(values)))
    found = slaq.similarity(a, b)
    s, t = ({i for i, inside in enumerate(slaq.minimal_set(x)) if inside} for x in (a, b))
    assert found["jaccard"] == pytest.approx(len(s & t) / len(s | t) if s | t else 0)
    assert found["overlap"] == pytest.approx(len(s & t) / min(len(s), len(t)) if s and t else 0)
    p, q = [max(x, 0) for x in a], [max(x, 0) for x in b]
    top = sum(map(max, zip(p, q, strict=True)))
    assert found["weighted"] == pytest.approx(sum(map(min, zip(p, q, strict=True))) / top if top else 0)
    size = np.sqrt((a**2).sum() * (b**2).sum())
    assert found["cosine"] == pytest.approx((a * b).sum() / size if size else 0)


def test_an_attribution_is_most_similar_to_itself(llama):
    a, b = slaq.attribute(llama, IDS, [Span(3, 5), Span(6, 9)])
    same, other = slaq.similarities(a, a), slaq.similarities(a, b)
    assert len(same) == 12 and all(v == pytest.approx(1) for v in same.values())
    assert all(other[k] <= 1 for k in other) and other["components cosine"] < 0.999
    with pytest.raises(ValueError, match="has no neurons"):
        slaq.similarities(a, slaq.ablation(llama, IDS, ANSWER))


# --- prediction ----------------------------------------------------------------------------------------------


def made_up(pairs: int, strength: float, seed: int = 0):
    rng = np.random.default_rng(seed)
    aligned = rng.random((pairs, 3)) < 0.6
    features = rng.normal(size=(pairs, 3, 4))
    features[..., 0] += strength * aligned
    return features, aligned


def test_a_feature_that_tells_alignment_is_found_and_noise_is_not():
    settings = {"shuffles": 19, "protocol": Protocol(times=50)}
    real = slaq.predict_alignment(*made_up(40, 3.0), **settings)
    assert real.auc.low > 0.85 and real.above.low > 0.2 and real.p == pytest.approx(1 / 20)
    noise = slaq.predict_alignment(*made_up(40, 0.0), **settings)
    assert noise.above.low < 0 and noise.p > 0.05
    assert abs(real.shuffled - 0.5) < 0.1


def test_a_feature_that_only_names_the_pair_predicts_nothing():
    features, aligned = made_up(40, 0.0)
    aligned[:20], aligned[20:] = True, False
    features = np.repeat(np.eye(40)[:, None], 3, axis=1)  # one-hot of the pair: useless on other pairs
    found = slaq.predict_alignment(features, aligned, shuffles=5, protocol=Protocol(times=50))
    assert found.auc.mean < 0.6


def test_too_few_pairs_and_wrong_shapes_are_refused():
    features, aligned = made_up(3, 1.0)
    with pytest.raises(TooFewProblemsError, match="3 pairs, 5 folds"):
        slaq.predict_alignment(features, aligned)
    with pytest.raises(ValueError, match=r"expected \[pairs, facts, features\]"):
        slaq.predict_alignment(features[:, :2], aligned)


# --- position and momentum -----------------------------------------------------------------------------------


def test_a_fall_is_the_slope_of_the_line_through_all_positions():
    long = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 1]], bool)
    short = np.ones_like(long)
    found = slaq_positions.position_effect(short, long)
    slopes = [np.polyfit(range(4), row.astype(float), 1)[0] for row in long]
    assert found["long"].mean == pytest.approx(-3 * np.mean(slopes)) == found["long - short"].mean
    assert found["short"].mean == pytest.approx(0)


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=3))
def test_momentum_is_what_one_counts_and_chance_its_counts_over_all_orders_if_positions_are_alike(few):
    rows = [list(row[i:] + row[:i]) for row in few for i in range(4)]  # every position has as many right parts

    def difference(answers) -> float | None:
        after = {True: [], False: []}
        for row in answers:
            for one, two in pairwise(row):
                after[one].append(two)
        return np.mean(after[True]) - np.mean(after[False]) if after[True] and after[False] else None

    found = slaq_positions.momentum(np.array(rows))
    assert found["momentum"].mean == pytest.approx(difference(rows) or 0.0)
    everything = [order for row in rows for order in permutations(row)]
    assert found["chance"].mean == pytest.approx(difference(everything) or 0.0)
    assert found["momentum - chance"].mean == pytest.approx(found["momentum"].mean - found["chance"].mean)


def test_streaks_have_momentum_beyond_chance_and_easy_pairs_alone_have_none():
    rng = np.random.default_rng(0)
    easy = rng.random((400, 5)) < rng.choice([0.2, 0.9], size=(400, 1))  # parts of a pair are independent
    found = slaq_positions.momentum(easy)
    assert found["momentum"].low > 0.2 and found["momentum - chance"].low < 0 < found["momentum - chance"].high
    streaks = rng.random((400, 5)) < 0.5
    for t in range(1, 5):
        keep = rng.random(400) < 0.6
        streaks[keep, t] = streaks[keep, t - 1]
    assert slaq_positions.momentum(streaks)["momentum - chance"].low > 0.1 and slaq_positions.momentum_p(streaks) < 0.001


@pytest.mark.parametrize("fall", [[0.9, 0.6, 0.3, 0.1], [0.1, 0.9, 0.2, 0.8]])
def test_positions_that_are_easier_than_others_alone_have_no_momentum_beyond_chance(fall):
    answers = np.random.default_rng(1).random((400, 4)) < np.array(fall)  # independent
    found = slaq_positions.momentum(answers)["momentum - chance"]
    assert found.low < 0 < found.high and 0.05 < slaq_positions.momentum_p(answers) < 0.95


def test_weights_of_positions_give_the_observed_right_parts_and_keep_those_of_each_answer():
    answers = np.random.default_rng(2).random((60, 5)) < [0.9, 0.7, 0.5, 0.3, 0.2]
    patterns, given = slaq_positions.pattern_probabilities(answers)
    totals = answers.sum(axis=1)
    assert given.sum(axis=1) == pytest.approx(1) and (given @ patterns).sum(axis=1) == pytest.approx(np.arange(6))
    assert (given[totals] @ patterns).sum(axis=0) == pytest.approx(answers.sum(axis=0), abs=1e-3)


def test_flags_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="expected the same"):
        slaq_positions.position_effect(np.ones((3, 2), bool), np.ones((3, 3), bool))
    with pytest.raises(ValueError, match="2 facts or more"):
        slaq_positions.momentum(np.ones((3, 1), bool))
