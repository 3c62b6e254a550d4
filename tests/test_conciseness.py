"""A head on pooled hidden states learns to tell concise right answers from verbose ones, on problems it has not seen."""

from __future__ import annotations

import json

import numpy as np
import pytest
from batches import batch_of

from toolkit import collect, generate, lm, tasks
from toolkit.generate import Sampling
from toolkit.rewards import RewardBatch, conciseness
from toolkit.rewards.conciseness import ConcisenessHead, NoPairsError
from toolkit.rewards.crf import CRF


@pytest.fixture(scope="module")
def responses():
    """Rollouts of the tiny reasoner, their states averaged over thinking (last block), and which problems are for training."""
    reasoner = lm.load("tiny-reasoner")
    problems = tasks.load("arithmetic", "train", n=48)
    found = [r for r in generate.rollouts(reasoner, problems, Sampling(n=6, max_new_tokens=200)) if r.think_tokens]
    last = reasoner.layout.n_layers - 1
    pooled = collect.states(reasoner, found, "resid_post").values[:, last].numpy()
    training = {p.id for p in problems[::2]}
    return RewardBatch.from_rollouts(found), pooled, np.array([r.problem_id in training for r in found])


def test_a_head_ranks_short_over_long_right_answers_of_held_out_problems(responses):
    batch, pooled, training = responses
    seen, held_out = (conciseness.pairs_by_length(batch.take(rows)) for rows in (training, ~training))
    head = conciseness.fit(pooled[training], seen)
    assert len(held_out) > 30
    assert head.pair_auc(pooled[~training], held_out) > 0.9
    # The control: what all responses to a problem share cannot tell them apart.
    shared = np.stack([pooled[batch.groups == g].mean(axis=0) for g in batch.groups])
    assert conciseness.fit(shared[training], seen).pair_auc(shared[~training], held_out) == 0.5


def test_its_score_is_the_column_that_crf_needs(responses):
    batch, pooled, training = responses
    head = conciseness.fit(pooled[training], conciseness.pairs_by_length(batch.take(training)))
    score = head.score(pooled)
    assert score.min() >= 0.1 and score.max() <= 1.0 and np.ptp(score) > 0.3
    values = CRF()(batch.with_columns(conciseness=score)).values
    for g in range(batch.groups.max() + 1):
        rows = np.flatnonzero((batch.groups == g) & batch["correct"])
        assert (np.diff(values[rows][np.argsort(score[rows])]) >= 0).all()
    assert (values[~batch["correct"]] == 0).all()


def test_a_head_can_be_saved_as_json(responses):
    batch, pooled, training = responses
    head = conciseness.fit(pooled[training], conciseness.pairs_by_length(batch.take(training)))
    again = ConcisenessHead.from_state_dict(json.loads(json.dumps(head.state_dict())))
    assert (again.score(pooled) == head.score(pooled)).all()


def test_pairs_are_right_answers_to_one_problem_far_enough_apart():
    batch = batch_of([1, 1, 1, 0, 1], [10, 20, 11, 99, 50], ["a", "a", "a", "a", "b"])
    assert sorted(map(tuple, conciseness.pairs_by_length(batch, ratio=1.5).tolist())) == [(0, 1), (2, 1)]
    interleaved = batch.take([4, 1, 3, 0, 2])
    assert sorted(map(tuple, conciseness.pairs_by_length(interleaved, ratio=1.5).tolist())) == [(3, 1), (4, 1)]


def test_nothing_to_learn_from_is_an_error_with_its_remedy():
    with pytest.raises(NoPairsError, match="sample more responses"):
        conciseness.pairs_by_length(batch_of([1, 1, 0], [10, 11, 99]))
    with pytest.raises(NoPairsError, match="sample more responses"):
        conciseness.pairs_by_length(batch_of([0, 0], [10, 99]))
    with pytest.raises(NoPairsError, match="No pairs"):
        conciseness.fit(np.zeros((2, 3)), np.empty((0, 2), np.int64))
    with pytest.raises(ValueError, match="Row 1 of the features is not finite"):
        conciseness.fit(np.array([[0.0], [np.nan]]), np.array([[0, 1]]))
    with pytest.raises(ValueError, match="ratio=1"):
        conciseness.pairs_by_length(batch_of([1], [1]), ratio=1)


def test_the_head_recovers_a_known_direction():
    random = np.random.default_rng(0)
    truth = random.normal(size=8)
    features = random.normal(size=(400, 8)) * np.array([1, 10, 0.1, 1, 1, 1, 1, 1])
    worth = features @ truth
    pairs = np.array([(i, j) if worth[i] > worth[j] else (j, i) for i, j in random.integers(0, 400, (600, 2)) if i != j])
    head = conciseness.fit(features, pairs, strength=1.0)
    assert np.corrcoef(head.logits(features), worth)[0, 1] > 0.99
