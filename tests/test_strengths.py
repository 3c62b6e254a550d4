"""Default steering strengths: sized by the relative dose, tried on a handful of prompts, never beyond the first damage."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from toolkit import collect, doses, strengths, tasks
from toolkit.generate import Sampling
from toolkit.lm import LM
from toolkit.steering import Steering, steering
from toolkit.types import Direction


@pytest.fixture
def v(tiny: LM) -> Direction:
    vector = 3.0 * torch.randn(tiny.layout.n_layers, tiny.layout.d_model, generator=torch.Generator().manual_seed(0))
    return Direction(vector, "resid_post", "think", "by hand", 1, 1, tiny.provenance())


def test_a_strength_has_the_total_dose_that_was_asked_for(v):
    typical = torch.tensor([5.0, 10.0, 20.0, 40.0], dtype=torch.float64)
    for layers in (None, (1, 3)):
        a = strengths.strength_of(lambda s, at=layers: steering(v, s, layers=at), 0.3, typical)
        naive = sum(a * v.vector[layer].norm().item() / typical[layer].item() for layer in layers or range(4))
        assert naive == pytest.approx(0.3, rel=1e-5)


def test_the_same_dose_on_fewer_layers_or_a_shorter_vector_needs_a_greater_strength(v):
    typical = torch.full((4,), 10.0, dtype=torch.float64)
    everywhere = strengths.strength_of(lambda s: steering(v, s), 0.3, typical)
    assert strengths.strength_of(lambda s: steering(v, s, layers=(2,)), 0.3, typical) > 2 * everywhere
    half = Direction(v.vector / 2, v.kind, v.positions, "half", 1, 1, v.provenance)
    assert strengths.strength_of(lambda s: steering(half, s), 0.3, typical) == pytest.approx(2 * everywhere)


def test_without_responses_that_close_no_usable_range_is_claimed(tiny, v):
    problems = tasks.arithmetic.load("dev", 3)
    with pytest.raises(ValueError, match=r"closes its thinking in 0% of 3 responses of at most 3 tokens.*--max-new-tokens"):
        strengths.fit(tiny, lambda a: steering(v, a), problems, Sampling(n=1, max_new_tokens=3))


def test_a_direction_of_zeros_has_no_strength(v):
    with pytest.raises(ValueError, match="zero in every steered layer"):
        nothing = Direction(torch.zeros_like(v.vector), v.kind, v.positions, "zero", 1, 1, v.provenance)
        strengths.strength_of(lambda s: steering(nothing, s), 0.3, torch.ones(4, dtype=torch.float64))


@pytest.fixture(scope="module")
def fitted(tiny: LM) -> tuple[strengths.Fit, list[float]]:
    """Strengths along a random direction, and those that were tried, in order."""
    vector = 3.0 * torch.randn(tiny.layout.n_layers, tiny.layout.d_model, generator=torch.Generator().manual_seed(0))
    v, tried = Direction(vector, "resid_post", "think", "by hand", 1, 1, tiny.provenance()), []

    def act(strength: float) -> Steering:
        tried.append(strength)
        return steering(v, strength)

    return strengths.fit(tiny, act, tasks.load("arithmetic", "dev", 3), Sampling(1, 0.0, max_new_tokens=80)), tried


def test_each_side_is_tried_outwards_and_ends_at_the_first_damage(fitted):
    fit, _ = fitted
    assert fit.table.index.is_monotonic_increasing and fit.table.loc[0.0, "total_dose"] == 0
    for side in (fit.table[fit.table.index < 0][::-1], fit.table[fit.table.index > 0]):
        assert side["intact"][:-1].all()
        assert not side["intact"].iloc[-1] or len(side) == len(strengths.assumed_totals)
        assert side["total_dose"].tolist() == pytest.approx(strengths.assumed_totals[: len(side)], rel=0.06)  # two digits


def test_what_is_shown_first_is_usable(fitted):
    fit, _ = fitted
    low, high = fit.usable
    assert 0.0 in fit.shown and len(fit.shown) >= 1
    assert all(low <= a <= high and fit.table.loc[a, "intact"] for a in fit.shown)


def made(rows: dict[float, tuple[float, bool]]) -> strengths.Fit:
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["length", "intact"]).sort_index()
    return strengths.Fit(table, 8, 4)


def test_the_strongest_change_before_damage_is_chosen():
    fit = made(
        {-2.0: (1.0, False), -1.0: (14.0, True), -0.5: (20.0, True), 0.0: (24.0, True), 0.5: (28.0, True), 1.0: (26.0, True)}
    )
    assert (fit.usable, fit.shown) == ((-1.0, 1.0), (-1.0, 0.0, 0.5))
    assert str(fit).startswith("usable -1 to +1") and "14 at -1, 24 without, 28 at +0.5" in str(fit)


def test_a_strength_beyond_damage_is_not_shown_even_if_it_looks_intact():
    fit = made(
        {-2.0: (1.0, True), -1.0: (9.0, False), -0.5: (20.0, True), 0.0: (24.0, True), 0.5: (90.0, False), 1.0: (30.0, True)}
    )
    assert fit.usable == (-0.5, 0.0) and fit.shown == (-0.5, 0.0)


def test_a_length_that_does_not_move_is_said():
    fit = made({-1.0: (24.0, True), 0.0: (24.0, True), 1.0: (24.0, True)})
    assert fit.shown == (-1.0, 0.0, 1.0) and "no usable strength shortens or lengthens them" in str(fit)


def test_a_curve_goes_a_little_beyond_the_usable_range():
    fit = made({-1.0: (1.0, False), -0.4: (20.0, True), 0.0: (24.0, True), 0.8: (28.0, True)})
    assert len(fit.grid) == 9 and fit.grid[0] == pytest.approx(-0.6) and fit.grid[-1] == pytest.approx(1.2)
    none = made({-0.4: (20.0, False), 0.0: (24.0, True), 0.8: (28.0, False)})
    assert none.grid[0] == pytest.approx(-0.6) and none.usable == (0.0, 0.0)


def test_typical_norms_are_those_of_thinking(tiny, v):
    problems = tasks.load("arithmetic", "dev", 2)
    base = strengths._sampled(tiny, None, problems, Sampling(1, 0.0, max_new_tokens=60), None)
    assert torch.equal(doses.typical_norms(tiny, base, "resid_post"), collect.typical_norm(tiny, base, "resid_post"))


def test_damage_is_fewer_closed_or_more_looping_responses():
    base = {"closed": 0.9, "looping": 0.1}
    assert doses.is_intact({"closed": 0.86, "looping": 0.14}, base)
    assert not doses.is_intact({"closed": 0.84, "looping": 0.1}, base)
    assert not doses.is_intact({"closed": 0.9, "looping": 0.16}, base)
