"""Statistics against simulations and naive loops."""

from __future__ import annotations

import math
from dataclasses import astuple
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import ttest_1samp

from toolkit import stats

small = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)
lengths_of = hnp.arrays(float, small, elements=st.integers(0, 6).map(float))


def study(rng, problems: int, samples: int, effect: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Two conditions on the same problems: problems differ much, the conditions by ``effect``; 0/1 outcomes."""
    difficulty = rng.normal(0, 1.5, (problems, 1))
    a, b = (rng.random((problems, samples)) < 1 / (1 + np.exp(-difficulty - shift)) for shift in (effect, 0.0))
    return a.astype(float), b.astype(float)


# --- bootstrap -----------------------------------------------------------------------------------------------


def test_a_95_percent_interval_covers_the_truth_in_about_95_percent_of_studies():
    """400 simulated studies of 60 problems with 4 samples; the binomial deviation of the share is 1.1 points."""
    rng = np.random.default_rng(0)
    truth = study(rng, 200_000, 1)[0].mean()
    covered = []
    for i in range(400):
        a, _ = study(rng, 60, 4)
        found = stats.bootstrap(stats.mean_of(a), 60, seed=i, times=600)
        covered.append(found.low <= truth <= found.high)
    assert 0.91 <= np.mean(covered) <= 0.975


def test_samples_of_a_problem_are_not_counted_as_independent():
    """Ten copies of one sample say no more than the sample: the interval stays as wide."""
    a, _ = study(np.random.default_rng(1), 80, 1)
    once = stats.bootstrap(stats.mean_of(a), 80)
    copied = stats.bootstrap(stats.mean_of(np.repeat(a, 10, axis=1)), 80)
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))


def test_a_paired_difference_is_narrower_than_an_unpaired_one_and_as_right():
    rng = np.random.default_rng(2)
    a, b = study(rng, 150, 8, effect=0.5)
    paired = stats.bootstrap(stats.difference(stats.mean_of(a), stats.mean_of(b)), 150)
    first, second = stats.resamples(150, seed=0), stats.resamples(150, seed=1)
    apart = stats.mean_of(a)(first) - stats.mean_of(b)(second)
    low, high = np.quantile(apart, [0.025, 0.975])
    assert paired.high - paired.low < 0.6 * (high - low)
    assert paired.mean == pytest.approx(a.mean() - b.mean())
    assert paired.excludes_zero


def test_a_condition_against_itself_differs_by_exactly_nothing():
    a, _ = study(np.random.default_rng(3), 30, 4)
    found = stats.bootstrap(stats.difference(stats.mean_of(a), stats.mean_of(a)), 30)
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert not found.excludes_zero


def test_the_centre_is_the_statistic_of_the_sample_itself():
    a, _ = study(np.random.default_rng(4), 25, 3)
    assert stats.bootstrap(stats.mean_of(a), 25).mean == pytest.approx(a.mean())


def test_the_same_seed_gives_the_same_interval_and_a_higher_level_a_wider_one():
    statistic = stats.mean_of(study(np.random.default_rng(5), 50, 2)[0])
    assert stats.bootstrap(statistic, 50, seed=3) == stats.bootstrap(statistic, 50, seed=3)
    assert stats.bootstrap(statistic, 50, seed=3) != stats.bootstrap(statistic, 50, seed=4)
    narrow, wide = (stats.bootstrap(statistic, 50, level=level) for level in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_a_mean_over_problems_weighs_problems_alike_whatever_their_rows():
    """Equal to the bootstrap of the table of samples; a problem with many rows counts once."""
    rng = np.random.default_rng(0)
    values = rng.random((9, 4))
    problems = [f"p{i}" for i in range(9) for _ in range(4)]
    order = rng.permutation(36)
    found = stats.over_problems(values.flatten()[order], np.array(problems)[order], seed=3)
    assert astuple(found) == pytest.approx(astuple(stats.bootstrap(stats.mean_of(values), 9, seed=3)))
    assert stats.over_problems([1.0, 0.0, 0.0, 0.0], ["a", "b", "b", "b"]).mean == 0.5
    with pytest.raises(ValueError, match="No problems"):
        stats.over_problems([], [])


def test_an_interval_of_what_does_not_vary_says_so_and_excludes_nothing():
    found = stats.bootstrap(stats.mean_of(np.full((5, 2), 0.5)), 5)
    assert str(found) == "0.5 (no variance)" and not found.excludes_zero


@pytest.mark.parametrize("problems", [1, 2, 3, 4, 6, 10])
@pytest.mark.parametrize("values", [(1.0, 2.0, 4.0), (-0.3, 0.1, 0.1), (0.5, 0.5, -1.0, 0.2, 0.7)])
def test_problems_that_do_not_vary_leave_the_interval_and_p_value_over_seeds(values, problems):
    e, (low, high) = (
        stats.mean_effect(np.tile(np.array(values)[:, None], (1, problems))),
        ttest_1samp(values, 0).confidence_interval(),
    )
    assert astuple(e)[:3] == pytest.approx((np.mean(values), low, high))
    assert e.p == pytest.approx(max(ttest_1samp(values, 0).pvalue, 2.0 ** (1 - problems)))


def test_a_permutation_p_value_is_never_0_and_what_was_not_judged_is_no_test():
    assert stats.permutation_p(np.zeros(99, bool)) == 0.01
    assert stats.holm(np.array([0.01, np.nan, 0.04])) == pytest.approx([0.02, np.nan, 0.04], nan_ok=True)


def test_no_problems_are_refused():
    with pytest.raises(ValueError, match="No problems to estimate from"):
        stats.bootstrap(stats.mean_of(np.zeros((0, 2))), 0)


# --- the shortest responses ----------------------------------------------------------------------------------


def naive_shortest(correct: np.ndarray, lengths: np.ndarray, share: float) -> float:
    """The published metric: for each sample index sort the responses by length, take floor(p N), average over indices. Of responses as
    long as the last one taken, as many as are still needed are taken at random: each counts by that chance."""
    problems, samples = lengths.shape
    keep = max(1, math.floor(Fraction(str(share)) * problems))
    accuracies = []
    for s in range(samples):
        cut = sorted(lengths[:, s])[keep - 1]
        sure = [i for i in range(problems) if lengths[i, s] < cut]
        tied = [i for i in range(problems) if lengths[i, s] == cut]
        chance = (keep - len(sure)) / len(tied)
        accuracies.append((sum(correct[i, s] for i in sure) + chance * sum(correct[i, s] for i in tied)) / keep)
    return sum(accuracies) / samples


@given(lengths=lengths_of, share=st.sampled_from((0.05, 0.1, 0.2, 0.5, 1.0)), data=st.data())
def test_shortest_accuracy_equals_the_naive_loop(lengths, share, data):
    correct = data.draw(hnp.arrays(float, lengths.shape, elements=st.sampled_from([0.0, 1.0])))
    ours = stats.shortest_accuracy(correct, lengths, share)
    n = len(lengths)
    assert ours(np.arange(n)[None])[0] == pytest.approx(naive_shortest(correct, lengths, share))
    index = stats.resamples(n, times=5)
    naive = [naive_shortest(correct[row], lengths[row], share) for row in index]
    assert ours(index) == pytest.approx(naive)


def test_ties_at_the_cut_are_averaged_and_the_estimate_is_in_its_own_interval():
    """Ten short, ninety tied: the shortest fifth takes ten of the tied, half of which are right."""
    lengths = np.r_[np.full(10, 10.0), np.full(90, 20.0)][:, None]
    correct = np.r_[np.ones(55), np.zeros(45)][:, None]
    for order in (np.arange(100), np.arange(100)[::-1]):
        e = stats.bootstrap(stats.shortest_accuracy(correct[order], lengths[order], 0.2), 100)
        assert e.mean == pytest.approx(0.75) and e.low < 0.75 < e.high


@given(lengths=lengths_of, keep=st.integers(1, 12), data=st.data())
def test_the_smallest_are_the_mean_over_all_orders_of_ties(lengths, keep, data):
    values = data.draw(hnp.arrays(float, lengths.shape, elements=st.floats(-2, 2, allow_subnormal=False)))
    keep, rng = min(keep, lengths.shape[1]), np.random.default_rng(0)
    ours = stats.mean_of_smallest(values, lengths, keep)
    shuffled = rng.permuted(np.tile(np.arange(lengths.shape[1]), (4, 1)), axis=1)
    assert all(stats.mean_of_smallest(values[:, order], lengths[:, order], keep) == pytest.approx(ours) for order in shuffled)
    for row, lengths_row, mean in zip(values, lengths, ours, strict=True):
        cut = np.sort(lengths_row)[keep - 1]
        ends = np.sort(row[lengths_row == cut])
        sure, drawn = row[lengths_row < cut].sum(), keep - (lengths_row < cut).sum()
        assert (sure + ends[:drawn].sum()) / keep - 1e-9 <= mean <= (sure + ends[::-1][:drawn].sum()) / keep + 1e-9


@pytest.mark.parametrize("share", (0.05, 0.07, 0.1, 0.2, 0.29, 0.35, 0.57))
def test_the_number_kept_is_the_exact_floor_for_every_number_of_problems(share):
    """No problem is lost to products such as 0.29 * 100 = 28.999..."""
    for n in range(1, 1001):
        ranks = np.arange(float(n))[:, None]
        # Averaged over the first k, the ranks 0, 1, 2, ... tell k.
        kept = 2 * stats.shortest_accuracy(ranks, ranks, share)(np.arange(n)[None])[0] + 1
        assert kept == max(1, math.floor(Fraction(str(share)) * n)), n


def test_shortest_accuracy_of_lengths_that_decide_correctness():
    """Ten problems, the two shortest wrong."""
    lengths = np.arange(10.0)[:, None].repeat(2, axis=1)
    correct = (lengths >= 2).astype(float)
    index = np.arange(10)[None]
    assert stats.shortest_accuracy(correct, lengths, 0.2)(index)[0] == 0
    assert stats.shortest_accuracy(correct, lengths, 0.4)(index)[0] == 0.5
    assert stats.shortest_accuracy(correct, -lengths, 0.2)(index)[0] == 1


@given(
    lengths=hnp.arrays(float, st.tuples(st.integers(1, 5), st.integers(2, 6)), elements=st.floats(0, 1e4, allow_subnormal=False))
)
def test_mean_of_others_is_the_mean_of_the_other_samples(lengths):
    ours = stats.mean_of_others(lengths)
    for i in range(lengths.shape[0]):
        for s in range(lengths.shape[1]):
            others = [lengths[i, t] for t in range(lengths.shape[1]) if t != s]
            assert ours[i, s] == pytest.approx(sum(others) / len(others), abs=1e-6)


def test_selection_by_the_other_samples_has_no_selection_effect():
    """Length is noise, short responses are wrong: own ranking finds them, another sample's length does not."""
    rng = np.random.default_rng(6)
    lengths = rng.random((4000, 2))
    correct = (lengths > 0.3).astype(float)
    index = np.arange(4000)[None]
    assert stats.shortest_accuracy(correct, lengths, 0.2)(index)[0] == 0
    assert stats.shortest_accuracy(correct, stats.mean_of_others(lengths), 0.2)(index)[0] == pytest.approx(0.7, abs=0.03)


def test_mean_of_others_of_one_sample_is_refused():
    with pytest.raises(ValueError, match="at least 2 samples per problem"):
        stats.mean_of_others(np.ones((3, 1)))


# --- looping, correlation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1] * 16, True),
        ([1] * 15, False),
        ([*range(100), *[7] * 20], True),
        ([*[7] * 20, *range(100)], False),
        ([1, 2, 3, 4, 5] * 4, True),
        ([1, 2, 3, 4, 5] * 3 + [1, 2, 3, 4], False),
        ([9, 1, 2, 3, 4, 5, *[1, 2, 3, 4, 5] * 3], True),
        ([*range(64)] * 4, True),
        ([*range(65)] * 4, False),
        ([*range(64)] * 3, False),
        ([1, 2, 3, 4, 5] * 3 + [1, 2, 3, 4, 6], False),
        ([], False),
        ([1, 2] * 50 + [3], False),
    ],
)
def test_looping_is_an_end_in_four_equal_runs_of_sixteen_tokens_or_more(tokens, expected):
    assert stats.looping(tokens) is expected


