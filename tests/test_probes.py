"""Probes: a planted signal is found, shuffled labels score at chance, and a problem that was seen is never predicted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from toolkit import collect, directions, probes, stats
from toolkit.collect import States
from toolkit.probes import Protocol

QUICK = Protocol(times=60)


@pytest.fixture(scope="module")
def made_up(provenance) -> Callable[..., States]:
    """``made_up(values, problems, label=..., tokens=...)``: states ``[rows, layers, width]`` with their rows."""

    def make(values: np.ndarray, problems: np.ndarray, kind: str = "resid_post", **columns) -> States:
        rows = pd.DataFrame({"problem_id": [f"p{i}" for i in problems], "sample": range(len(problems)), **columns})
        return States(torch.from_numpy(values).float(), rows, kind, "think", provenance)

    return make


@pytest.fixture(scope="module")
def planted(made_up) -> States:
    """60 problems of 4 rows; layer 1 of 2 holds the class and the logarithm of what remains, layer 0 nothing."""
    rng = np.random.default_rng(0)
    problems = np.arange(60).repeat(4)
    short = rng.random(240) < 0.3
    remaining = np.where(short, rng.integers(1, 30, 240), rng.integers(30, 200, 240)).astype(float)
    values = rng.normal(size=(240, 2, 12)) + rng.normal(size=(60, 2, 12))[problems]
    values[:, 1, 3] += 5 * short
    values[:, 1, 7] += 3 * np.log1p(remaining)
    position = rng.integers(0, 50, 240)
    return made_up(
        values, problems, label=np.where(short, "short", "long"), think_tokens=100, remaining=remaining, position=position
    )


def row(table: pd.DataFrame, layer: int, metric: str) -> pd.Series:
    return table[(table.layer == layer) & (table.metric == metric)].iloc[0]


# --- what is found -------------------------------------------------------------------------------------------


def test_a_planted_class_is_found_in_its_layer_and_shuffled_labels_score_at_chance(planted):
    table = probes.classify(planted, "short", protocol=QUICK)
    assert list(table.layer) == [0, 0, 1, 1] and list(table.metric) == ["auc", "accuracy"] * 2
    for metric in ("auc", "accuracy"):
        nothing, found = row(table, 0, metric), row(table, 1, metric)
        assert found["mean"] > 0.9 and found.low > 0.85 and found.selectivity_low > 0.25
        assert nothing.low < 0.5 < nothing.high and nothing.selectivity_low < 0 < nothing.selectivity_high
        for one in (nothing, found):
            assert abs(one.control - 0.5) < 0.1
            assert one.selectivity == pytest.approx(one["mean"] - one.control)
            assert one.low <= one["mean"] <= one.high


def test_planted_remaining_tokens_are_found_and_shuffled_ones_are_not(planted):
    table = probes.regress(planted, "remaining", protocol=QUICK)
    found, nothing = row(table, 1, "r2"), row(table, 0, "r2")
    assert found.low > 0.6 and row(table, 1, "spearman").low > 0.6
    assert nothing.high < 0.15 and found.control < 0.1 and row(table, 1, "spearman").control < 0.2
    assert found.selectivity_low > 0.5


def test_shuffled_labels_score_at_chance_on_average(made_up):
    """Over many sets of pure noise the pooled held-out AUC is 0.5: balanced folds add no bias of their own."""
    rng, scores = np.random.default_rng(1), []
    for seed in range(30):
        y = rng.random(90) < 0.4
        x, problems = rng.normal(size=(90, 8)), np.arange(30).repeat(3)
        margin = probes.out_of_fold(x, y, problems, directions.logistic_model, Protocol(seed=seed))
        scores.append(stats.auc(y, margin))
    assert np.mean(scores) == pytest.approx(0.5, abs=3 * np.std(scores) / np.sqrt(30))
    assert np.mean(scores) == pytest.approx(0.5, abs=0.05)


def test_a_class_is_told_from_all_other_rows_not_from_its_opposite_only(made_up):
    rng = np.random.default_rng(2)
    label = np.array(["short", "middle", "long"] * 60)
    values = rng.normal(size=(180, 1, 5))
    values[label == "middle", 0, 2] += 6
    states = made_up(values, np.arange(60).repeat(3), label=label)
    assert row(probes.classify(states, "middle", protocol=QUICK), 0, "auc")["mean"] > 0.95
    assert row(probes.classify(states, "long", protocol=QUICK), 0, "auc")["mean"] < 0.85


def test_the_score_to_beat_is_that_of_the_position(made_up):
    rng = np.random.default_rng(3)
    position = np.tile(np.arange(0, 40, 4), 40)
    remaining = 41.0 - position
    values = rng.normal(size=(400, 2, 4))
    states = made_up(values, np.arange(40).repeat(10), label="all", think_tokens=41, remaining=remaining, position=position)
    table = probes.position_only(states, protocol=QUICK)
    assert table[table.metric == "spearman"]["mean"].item() > 0.95 and "layer" not in table
    assert row(probes.regress(states, protocol=QUICK), 0, "r2")["mean"] < 0.1
    noise = replace(states, rows=states.rows.assign(remaining=rng.permutation(remaining)))
    assert probes.position_only(noise, protocol=QUICK)["mean"].abs().max() < 0.15


# --- nothing leaks -------------------------------------------------------------------------------------------


def test_a_probe_that_knows_problems_apart_gains_nothing(made_up):
    """Labels follow problems at random, states say only which problem it is: folds by row would score nearly 1."""
    from sklearn.model_selection import KFold, cross_val_predict

    rng = np.random.default_rng(4)
    problems = np.arange(60).repeat(8)
    short = (rng.random(60) < 0.5)[problems]
    values = (5 * rng.normal(size=(60, 1, 100)))[problems] + 0.1 * rng.normal(size=(480, 1, 100))
    states = made_up(values, problems, label=np.where(short, "short", "long"))
    x = states.values[:, 0].numpy()
    cheat = cross_val_predict(
        directions.logistic_model(400), x, short, cv=KFold(5, shuffle=True, random_state=0), method="decision_function"
    )
    assert stats.auc(short, cheat) > 0.97
    honest = row(probes.classify(states, protocol=QUICK), 0, "auc")
    assert honest.low < 0.5 < honest.high and abs(honest["mean"] - 0.5) < 0.2


@pytest.mark.parametrize("y", [np.arange(60) % 7 < 3, np.arange(60.0)], ids=["class", "tokens"])
def test_no_row_is_predicted_by_a_probe_that_saw_its_problem(y):
    class Spy:
        def fit(self, x, _):
            self.seen = {tuple(r) for r in x}
            return self

        def predict(self, x):
            assert not self.seen & {tuple(r) for r in x}
            return x[:, 0]

        decision_function = predict

    problems = np.random.default_rng(5).permutation(np.arange(20).repeat(3))
    x = np.stack([problems, problems], axis=1).astype(float)
    found = probes.out_of_fold(x, y, problems, lambda n, penalty: Spy(), Protocol())
    assert found.tolist() == problems.tolist(), "every row is predicted once"


def test_held_out_ridge_predictions_equal_the_closed_form_fold_by_fold(model_of, mixed_rollouts):
    """On activations of two families, with folds read off scikit-learn and everything else by hand."""
    from sklearn.model_selection import GroupKFold

    for name in ("llama", "gpt2"):
        states = collect.states(model_of(name), mixed_rollouts, "resid_mid")
        x, y = states.values[:, 1].double().numpy(), np.log1p(states.rows.think_tokens.to_numpy(float))
        problems = np.arange(len(y))
        ours = probes.out_of_fold(x, y, problems, directions.ridge_model, Protocol(folds=4, penalty=0.7, seed=2))
        for seen, held_out in GroupKFold(4, shuffle=True, random_state=2).split(x, y, problems):
            mean, scale = x[seen].mean(0), x[seen].std(0)
            z = (x[seen] - mean) / scale
            w = np.linalg.solve(z.T @ z + 0.7 * len(seen) * np.eye(z.shape[1]), z.T @ (y[seen] - y[seen].mean()))
            assert ours[held_out] == pytest.approx((x[held_out] - mean) / scale @ w + y[seen].mean())


def test_shuffled_labels_keep_what_rows_of_a_problem_share():
    """Another problem's labels, in random order; unequal sizes repeat or drop some."""
    groups = [np.arange(0, 4), np.arange(4, 6), np.arange(6, 12)]
    y = np.array([1.0] * 4 + [2.0] * 2 + [3.0] * 6)
    orders = set()
    for seed in range(30):
        found = probes._shuffled(y, groups, seed)
        values = [set(found[g].tolist()) for g in groups]
        assert all(len(v) == 1 for v in values) and set.union(*values) == {1, 2, 3}
        orders.add(tuple(found[[0, 4, 6]]))
    assert len(orders) == 6
    falling = np.tile(np.arange(10.0, 0, -1), 50)
    shuffled = probes._shuffled(falling, [np.arange(i * 10, i * 10 + 10) for i in range(50)], 0)
    assert abs(stats.spearman(falling, shuffled)) < 0.15, "the order within a problem is lost"


