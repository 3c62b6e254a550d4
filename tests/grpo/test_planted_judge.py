"""CRM: planted pairs are what they say; a head trained on them finds redundancy at equal length; the variance argument of CRF."""

from __future__ import annotations

import random

import numpy as np
import pytest

from toolkit.grpo import judge
from toolkit.rewards import RewardBatch
from toolkit.rewards.conciseness import NoPairsError
from toolkit.rewards.crf import CRF, spread
from toolkit.rewards.fine_grained import equations_hold
from toolkit.tasks import arithmetic
from toolkit.tasks.generators.redundant import concise, equal_lengths, pairs, redundant

PROBLEMS = arithmetic.load("train", 120, operands=(3, 8))


def test_chains_are_right_and_planted_lines_repeat_an_earlier_line_at_the_places_that_they_say():
    kinds = set()
    for plain, more in pairs(PROBLEMS, seed=0):
        assert plain.lines[-1].endswith(f"={plain.problem.answer}") and len(set(plain.lines)) <= len(plain.lines)
        assert all(equations_hold(line) for line in more.lines)
        assert [line for i, line in enumerate(more.lines) if i not in more.planted] == list(plain.lines)
        for i, kind in more.planted.items():
            bare = more.lines[i].removeprefix("wait ").removesuffix(" ok")
            assert bare in more.lines[:i] and (bare != more.lines[i]) == (kind == "re-check")
            kinds.add(kind)
        share = len(more.planted) / len(more.lines)
        assert plain.score == 1 and more.score == pytest.approx(1 - 0.9 * share) and 0.1 < more.score < 1
    assert kinds == {"re-check", "restatement"} and pairs(PROBLEMS[:9], seed=1) == pairs(PROBLEMS[:9], seed=1)


def test_pairs_of_equal_length_are_of_different_problems_each_used_once():
    made = equal_lengths(PROBLEMS, seed=0)
    used = [c.problem.id for pair in made for c in pair]
    assert len(made) > 30 and len(set(used)) == len(used)
    assert all(len(a.lines) == len(b.lines) and b.planted and not a.planted for a, b in made)
    alone = equal_lengths(PROBLEMS, 0, ("restatement",))
    assert {kind for _, b in alone for kind in b.planted.values()} == {"restatement"}


def test_a_judge_trained_on_planted_pairs_knows_redundancy_from_length_and_one_with_shuffled_labels_does_not(tiny):
    train, held_out = pairs(PROBLEMS[:60], seed=0), equal_lengths(PROBLEMS[60:], seed=1)
    flips = np.random.default_rng(0).random((5, len(train))) < 0.5
    trained = judge.train_on_planted(tiny, train)
    states = judge.chain_states(tiny, [chain for pair in held_out for chain in pair])
    rows = np.arange(len(states)).reshape(-1, 2)
    controls = [judge.train_on_planted(tiny, train, reverse=f.tolist()).head.pair_auc(states, rows) for f in flips]
    assert trained.head.pair_auc(states, rows) > max(0.7, *controls)


def test_no_pairs_and_other_tasks_are_refused(tiny):
    with pytest.raises(NoPairsError, match="No pairs of chains"):
        judge.train_on_planted(tiny, [])
    with pytest.raises(ValueError, match="has no expression"):
        concise(PROBLEMS[0].__class__("x", ({"role": "user", "content": "?"},), "1", {"task": "lookup"}))
    assert redundant(concise(PROBLEMS[0]), 2, random.Random(0)).planted


# --- the variance argument ---------------------------------------------------------------------------------------


def simulated(p: float, n: int = 400_000):
    """Rewards of the product and of the sum on the same responses: correct with probability p, scores uniform in [0.1, 1]."""
    rng = np.random.default_rng(0)
    c, k = rng.random(n) < p, rng.uniform(0.1, 1, n)
    product = CRF(alpha=0.2)(RewardBatch.from_columns(correct=c, conciseness=k, step=10**6)).values
    size = 0.2 * np.exp(c.mean())  # s is 0 by then, and d depends on the share of right responses
    return c, k, product, c + size * k, size


@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.9])
def test_the_variances_of_product_and_sum_are_those_of_the_formulas(p):
    c, k, product, total, size = simulated(p)
    expected = spread(c.mean(), size, k.mean(), k.var())
    for i, r in enumerate((product, total)):
        within = c.mean() * r[c].var() + (1 - c.mean()) * r[~c].var()
        assert within == pytest.approx(expected["score"][i], rel=0.05)
        assert r.var() == pytest.approx(expected["all"][i], rel=0.02)


@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.9])
def test_conditioning_on_the_outcome_removes_the_scores_noise_from_wrong_responses_alone(p):
    c, _, product, total, _ = simulated(p)
    assert product[~c].var() == 0 < total[~c].var()
    assert product[c].var() == pytest.approx(total[c].var(), rel=1e-6)


def test_the_variance_of_the_whole_reward_is_not_smaller_unless_right_responses_are_very_rare():
    smaller = {p: (lambda r: r[2].var() < r[3].var())(simulated(p)) for p in (0.002, 0.2, 0.5)}
    assert smaller == {0.002: True, 0.2: False, 0.5: False}
