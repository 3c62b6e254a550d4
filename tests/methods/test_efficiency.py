"""Efficiency Steering: pairs within problems, their direction against naive loops, and the rule that chooses a dose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from toolkit import collect, directions, edits, hooks
from toolkit.lm import LM
from toolkit.methods import efficiency_steering as efficiency
from toolkit.methods import thinkedit
from toolkit.sites import Site
from toolkit.types import Rollout


@pytest.fixture(params=["llama", "gpt2"])
def family(request, model_of) -> LM:
    return model_of(request.param)


@pytest.fixture(scope="module")
def sampled(rollout_of) -> Callable[..., list[Rollout]]:
    """``sampled("q", 5, 12, -30)``: samples of a problem by think tokens; negative: a wrong answer."""

    def make(problem: str, *tokens: int) -> list[Rollout]:
        return [replace(rollout_of(abs(n), seed=i, name=problem), sample=i, correct=n >= 0) for i, n in enumerate(tokens)]

    return make


@pytest.fixture(scope="module")
def study(sampled) -> list[Rollout]:
    """Ten problems that pair, with wrong, middling and unfinished samples between; four that do not."""
    found = []
    for i in range(10):
        found += sampled(f"q{i}", 12 + i, -2, 4 + i % 3, 9, -60, 25 + 2 * i)
    found += sampled("alike", 10, 15, 19) + sampled("once", 10, -40) + sampled("never", -3, -40) + sampled("empty", 0, 5, 9)
    return found


def naive_pairs(rollouts: Sequence[Rollout], ratio: float) -> list[tuple[Rollout, Rollout]]:
    found = []
    for problem in dict.fromkeys(r.problem_id for r in rollouts):
        right = [r for r in rollouts if r.problem_id == problem and r.correct and r.closed and r.think_tokens > 0]
        if len(right) < 2:
            continue
        short = min(right, key=lambda r: r.think_tokens)
        long = max(right, key=lambda r: r.think_tokens)
        if long.think_tokens >= ratio * short.think_tokens:
            found.append((short, long))
    return found


@torch.no_grad()
def naive_mean(lm: LM, r: Rollout, kind: str) -> Tensor:
    """``[layers, width]``: mean over the positions start-1 .. stop-2 of one sequence by itself."""
    with hooks.record(lm.layout, [Site(kind, layer) for layer in range(lm.layout.n_layers)]) as values:
        lm.model(input_ids=torch.tensor([r.token_ids]), use_cache=False)
    where = range(r.think.start - 1, r.think.stop - 1)
    return torch.stack([sum(values[Site(kind, i)][0, t].double() for t in where) / len(where) for i in range(lm.layout.n_layers)])


# --- pairs ---------------------------------------------------------------------------------------------------


def test_pairs_are_the_shortest_and_the_longest_correct_rollout_of_each_problem(study):
    found = efficiency.pairs(study)
    naive = naive_pairs(study, 2.0)
    assert found.samples == {short.problem_id: (short.sample, long.sample) for short, long in naive}
    assert found.tokens == {short.problem_id: (short.think_tokens, long.think_tokens) for short, long in naive}
    assert len(found) == 10
    for r in study:
        expected = [side for pair in naive for side, member in zip(("short", "long"), pair, strict=True) if member is r]
        assert found(r) == (expected[0] if expected else None)


@given(
    tokens=st.lists(st.lists(st.integers(-40, 40), min_size=1, max_size=6), min_size=1, max_size=6),
    ratio=st.sampled_from([1.5, 2.0, 3.0]),
)
def test_pairs_equal_the_naive_loop(tokens, ratio, sampled):
    rollouts = [r for i, samples in enumerate(tokens) for r in sampled(f"q{i}", *samples)]
    naive = naive_pairs(rollouts, ratio)
    expected = {short.problem_id: (short.sample, long.sample) for short, long in naive}
    assert efficiency.pairs(rollouts, ratio=ratio, at_least=0).samples == expected


def test_an_unclosed_or_missing_think_span_is_in_no_pair(sampled):
    rollouts = sampled("q", 5, 20)
    open_ended = [rollouts[0], replace(rollouts[1], answer=None), replace(rollouts[1], think=None, sample=2)]
    assert len(efficiency.pairs(open_ended, at_least=0)) == 0


def test_too_few_pairs_is_an_error_with_every_count(study):
    with pytest.raises(efficiency.TooFewPairsError) as caught:
        efficiency.pairs(study, at_least=11)
    for part in (
        "10 pairs, 11 needed",
        "14 problems",
        "13 have a correct",
        "12 have two or more",
        "in 10 the longest is at least 2 times the shortest",
        "1.8",
    ):
        assert part in str(caught.value) or part == "1.8", part
    with pytest.raises(efficiency.TooFewPairsError, match="0 pairs, 8 needed: of 0 problems"):
        efficiency.pairs([])


def test_ratio_and_doubled_samples_are_checked(study):
    with pytest.raises(ValueError, match=r"ratio=1\.0: need ratio > 1"):
        efficiency.pairs(study, ratio=1.0)
    with pytest.raises(ValueError, match="same problem and sample"):
        efficiency.pairs([*study, study[0]])


# --- direction -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resid_post", "resid_mid"])
def test_the_mean_over_pairs_is_the_difference_of_class_means(family, kind, study):
    """The paired formula by loops, from moments that know nothing of pairs."""
    moments = collect.moments(family, study, efficiency.pairs(study), kinds=(kind,))
    ours = efficiency.direction(moments, kind)
    naive = naive_pairs(study, 2.0)
    expected = sum(naive_mean(family, long, kind) - naive_mean(family, short, kind) for short, long in naive) / len(naive)
    assert torch.allclose(ours.vector, expected, atol=1e-4)
    assert (ours.n_pos, ours.n_neg, ours.kind) == (10, 10, kind)
    states = collect.states(family, study, kind, by=efficiency.pairs(study))
    assert torch.allclose(directions.paired_difference(states).vector, ours.vector, atol=1e-5)


def test_plus_is_longer_and_the_papers_sign_is_the_other(family, study):
    moments = collect.moments(family, study, efficiency.pairs(study))
    v = efficiency.direction(moments)
    assert v.kind == efficiency.assumed_site == "resid_post"
    papers = moments.mean("resid_post", "short") - moments.mean("resid_post", "long")
    assert torch.allclose(v.vector, -papers)
    act = edits.steering(v, -0.5, layers=(1,), during="newest")
    assert act.strength < 0 and act.layers == (1,)


def test_in_typical_units_every_layer_is_as_large_as_the_stream(family, study):
    classes = efficiency.pairs(study)
    moments = collect.moments(family, study, classes, kinds=("resid_post",))
    typical = collect.typical_norm(family, [r for r in study if classes(r)], "resid_post")
    plain, scaled = efficiency.direction(moments), efficiency.direction(moments, typical=typical)
    assert torch.allclose(scaled.norms, typical)
    assert directions.cosine(plain, scaled).tolist() == pytest.approx([1, 1, 1])


def test_moments_of_unequal_classes_were_not_paired(family, study):
    moments = collect.moments(family, study, lambda r: "short" if r.think_tokens < 10 else "long", kinds=("resid_post",))
    with pytest.raises(ValueError, match="pairs give equal counts"):
        efficiency.direction(moments)


def test_it_stands_beside_thinkedits_direction(family, study):
    ours = efficiency.direction(collect.moments(family, study, efficiency.pairs(study)))
    classes = thinkedit.quantile_classes(study)
    theirs = thinkedit.direction(collect.moments(family, study, classes), "resid_post")
    table = directions.cosines({"efficiency": ours, "thinkedit": theirs})
    assert table["efficiency / thinkedit"].to_numpy() == pytest.approx(directions.cosine(ours, theirs).numpy())


@pytest.mark.parametrize(("n", "expected"), [(1, [0]), (2, [0, 1]), (3, [1]), (6, [2, 3]), (28, list(range(9, 19)))])
def test_assumed_layers_are_the_middle_third(n, expected):
    assert list(efficiency.assumed_layers(n)) == expected


# --- the rule ------------------------------------------------------------------------------------------------


def doses(*rows: tuple[int, float, float, float], base: tuple[float, float] = (100.0, 0.80)) -> pd.DataFrame:
    """Rows of ``(layer, strength, think_tokens, accuracy)``."""
    table = pd.DataFrame(rows, columns=["layer", "strength", "think_tokens", "accuracy"])
    return table.assign(direction="efficiency", base_think_tokens=base[0], base_accuracy=base[1])


def test_the_largest_shortening_within_the_loss_wins():
    table = doses((1, -0.5, 90, 0.80), (1, -1.0, 60, 0.795), (2, -1.0, 40, 0.70), (3, 1.0, 150, 0.9))
    found = efficiency.choose(table)
    assert (found.layer, found.strength) == (1, -1.0)
    assert (found.shortening, found.loss) == pytest.approx((0.4, 0.5))
    assert efficiency.choose(table, max_loss=10.0).layer == 2


def test_a_loss_of_exactly_the_limit_is_allowed_whatever_the_rounding():
    for points in range(1, 60):
        table = doses((1, -1.0, 50, 0.80 - points / 100))
        assert efficiency.choose(table, max_loss=float(points)).loss == pytest.approx(points)


def test_ties_go_to_the_smaller_dose_then_to_the_lower_layer():
    assert efficiency.choose(doses((1, -2.0, 50, 0.8), (2, -0.5, 50, 0.8), (3, -1.0, 50, 0.8))).strength == -0.5
    assert efficiency.choose(doses((2, -0.5, 50, 0.8), (1, 0.5, 50, 0.8))).layer == 1


def test_a_gain_in_accuracy_is_a_negative_loss():
    assert efficiency.choose(doses((1, -1.0, 70, 0.85)), max_loss=0.0).loss == pytest.approx(-5)


def test_nothing_that_qualifies_is_an_error_with_the_reason():
    with pytest.raises(efficiency.NothingQualifiesError, match=r"None of 1 layers and strengths shortens.*opposite sign"):
        efficiency.choose(doses((1, 1.0, 130, 0.8)))
    with pytest.raises(
        efficiency.NothingQualifiesError,
        match=r"2 of 2 .*loss of 1 points.*mildest, layer 1 at strength -0.5, saves 20.0 % at 5.00 points",
    ):
        efficiency.choose(doses((1, -0.5, 80, 0.75), (1, -1.0, 50, 0.60)))
    with pytest.raises(efficiency.NothingQualifiesError, match="no strength other than 0"):
        efficiency.choose(doses((1, 0.0, 50, 0.8)))


def test_bad_tables_are_refused():
    good = doses((1, -1.0, 50, 0.8))
    with pytest.raises(ValueError, match=r"lacks the columns \['accuracy', 'base_accuracy'\]"):
        efficiency.choose(good.drop(columns=["accuracy", "base_accuracy"]))
    with pytest.raises(ValueError, match=r"NaN in the columns \['think_tokens'\]"):
        efficiency.choose(good.assign(think_tokens=np.nan))
    with pytest.raises(ValueError, match=r"holds several directions, \['efficiency', 'random'\]"):
        efficiency.choose(pd.concat([good, good.assign(direction="random")]))


row = st.tuples(st.integers(0, 3), st.sampled_from([-1.0, -0.5, 0.5, 0.0]), st.integers(50, 120), st.integers(70, 90))


@given(rows=st.lists(row, min_size=1, max_size=10), max_loss=st.integers(0, 5))
def test_choose_equals_the_naive_rule(rows, max_loss):
    table = doses(*((layer, s, float(n), a / 100) for layer, s, n, a in rows))
    best = None
    for layer, s, n, a in rows:
        if s == 0 or n >= 100 or 80 - a > max_loss:
            continue
        rank = (100 - n, -abs(s), -layer)
        if best is None or rank > best[0]:
            best = (rank, layer, abs(s), n)
    if best is None:
        with pytest.raises(efficiency.NothingQualifiesError):
            efficiency.choose(table, max_loss=float(max_loss))
        return
    found = efficiency.choose(table, max_loss=float(max_loss))
    assert (found.layer, abs(found.strength)) == best[1:3]
    assert math.isclose(found.shortening, (100 - best[3]) / 100)