def test_intervals_keep_the_rows_of_a_problem_together(planted):
    """Every row ten times over says no more: as wide an interval, the same score."""
    once = probes.classify(planted, protocol=QUICK)
    tenfold = probes.classify(planted.take(np.arange(240).repeat(10)), protocol=QUICK)
    a, b = row(once, 0, "auc"), row(tenfold, 0, "auc")
    assert b.high - b.low > 0.7 * (a.high - a.low)


def test_the_same_seed_gives_the_same_table(planted):
    first, second = (probes.classify(planted, protocol=QUICK) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert not first.equals(probes.classify(planted, protocol=replace(QUICK, seed=1)))


# --- heads ---------------------------------------------------------------------------------------------------


def test_a_planted_head_is_found_and_its_control_is_not(made_up):
    rng = np.random.default_rng(6)
    short = rng.random(200) < 0.5
    values = rng.normal(size=(200, 3, 4 * 5))
    values[short, 2, 5:10] += 2
    states = made_up(values, np.arange(50).repeat(4), kind="z", label=np.where(short, "short", "long"))
    scores, control = probes.classify_heads(states, 4)
    assert scores.score.shape == control.score.shape == (3, 4)
    assert scores.ranked()[0] == (2, 1) and scores.score[2, 1] > 0.9
    others = torch.ones(3, 4, dtype=torch.bool)
    others[2, 1] = False
    assert scores.score[others].max() < 0.65 and (control.score - 0.5).abs().max() < 0.15
    assert (scores.method, control.method, scores.units) == ("probe_short", "probe_short_shuffled", "balanced accuracy")


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_head_probes_read_the_heads_own_columns(name, model_of, mixed_rollouts, by_length):
    lm = model_of(name)
    states = collect.states(lm, mixed_rollouts, "z", by=by_length)
    scores, _ = probes.classify_heads(states, lm.layout.n_heads, protocol=Protocol(folds=3))
    y = (states.rows.label == "short").to_numpy()
    for layer, head in ((0, 0), (2, 3)):
        x = states.values[:, layer, lm.layout.head(layer, head)].numpy()
        margin = probes.out_of_fold(x, y, np.arange(len(y)), directions.logistic_model, Protocol(folds=3))
        naive = ((margin[y] > 0).mean() + (margin[~y] <= 0).mean()) / 2
        assert scores.score[layer, head].item() == pytest.approx(naive)


# --- errors --------------------------------------------------------------------------------------------------


def test_too_few_problems_are_named_with_the_counts(planted):
    few = planted.take(planted.rows.problem_id.isin([f"p{i}" for i in range(4)]).to_numpy())
    for run in (probes.regress, probes.position_only):
        with pytest.raises(probes.TooFewProblemsError, match="rows of 4 problems, too few for 5 folds"):
            run(few)
    with pytest.raises(probes.TooFewProblemsError, match="problems have rows of class 'short' and 4 have others, too few for 5"):
        probes.classify(few)
    with pytest.raises(KeyError, match="No class 'medium'"):
        probes.classify(planted, "medium")


def test_states_that_lack_what_is_asked_for_are_refused(planted):
    with pytest.raises(ValueError, match="States of 'resid_post', width 12, are not the outputs of 4 heads"):
        probes.classify_heads(planted, 4)
    means = replace(planted, rows=planted.rows.drop(columns=["remaining"]))
    with pytest.raises(KeyError, match=r"no column 'remaining'.*each=True"):
        probes.regress(means)


def test_rows_whose_end_was_never_seen_are_left_out(planted):
    unknown = np.arange(240) % 3 == 0
    rows = planted.rows.assign(remaining=planted.rows.remaining.where(~unknown))
    ours = probes.regress(replace(planted, rows=rows), protocol=QUICK)
    pd.testing.assert_frame_equal(ours, probes.regress(planted.take(~unknown), protocol=QUICK))
