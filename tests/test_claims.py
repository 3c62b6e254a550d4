"""Verdicts and power follow from the interval, the seeds and the smallest effect that matters."""

from __future__ import annotations

import math

import pytest

from toolkit import claims
from toolkit.claims import Claim
from toolkit.stats import Effect, Estimate


def claim_of(estimate: Estimate, unit: str = "tokens", smallest: float = 2.0) -> Claim:
    return Claim(text="longer", source="a paper", estimate=estimate, smallest=smallest, unit=unit)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.1, 9.0, "reproduced"),
        (-1.0, 1.9, "not reproduced"),
        (-1.9, -1.0, "not reproduced"),
        (-9.0, -1.0, "contradicted"),
        (-1.0, 2.1, "undecided"),
        (0.1, 1.9, "real but too small to matter"),
    ],
)
def test_a_verdict_follows_from_the_interval_and_the_smallest_effect_that_matters(low, high, verdict):
    claim = claim_of(Estimate((low + high) / 2, low, high))
    assert claim.verdict == verdict
    standard_error = (high - low) / (2 * 1.96)
    assert float(claim.row[-1]) == pytest.approx(2.8 * standard_error, abs=0.06)


def test_too_few_seeds_are_not_judged_and_what_does_not_vary_or_lies_outside_its_interval_is_undecided():
    assert claim_of(Effect(5.0, 4.0, 6.0, math.nan, "2 seeds")).verdict == "not judged: 2 seeds"
    assert claim_of(Effect(5.0, 5.0, 5.0, 0.1, "no variance")).verdict == "undecided"
    assert claim_of(Effect(math.nan, math.nan, math.nan, math.nan)).verdict == "undecided"
    assert claim_of(Estimate(1.0, 3.0, 5.0)).verdict == claim_of(Estimate(-1.0, -5.0, -3.0)).verdict == "undecided", "outside"
    assert claim_of(Estimate(5.0, 5.0, 5.0)).row[-1] == "unknown"


def test_a_row_is_in_the_claims_unit():
    assert claim_of(Estimate(0.05, -0.01, 0.11), "points", 0.03).row[2] == "+5.0 [-1.0, +11.0] points"
    assert claim_of(Estimate(-0.05, -0.07, -0.04), "nats", 0.1).row[2] == "-0.05 [-0.07, -0.04] nats"
    assert claims.verdict_table([claim_of(Estimate(3.0, 1.0, 5.0))]).loc["longer", "verdict"] == "reproduced"
    assert claims.json_records([claim_of(Effect(math.nan, math.nan, math.nan, math.nan))])[0]["estimate"] is None


@pytest.mark.parametrize(
    ("mean", "low", "high", "verdict"),
    [(-0.02, -0.02, 0.01, "reproduced"), (-0.02, -0.05, 0.01, "undecided"), (-0.2, -0.3, -0.1, "contradicted")],
)
def test_a_claim_to_lose_little_is_judged_at_its_limit_and_shows_the_measured_change(mean, low, high, verdict):
    claim = Claim(text="", source="", estimate=Estimate(mean, low, high), smallest=0.0, unit="points", beyond=-0.03)
    assert claim.verdict == verdict and claim.row[2].startswith(f"{100 * mean:.1f} [")
