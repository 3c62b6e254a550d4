"""The verdict: every condition on the same problems and seeds, paired, and reported as measured."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from toolkit import evaluate, figures, report, store
from toolkit.edits import Steering
from toolkit.engines import loop
from toolkit.figures.base import CONTROL
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition
from toolkit.types import Direction, Report

SAMPLING = Sampling(n=3, max_new_tokens=20, seed=1)


def steering(lm: LM, strength: float) -> Steering:
    vector = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(0))
    return Steering(Direction(vector, "resid_mid", "think", "by hand", 1, 1, lm.provenance()), strength)


@pytest.fixture(scope="module")
def measured(llama, problems_of) -> Report:
    conditions = {
        "base": llama,
        "strength 0": Condition(llama, (steering(llama, 0.0),), note="nothing"),
        "steered": Condition(llama, (steering(llama, 2.0),)),
    }
    return evaluate.compare(conditions, problems_of(12), SAMPLING, progress=False)


def test_every_condition_is_judged_on_the_same_problems_and_samples(measured):
    keys = {name: set(zip(part.problem_id, part["sample"], strict=True)) for name, part in measured.rows.groupby("condition")}
    assert len(keys) == 3
    assert all(k == keys["base"] and len(k) == 36 for k in keys.values())


def test_a_condition_that_changes_nothing_differs_by_nothing(measured):
    base, same = (measured.rows[measured.rows.condition == name].drop(columns="condition") for name in ("base", "strength 0"))
    pd.testing.assert_frame_equal(base.reset_index(drop=True), same.reset_index(drop=True))
    rows = evaluate.summary(measured).set_index(["condition", "metric"])
    for name in ("base", "strength 0"):
        assert not rows.loc[name][["difference", "difference_low", "difference_high"]].to_numpy().any()
    assert rows.loc["steered"].difference.abs().max() > 0


def test_rows_are_the_rollouts_themselves(measured, llama, problems_of):
    found = rollouts(llama, problems_of(12), SAMPLING, progress=False)
    rows = measured.rows[measured.rows.condition == "base"]
    assert rows.think_tokens.tolist() == [r.think_tokens for r in found]
    assert rows.response_tokens.tolist() == [r.response_tokens for r in found]
    assert rows.closed.tolist() == [r.closed for r in found]
    assert rows.correct.tolist() == [r.correct for r in found]
    assert rows.difficulty.tolist() == [p.meta["difficulty"] for p in problems_of(12) for _ in range(3)]


def test_conditions_say_what_they_are(measured, llama):
    about = measured.conditions["steered"]
    assert about["fingerprint"] == llama.fingerprint
    assert about["interventions"][0].startswith("steering +2 x by hand resid_mid")
    assert measured.conditions["strength 0"]["note"] == "nothing"
    assert measured.provenance.notes["sampling"] == SAMPLING.identity


def made_up(outcomes, provenance, shuffle: int = 0) -> Report:
    """A report without a model, from outcomes ``[problems, samples]`` by condition, its rows in any order."""
    correct, lengths = outcomes
    rows = []
    for name in correct:
        for i, s in np.ndindex(correct[name].shape):
            row = {"condition": name, "problem_id": f"p{i:02d}", "sample": s, "task": "t", "difficulty": i % 3}
            row |= {"correct": bool(correct[name][i, s]), "think_tokens": int(lengths[name][i, s]), "closed": True}
            rows.append(
                row | {"response_tokens": int(lengths[name][i, s]) + 5, "looping": False, "leaking": False, "finish": "stop"}
            )
    frame = pd.DataFrame(rows).sample(frac=1, random_state=shuffle, ignore_index=True)
    return Report(frame, {name: {"note": ""} for name in correct}, "base", provenance)


def test_problems_stay_pairs_whatever_the_order_of_rows(outcomes, provenance):
    first, second = (made_up(outcomes, provenance, seed) for seed in (1, 2))
    for name in ("base", "edited"):
        assert np.array_equal(evaluate.outcomes(first, name).correct, outcomes[0][name])
        assert np.array_equal(evaluate.outcomes(second, name).think_tokens, outcomes[1][name])
    pd.testing.assert_frame_equal(evaluate.summary(first), evaluate.summary(second))


def test_the_summary_equals_metrics_computed_by_hand(outcomes, provenance):
    correct, lengths = outcomes
    rows = evaluate.summary(made_up(outcomes, provenance)).set_index(["condition", "metric"])
    for name in ("base", "edited"):
        assert rows.loc[(name, "accuracy"), "mean"] == pytest.approx(correct[name].mean())
        assert rows.loc[(name, "think_tokens"), "mean"] == pytest.approx(lengths[name].mean())
        assert rows.loc[(name, "response_tokens"), "mean"] == pytest.approx(lengths[name].mean() + 5)
        # Own shortest 20 %: of each sample's 20 responses the 4 shortest.
        own = [correct[name][np.argsort(lengths[name][:, s], kind="stable")[:4], s].mean() for s in range(4)]
        assert rows.loc[(name, "shortest_20"), "mean"] == pytest.approx(np.mean(own))
        # The same problems for every model: where base thinks least on the samples that are not judged.
        same = []
        for s in range(4):
            elsewhere = np.delete(lengths["base"], s, axis=1).mean(axis=1)
            same.append(correct[name][np.argsort(elsewhere, kind="stable")[:4], s].mean())
        assert rows.loc[(name, "shortest_20_same"), "mean"] == pytest.approx(np.mean(same))
    edited = rows.loc[("edited", "accuracy")]
    assert edited.difference == pytest.approx(correct["edited"].mean() - correct["base"].mean())
    assert edited.difference_low < edited.difference < edited.difference_high
    assert edited.low < edited["mean"] < edited.high


def test_accuracy_at_budgets_equals_a_naive_loop_and_never_falls_with_the_budget(outcomes, provenance):
    report = made_up(outcomes, provenance)
    curves = evaluate.accuracy_at_budgets(report, budgets=(0.0, 0.5, 1.0, 50.0))
    base = report.rows[report.rows["condition"] == report.base]["response_tokens"].mean()
    for name, own in curves.groupby("condition"):
        rows = report.rows[report.rows["condition"] == name]
        for _, row in own.iterrows():
            naive = np.mean(
                [c and n <= row["budget"] * base for c, n in zip(rows["correct"], rows["response_tokens"], strict=True)]
            )
            assert row["mean"] == pytest.approx(naive) and row["tokens"] == pytest.approx(row["budget"] * base)
        assert own["mean"].is_monotonic_increasing and own["mean"].iloc[-1] == pytest.approx(rows["correct"].mean())


def test_controls_are_grey_and_base_is_black_in_the_figure_of_budgets(outcomes, provenance):
    curves = evaluate.accuracy_at_budgets(made_up(outcomes, provenance))
    renamed = curves.replace({"condition": {curves["condition"].iloc[-1]: "control: random heads"}})
    lines = {t.name: t.line.color for t in figures.accuracy_at_budgets(renamed).data if t.fill is None}
    assert lines["base"] == "#000000" and lines["control: random heads"] == CONTROL


def test_one_sample_a_problem_has_no_selection_free_metric(outcomes, provenance):
    single = tuple({name: values[:, :1] for name, values in part.items()} for part in outcomes)
    metrics = set(evaluate.summary(made_up(single, provenance)).metric)
    assert "shortest_20" in metrics and not any(m.endswith("_same") for m in metrics)


def test_a_report_of_some_problems(outcomes, provenance):
    full = made_up(outcomes, provenance)
    some = full.only(difficulty=[0, 2])
    assert set(some.rows.difficulty) == {0, 2} and some.conditions == full.conditions
    expected = outcomes[0]["base"][[i for i in range(20) if i % 3 != 1]]
    assert np.array_equal(evaluate.outcomes(some, "base").correct, expected)
    with pytest.raises(KeyError, match=r"No column 'level' in this report: it has condition, problem_id"):
        full.only(level=1)
    with pytest.raises(ValueError, match=r"No row of this report has \{'task': 'x'\}"):
        full.only(task="x")


def test_a_condition_that_is_not_there_is_named(measured):
    with pytest.raises(KeyError, match=r"No condition 'edited' in this report: it holds base, strength 0, steered"):
        evaluate.outcomes(measured, "edited")


def test_a_base_that_is_not_among_the_conditions_is_refused(llama, problems_of):
    with pytest.raises(ValueError, match=r"base condition 'base' is not among original: pass base="):
        evaluate.compare({"original": llama}, problems_of(2), SAMPLING, progress=False)


def test_looping_counts_only_for_responses_that_ran_out_of_budget(llama, problems_of):
    rollout = rollouts(llama, problems_of(1), Sampling(max_new_tokens=5), progress=False)[0]
    loop = replace(rollout, token_ids=(*rollout.token_ids[: rollout.prompt_len], *[9] * 40))
    table = evaluate.rollout_table([replace(loop, finish="length"), replace(loop, finish="stop")], problems_of(1), llama.tags)
    assert table.looping.tolist() == [True, False]


def test_a_killed_comparison_goes_on_where_it_was(llama, problems_of, tmp_path, monkeypatch):
    conditions = {"base": llama, "steered: a/b": Condition(llama, (steering(llama, 2.0),))}
    problems, calls, decode = problems_of(4), [], loop._decode

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_decode", killed)
        evaluate.compare(conditions, problems, SAMPLING, out=tmp_path, progress=False)
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_decode", lambda *a, **k: (calls.append(1), decode(*a, **k))[1])
        resumed = evaluate.compare(conditions, problems, SAMPLING, out=tmp_path, progress=False)
    assert len(calls) == 1, "the base was sampled again"
    pd.testing.assert_frame_equal(resumed.rows, evaluate.compare(conditions, problems, SAMPLING, progress=False).rows)


# --- written down --------------------------------------------------------------------------------------------


def test_report_json_holds_every_metric_with_its_interval_paired_differences_and_provenance(measured, tmp_path, llama):
    summary = report.write(tmp_path, measured)
    written = store.read_json(tmp_path / "report.json")
    assert written["base"] == "base"
    assert written["conditions"].keys() == {"base", "strength 0", "steered"}
    assert written["paired"].keys() == {"strength 0", "steered"}
    assert written["provenance"]["fingerprint"] == llama.fingerprint
    rows = summary.set_index(["condition", "metric"])
    for metric in ("accuracy", "think_tokens", "shortest_20", "closed"):
        found, row = written["conditions"]["steered"]["metrics"][metric], rows.loc[("steered", metric)]
        assert found == {"mean": row["mean"], "low": row.low, "high": row.high}
        assert written["paired"]["steered"][metric]["mean"] == row.difference
    assert store.read_table(tmp_path / "rows.parquet").equals(measured.rows)


def test_the_board_shows_means_and_paired_differences(outcomes, provenance):
    summary = evaluate.summary(made_up(outcomes, provenance))
    board = report.headline_table(summary)
    row = summary.set_index(["condition", "metric"]).loc[("edited", "accuracy")]
    expected = (
        f"{100 * row['mean']:.1f} ({100 * row.difference:+.1f} [{100 * row.difference_low:+.1f}, {100 * row.difference_high:+.1f}])"
    )
    assert board.loc["edited", "accuracy"] == expected
    assert math.isclose(float(board.loc["base", "accuracy"].split()[0]), 100 * outcomes[0]["base"].mean(), abs_tol=0.05)
