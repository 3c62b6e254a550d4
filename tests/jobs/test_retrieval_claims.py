"""The five properties of retrieval heads as claims: made-up scores that have a property, or lack it, get the verdict that says so."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, permutations

import numpy as np
import pytest
from numpy.random import Generator

from toolkit.claims import Claim
from toolkit.jobs import retrieval
from toolkit.jobs.retrieval_claims import (
    CopyScores,
    causal,
    copy_scores,
    dynamic,
    held_out,
    intrinsic,
    sparse,
    top,
    universal,
)
from toolkit.methods import retrieval_heads

LAYERS = np.repeat(np.arange(5), 16)  # 80 heads
N = 24


def model(strong: dict[int, float], *, noise: float = 0.0, seed: int = 0, kinds=("one", "two")) -> CopyScores:
    """Scores in which the given heads copy with this probability, and all others with the probability ``noise``."""
    rng = np.random.default_rng(seed)
    chance = np.full(80, noise)
    chance[list(strong)] = list(strong.values())
    return CopyScores("M", (rng.random((N, 80)) < chance).astype(float), LAYERS, tuple(np.resize(kinds, N)))


def verdicts(claims) -> list[str]:
    return [claim.verdict for claim in claims]


def test_a_strong_head_is_universal_and_heads_that_copy_by_chance_are_not():
    assert verdicts(universal(model({3: 0.8}))) == ["reproduced", "reproduced"]
    weak = universal(model({}, noise=0.03))
    assert weak[0].verdict != "reproduced" and weak[1].verdict != "reproduced"
    assert weak[1].estimate.mean < 0.1, "held out: the best of 80 heads is no better than the others"


def test_a_selected_head_is_judged_on_the_other_half():
    copy = np.zeros((4, 3))
    copy[0::2, 0], copy[1::2, 1] = 1.0, 1.0  # each half has a head of its own
    assert held_out(copy, top(1)).tolist() == [[False, True, False], [True, False, False]] * 2
    assert universal(CopyScores("M", copy, np.zeros(3, int), ("",) * 4))[0].estimate.mean == 0


def test_the_share_of_retrieval_heads_is_counted_and_compared_with_5_percent():
    # A weak head is above 0.1 in some resamples only: without any variation, no verdict is given.
    few, many = model({3: 0.8}), model(dict.fromkeys(range(8), 0.8))
    few.copy[:2, 9] = many.copy[:2, 9] = 1.0
    for scores, verdict in ((few, "reproduced"), (many, "contradicted")):
        share = sum(np.mean(column) > 0.1 for column in scores.copy.T) / 80
        assert sparse(scores)[0].estimate.mean == pytest.approx(-share) and sparse(scores)[0].verdict == verdict
    # The top 4 of 8 equally strong heads do half of the copying.
    assert sparse(few)[1].estimate.mean == pytest.approx(1 - 4 / 80)
    assert sparse(many)[1].estimate.mean == pytest.approx(0.5 - 4 / 80, abs=0.1)
    assert sparse(model({}))[1].estimate.mean == 0, "nothing is copied"


def test_correlation_with_a_derived_model_is_pearsons_over_pairs_of_different_examples_and_the_control_its_mean_over_shuffles():
    rng = np.random.default_rng(1)
    layers, own = np.array([0, 0, 0, 1, 1]), np.array([0.1, 0.5, 0.3, 0.9, 0.2])
    a, b = (CopyScores(name, own[order] + 0.1 * rng.random((6, 5)), layers, ("",) * 6) for name, order in zip("ab", ([0, 1, 2, 3, 4], [1, 0, 2, 3, 4]), strict=True))  # fmt: skip

    def covariance(x, y):
        """Covariance over heads of the scores in example i with those in example j, mean over all pairs i != j."""
        return np.mean([np.cov(x[i], y[j], ddof=0)[0, 1] for i, j in permutations(range(6), 2)])

    def correlation(x, y):
        return covariance(x, y) / np.sqrt(covariance(x, x) * covariance(y, y))

    real, above = intrinsic(a, b)
    assert real.estimate.mean == pytest.approx(correlation(a.copy, b.copy))
    shuffles = [[*p, *q] for p in permutations(range(3)) for q in permutations(range(3, 5))]
    control = np.mean([correlation(a.copy, b.copy[:, order]) for order in shuffles])
    assert above.estimate.mean == pytest.approx(real.estimate.mean - control)
    same = (CopyScores(s.name, np.tile(s.copy[:1], (6, 1)), layers, s.kinds) for s in (a, b))  # no noise: Pearson's correlation
    assert intrinsic(*same)[0].estimate.mean == pytest.approx(np.corrcoef(a.copy[0], b.copy[0])[0, 1])


def covered(truth: float, made: Callable[[Generator], Claim], times: int) -> float:
    """Share of simulated claims whose interval holds the truth and the estimate."""
    rng = np.random.default_rng(0)
    estimates = [made(rng).estimate for _ in range(times)]
    return float(np.mean([e.low - 1e-12 <= truth <= e.high + 1e-12 and e.low - 1e-12 <= e.mean <= e.high + 1e-12 for e in estimates]))  # fmt: skip


def drawn(rng: Generator, chances: np.ndarray, n: int) -> CopyScores:
    return CopyScores("M", (rng.random((n, len(chances))) < chances) * 1.0, np.zeros(len(chances), int), ("",) * n)


def test_the_interval_of_a_correlation_covers_that_of_the_expected_scores():
    """100 heads of which most copy rarely, 20 examples; a percentile interval of the correlation of measured means never covers."""
    a = np.array([0.8, 0.5, 0.3, *[0.1] * 17, *[0.02] * 80])
    b = np.array([0.7, 0.6, 0.25, *[0.08] * 17, *[0.03] * 80])
    truth = np.corrcoef(a, b)[0, 1]
    assert covered(truth, lambda rng: intrinsic(drawn(rng, a, 20), drawn(rng, b, 20))[0], 40) >= 0.85


@pytest.mark.parametrize(
    "chances", [[*[0.5] * 3, *[0.07] * 17, *[0.0] * 80], [*[0.15] * 10, *[0.05] * 10, *[0.01] * 80]], ids=["below", "above"]
)
def test_the_interval_of_a_share_of_heads_covers_although_many_heads_are_near_the_threshold(chances):
    """40 examples; a percentile interval covers in 22 % if many heads are a little below the threshold."""
    chances = np.array(chances)
    assert covered(-(chances > 0.1).mean(), lambda rng: sparse(drawn(rng, chances, 40))[0], 60) >= 0.85


def test_the_same_heads_are_intrinsic_and_other_heads_are_not():
    strong = {3: 0.9, 20: 0.6}
    assert verdicts(intrinsic(model(strong), model(strong, seed=1))) == ["reproduced", "reproduced"]
    assert intrinsic(model(strong), model({7: 0.9, 33: 0.6}, seed=1))[0].verdict == "contradicted"
    with pytest.raises(ValueError, match="same heads"):
        intrinsic(model(strong), CopyScores("other", np.zeros((N, 8)), np.zeros(8, int), ("",) * N))


def test_heads_that_are_active_by_kind_are_dynamic_and_always_active_ones_are_not():
    kinds = tuple("ab"[i // 2 % 2] for i in range(N))  # both kinds are in both halves (examples of even and of odd index)
    by_kind = np.zeros((N, 80))
    by_kind[:, 0] = 1.0
    for i, kind in enumerate(kinds):
        by_kind[i, 5 if kind == "a" else 6] = 1.0
    found = dynamic(CopyScores("M", by_kind, LAYERS, kinds))
    means = [claim.estimate.mean for claim in found]
    # Head 0 is always active, one of the 79 others is, one of three retrieval heads is silent; sets are equal or share 1 of 3 heads.
    assert means == pytest.approx([1.0, 1 - 1 / 79, 1 / 3, 1 - 1 / 3])
    always = dynamic(model({0: 1.0, 1: 1.0}))
    assert always[2].estimate.mean == 0 and always[3].estimate.mean == 0


def test_overlap_by_kind_is_the_mean_over_pairs_of_examples():
    scores = model({0: 0.9, 1: 0.5, 2: 0.5, 3: 0.5}, kinds=("a", "a", "b"))
    retrieval_head = scores.copy.mean(axis=0) > 0.1
    sets = [set(np.flatnonzero(row)) for row in scores.copy[:, retrieval_head] > 0]
    same, different = [], []
    for i, j in combinations(range(N), 2):
        union = sets[i] | sets[j]
        (same if scores.kinds[i] == scores.kinds[j] else different).append(len(sets[i] & sets[j]) / len(union) if union else 1.0)
    assert dynamic(scores)[3].estimate.mean == pytest.approx(np.mean(same) - np.mean(different))


def test_without_two_retrieval_heads_only_the_most_active_head_is_judged():
    assert len(dynamic(model({3: 0.8}))) == 2


def test_causal_claims_are_the_numbers_of_the_masking_table_and_need_controls():
    row = {"lost": 0.5, "lost_low": 0.3, "lost_high": 0.7, "more_than_random": None}
    assert verdicts(causal("M", row)) == ["reproduced"]
    row |= {"more_than_random": -0.4, "more_than_random_low": -0.5, "more_than_random_high": -0.3, "draws": 3}
    assert verdicts(causal("M", row)) == ["reproduced", "contradicted"]
    assert verdicts(causal("M", row | {"draws": 2})) == ["reproduced", "not judged: 2 seeds"]
    assert verdicts(causal("M", row | {"draws": 1})) == ["reproduced", "not judged: 1 seed"]


def test_too_few_examples_and_scores_without_a_layer_are_refused():
    with pytest.raises(ValueError, match="at least 4 examples"):
        CopyScores("M", np.zeros((3, 2)), np.zeros(2, int), ("",) * 3)
    with pytest.raises(ValueError, match="one layer per head"):
        CopyScores("M", np.zeros((5, 2)), np.zeros(3, int), ("",) * 5)


def test_measured_scores_become_copy_scores(tiny):
    search = retrieval.Search(instances=4, counts=(1,), draws=1, max_new_tokens=20)
    measurement = retrieval.measure_retrieval(tiny, search)
    metrics = measurement.measured["copy, as published"]
    scores = copy_scores("tiny", metrics, ["kind"] * 4)
    assert scores.copy.shape == (4, 32) and scores.layers.tolist() == sorted([*range(4)] * 8)
    assert scores.copy.mean(axis=0) == pytest.approx(retrieval_heads.scores(metrics).score.flatten().numpy())
