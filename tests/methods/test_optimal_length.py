"""Best chain length in theory and in samples, and the length-filtered vote."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

from toolkit import generate, lm, tasks
from toolkit.generate import Sampling
from toolkit.methods import optimal_length
from toolkit.methods.optimal_length import Buckets, accuracy, best_step_size, best_steps, length_filtered_vote
from toolkit.types import Rollout, Span

CASES = [((20, 5, 100), 8.852), ((40, 5, 100), 13.812), ((20, 10, 100), 4.426), ((16, 4, 64), 8.161)]  # (T, M, C) -> N*


@pytest.mark.parametrize(("case", "expected"), CASES)
def test_the_best_number_of_steps_is_the_formulas_and_a_grid_searchs(case, expected):
    assert_allclose(best_steps(*case), expected, atol=5e-4)
    grid = np.linspace(0.5, 60, 200_001)
    assert_allclose(best_steps(*case), grid[accuracy(grid, *case).argmax()], atol=1e-3)
    assert_allclose(best_step_size(*case) * best_steps(*case), case[0])


def test_harder_problems_call_for_more_steps_and_larger_ones_more_capable_models_for_fewer():
    by_difficulty = [best_steps(t, 5, 100) for t in (5, 10, 20, 40, 80)]
    assert (np.diff(by_difficulty) > 0).all()
    assert (np.diff([best_step_size(t, 5, 100) for t in (5, 10, 20, 40, 80)]) > 0).all()
    assert (np.diff([best_steps(20, m, 100) for m in (2, 5, 10)]) < 0).all()


def test_accuracy_is_zero_where_steps_are_too_few():
    assert accuracy(np.array([0, 1, 4]), 20, 5, 100).tolist() == [0, 0, 0]
    assert accuracy(np.array([5.0]), 20, 5, 100) > 0


@pytest.mark.parametrize("case", [(0, 5, 100), (100, 5, 100), (20, 0, 100)])
def test_cases_outside_the_theory_are_refused(case):
    with pytest.raises(ValueError, match="0 < difficulty < bound"):
        best_steps(*case)


def sampled(chance, difficulty: int, seed: int, problems: int = 60, samples: int = 12) -> pd.DataFrame:
    """Made-up rollouts of one difficulty, right with a chance that depends on their length."""
    random = np.random.default_rng(seed)
    length = np.round(np.exp(random.uniform(np.log(5), np.log(60), problems * samples)))
    ids = [f"{difficulty}-{i // samples}" for i in range(problems * samples)]
    return pd.DataFrame(
        {"problem_id": ids, "difficulty": difficulty, "length": length, "correct": random.random(len(length)) < chance(length)}
    )


def test_an_inverted_u_is_found_with_its_peak_and_moves_with_difficulty():
    def bell(top):
        return lambda n: 0.9 * np.exp(-(np.log(n / top) ** 2) / 0.5)

    rows = pd.concat([sampled(bell(12), 1, 0), sampled(bell(25), 2, 1)])
    found, curves = optimal_length.peaks(rows, times=200)
    easy, hard = found.itertuples()
    assert easy.low < 12 < easy.high and hard.low < 25 < hard.high and easy.high < hard.low
    assert min(easy.inverted, hard.inverted) > 0.95
    assert curves[1].at([12])[0] > max(curves[1].at([6, 40]))


def test_accuracy_that_only_rises_has_no_peak():
    found, curves = optimal_length.peaks(sampled(lambda n: np.clip(n / 70, 0, 1), 1, 2), times=200)
    assert found["inverted"][0] < 0.5 and math.isnan(found["peak"][0])
    assert (np.diff(curves[1].at([6, 12, 25, 50])) > 0).all()


def test_the_fit_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.linear_model")
    rows = sampled(lambda n: 0.8 * np.exp(-(np.log(n / 20) ** 2)), 1, 3)
    _, curves = optimal_length.peaks(rows, times=1)
    x = np.log(rows["length"].to_numpy())
    x = (x - x.mean()) / x.std()
    model = sklearn.LogisticRegression(C=1 / optimal_length.assumed_ridge, tol=1e-10, max_iter=1000)
    model.fit(np.stack([x, x * x], axis=1), rows["correct"])
    assert_allclose(curves[1].coefficients, [model.intercept_[0], *model.coef_[0]], atol=1e-4)


def test_a_difficulty_that_is_always_right_has_no_curve():
    found, curves = optimal_length.peaks(sampled(lambda n: n > 0, 1, 0), times=10)
    assert found["accuracy"][0] == 1 and np.isnan(found["peak"][0]) and not curves


# --- vote ----------------------------------------------------------------------------------------------------


def test_the_vote_keeps_the_lengths_that_agree():
    said = ["7", "7", "8", "9", "8", "9", "8", "8", "8"]
    lengths = [2, 3, 8, 8, 9, 9, 20, 30, 40]  # only the short ones agree; 8 wins the plain vote
    assert optimal_length.majority(said) == "8"
    assert length_filtered_vote(said, lengths, Buckets(keep=1)) == "7"
    assert (
        length_filtered_vote(said, lengths, Buckets(keep=2)) == "7"
    )  # two buckets: 7 7 and 8 9 8 9, a tie that the first said wins
    assert length_filtered_vote(said, lengths, Buckets(keep=3)) == "7"  # only two buckets have two answers


def test_a_bucket_of_one_is_not_sure_of_itself():
    said, lengths = ["1", "2", "3", "4", "4"], [1, 11, 21, 31, 31]
    assert length_filtered_vote(said, lengths, Buckets(keep=1)) == "4"
    assert length_filtered_vote(said, lengths, Buckets(keep=1, smallest=1)) == "4"  # more answers go first among equal entropies
    assert length_filtered_vote(said[:3], lengths[:3]) == "1"  # no bucket of two: everybody votes
    assert length_filtered_vote([None, None], [1, 2]) is None
    assert length_filtered_vote([None, "5", None], [1, 2, 3]) == "5"


def graded(*grades: bool) -> list[Rollout]:
    return [Rollout("p", i, (1, 2, 3), 1, None, Span(1, 3), "stop", "", grade) for i, grade in enumerate(grades)]


def test_equal_answers_with_different_grades_have_no_vote():
    """Not the last sample's grade, which depends on the order of samples."""
    for grades in ((True, False, True), (False, True, True)):
        with pytest.raises(ValueError, match=r"Problem 'p': the answer '7' is graded correct in one sample and wrong in another"):
            optimal_length.votes(graded(*grades), ["7", "7", "8"], [1, 2, 3])
    assert optimal_length.votes(graded(True, True, False), ["7", "7", "8"], [1, 2, 3])["majority"].all()