@given(
    period=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    head=st.lists(st.integers(0, 5), max_size=20),
    repeats=st.integers(1, 8),
)
def test_looping_equals_the_naive_definition(period, head, repeats):
    tokens = head + period * repeats

    def naive() -> bool:
        for size in range(1, 65):
            need = max(4 * size, 16)
            if need > len(tokens):
                continue
            end = tokens[-need:]
            if all(end[i] == end[i % size] for i in range(need)):
                return True
        return False

    assert stats.looping(tokens) == naive()


def test_spearman_follows_ranks_only():
    assert stats.spearman([1.0, 2.0, 3.0, 4.0], [1.0, 10.0, 100.0, 1000.0]) == pytest.approx(1)
    assert stats.spearman([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert stats.spearman([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(0.8)


def test_spearman_of_a_constant_is_undefined_not_zero():
    assert math.isnan(stats.spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))
    assert math.isnan(stats.spearman([1.0, 2.0, 3.0], [4.0, 4.0, 4.0]))


# --- scores of predictions -----------------------------------------------------------------------------------

cases = st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=30)


@given(cases=cases)
def test_auc_is_the_share_of_pairs_in_order(cases):
    truth, score = np.array([c[0] for c in cases]), np.array([float(c[1]) for c in cases])
    pairs = [(a > b) + 0.5 * (a == b) for a in score[truth] for b in score[~truth]]
    found = stats.auc(truth, score)
    assert math.isnan(found) if not pairs else found == pytest.approx(np.mean(pairs))


@given(cases=cases)
def test_balanced_accuracy_is_the_mean_of_both_recalls(cases):
    truth, said = np.array([c[0] for c in cases]), np.array([c[1] > 0 for c in cases])
    found = stats.balanced_accuracy(truth, said)
    if truth.all() or not truth.any():
        assert math.isnan(found)
    else:
        hits = sum(t and s for t, s in zip(truth, said, strict=True)) / truth.sum()
        passes = sum(not t and not s for t, s in zip(truth, said, strict=True)) / (~truth).sum()
        assert found == pytest.approx((hits + passes) / 2)
        assert stats.balanced_accuracy(truth, np.ones_like(truth)) == 0.5


def test_r_squared_of_the_mean_is_0_of_the_truth_1_and_of_a_constant_undefined():
    y = np.array([1.0, 2.0, 6.0])
    assert stats.r_squared(y, y) == 1
    assert stats.r_squared(y, np.full(3, 3.0)) == pytest.approx(0)
    assert stats.r_squared(y, np.array([1.0, 2.0, 3.0])) == pytest.approx(1 - 9 / 14)
    assert stats.r_squared(y, -y) < 0
    assert math.isnan(stats.r_squared(np.ones(3), np.ones(3)))


# --- lengths against targets ---------------------------------------------------------------------------------


def test_words_are_counted_as_published():
    assert stats.words("don't stop-now") == 4
    assert stats.words("") == 0 and stats.words("a_b 12, é!") == 3


@pytest.mark.parametrize(
    ("target", "length", "precise", "flexible"),
    [
        (80, 70, False, True),
        (80, 71, True, True),
        (80, 60, False, False),
        (80, 90, True, True),
        (80, 100, False, True),
        (80, 101, False, False),
        (800, 800, False, False),
        (800, 801, True, True),
        (10, 20, True, True),
        (10, 21, False, False),
        (30, 20, False, False),
        (150, 130, False, True),
        (150, 170, True, True),
        (300, 281, True, True),
        (500, 400, False, False),
        (500, 551, False, True),
        (700, 770, True, True),
        (700, 601, False, True),
    ],
)
def test_the_published_ranges_are_open_below_and_closed_above(target, length, precise, flexible):
    found = [bool(stats.hits([length], [target], table)[0]) for table in (stats.RULER_PRECISE, stats.RULER_FLEXIBLE)]
    assert found == [precise, flexible]


def test_an_empty_response_never_hits():
    targets = list(stats.RULER_PRECISE)
    for table in (stats.RULER_PRECISE, stats.RULER_FLEXIBLE):
        assert not stats.hits([0] * 9, targets, table).any()
    assert {t for level in stats.RULER_LEVELS.values() for t in level} == set(targets) == set(stats.RULER_FLEXIBLE)


def test_a_precise_hit_is_a_flexible_hit_in_the_published_tables():
    for target in stats.RULER_PRECISE:
        lengths = np.arange(0, 1000)
        precise, flexible = (stats.hits(lengths, np.full(1000, target), t) for t in (stats.RULER_PRECISE, stats.RULER_FLEXIBLE))
        assert not (precise & ~flexible).any()


def test_length_match_reports_targets_levels_and_everything():
    lengths, targets = [10, 25, 71, 70, 500, 900, 700], [10, 10, 80, 80, 500, 800, 800]
    found = stats.length_match(lengths, targets)
    assert list(found) == ["10", "80", "500", ">800", "level 0", "level 1", "level 2", "all"]
    assert astuple(found["10"]) == pytest.approx((2, 50, 50, 50, math.sqrt(15**2 / 2)))
    assert astuple(found["80"]) == pytest.approx((2, 50, 100, 0, math.sqrt((81 + 100) / 2)))
    assert astuple(found["level 0"]) == pytest.approx((4, 50, 75, 25, math.sqrt((225 + 81 + 100) / 4)))
    assert found["level 1"].exact == 100 and found["level 1"].rmse == 0
    for name in (">800", "level 2"):
        assert (found[name].precise, found[name].n) == (50, 2)
        assert math.isnan(found[name].exact) and math.isnan(found[name].rmse)
    assert astuple(found["all"]) == pytest.approx((7, 400 / 7, 500 / 7, 40, math.sqrt(406 / 5)))


def test_targets_of_ones_own_in_tokens():
    precise, flexible = (stats.ranges_around([200, 1000], s) for s in (stats.assumed_precise, stats.assumed_flexible))
    assert precise == {200: (180, 220), 1000: (900, 1100)}
    found = stats.length_match([180, 181, 240, 1100], [200, 200, 200, 1000], precise=precise, flexible=flexible, levels={})
    assert list(found) == ["200", "1000", "all"]
    assert (found["200"].precise, found["200"].flexible) == (pytest.approx(100 / 3), 100)
    assert found["1000"].precise == 100


def test_ours_is_the_published_range_at_500_words():
    assert stats.ranges_around([500], stats.assumed_precise)[500] == stats.RULER_PRECISE[500]
    assert stats.ranges_around([500], stats.assumed_flexible)[500] == stats.RULER_FLEXIBLE[500]


def test_targets_without_a_range_and_unequal_numbers_are_refused():
    with pytest.raises(KeyError, match=r"No range for the targets \[123\.0\].*ranges_around"):
        stats.hits([5], [123], stats.RULER_PRECISE)
    with pytest.raises(ValueError, match="2 lengths and 1 targets"):
        stats.length_match([1, 2], [10])
    with pytest.raises(ValueError, match="0 lengths"):
        stats.length_match([], [])
    with pytest.raises(ValueError, match="share=0"):
        stats.ranges_around([100], 0.0)


def test_the_half_width_of_an_unknown_variance_is_unknown():
    assert np.isnan(stats.half_width(0.05, math.nan, 1.0, 10, 3)) and np.isnan(stats.half_width(0.05, 1.0, math.nan, 10, 3))
    assert stats.half_width(0.05, np.array([0.0, math.nan]), 0.0, 10, 1) == pytest.approx([0.0, math.nan], nan_ok=True)