def test_no_answer_never_wins_a_vote():
    """Nobody votes, even if a response without an answer is graded correct."""
    rows = optimal_length.votes(graded(True, True), [None, None], [1, 2])
    assert not rows[["majority", "filtered", "random"]].to_numpy().any() and rows["one"].item() == 1
    rows = optimal_length.votes(graded(True, True, False), [None, None, "7"], [1, 2, 3])
    assert not rows[["majority", "filtered", "random"]].to_numpy().any()
    assert optimal_length.votes(graded(False, False, True), [None, None, "7"], [1, 2, 3])["majority"].all()


def test_entropy_of_answers():
    assert optimal_length.entropy(["a"] * 4) == 0
    assert_allclose(optimal_length.entropy(["a", "b", "a", "b"]), math.log(2))


def test_a_vote_needs_sensible_buckets():
    with pytest.raises(ValueError, match="width=0"):
        length_filtered_vote(["1"], [1], Buckets(width=0))


@pytest.fixture(scope="module")
def reasoner():
    return lm.load("tiny-reasoner")


def test_votes_of_the_tiny_reasoner(reasoner):
    problems = tasks.load("arithmetic", "dev", n=12)
    found = generate.rollouts(reasoner, problems, Sampling(n=8, max_new_tokens=150))
    said = optimal_length.final_answers(reasoner, found)
    by_id = {p.id: p for p in problems}
    for r, answer in zip(found, said, strict=True):
        assert (answer is not None and int(answer) == int(by_id[r.problem_id].answer)) == r.correct
    rows = optimal_length.votes(found, said, [r.think_tokens for r in found], Buckets(width=8))
    assert rows["problem_id"].tolist() == [p.id for p in problems] and (rows["samples"] == 8).all()
    assert_allclose(rows["one"].mean(), np.mean([r.correct for r in found]))
    accuracy_of = optimal_length.vote_accuracy(rows)
    assert accuracy_of["majority"].mean >= accuracy_of["one"].mean - 0.05
    assert_allclose(accuracy_of["filtered - majority"].mean, accuracy_of["filtered"].mean - accuracy_of["majority"].mean)
    table = optimal_length.table(found, problems)
    assert table["length"].tolist() == [r.think_tokens for r in found] and set(table["difficulty"]) == {
        p.meta["difficulty"] for p in problems
    }
