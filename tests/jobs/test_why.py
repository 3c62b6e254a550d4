"""Why a model changed: identities, a model in which one known head was edited, and each table against numbers counted by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import zoo

from toolkit import edits, evaluate, figures, generate, jobs, origins, tasks
from toolkit.entropies import with_entropies
from toolkit.generate import Sampling, rollouts
from toolkit.jobs import why, why_page
from toolkit.lm import LM, Condition
from toolkit.steering import steering
from toolkit.store import WrongModelError
from toolkit.types import Direction, HeadEdit, Plan, Rollout, Span

TYPES = ("qwen3", "gpt2")


def rollout(problem: str, sample: int, think: int, seed: int) -> Rollout:
    """Return made-up tokens: a prompt of 6 tokens, an opening tag, ``think`` tokens, a closing tag and two tokens of answer."""
    n = 7 + think + 3
    ids = tuple(torch.randint(5, 103, (n,), generator=torch.Generator().manual_seed(seed)).tolist())
    return Rollout(problem, sample, ids, 6, Span(7, 7 + think), Span(n - 2, n), "stop", "", correct=True)


def made_up(n: int = 5) -> list[Rollout]:
    return [rollout(f"p{i}", j, 4 + 3 * j + i, 10 * i + j) for i in range(n) for j in range(3)]


def scaled(lm: LM, heads, strength: float = 1.0) -> LM:
    plan = Plan(tuple(HeadEdit(*h, "scale", strength) for h in heads), None, "scaled", lm.provenance())
    return edits.apply(lm, plan)


def direction_of(lm: LM) -> Direction:
    vector = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(4))
    return Direction(vector, "resid_mid", "all", "made up", 0, 0, lm.provenance())


@pytest.fixture(scope="module", params=TYPES)
def model(request) -> LM:
    return zoo.model_of_type(request.param)


def test_pairs_are_the_shortest_and_the_longest_closed_responses():
    some = [*made_up(2), replace(rollout("p0", 9, 40, 1), answer=None), rollout("p2", 0, 5, 2), rollout("p2", 1, 5, 3)]
    assert [(a.problem_id, a.think_tokens, b.think_tokens) for a, b in why.length_pairs(some)] == [("p0", 4, 10), ("p1", 5, 11)]
    assert len(why.length_pairs(some, 1)) == 1
    with pytest.raises(ValueError, match="None of 1 problems has two responses whose closed thinking differs"):
        why.length_pairs(some[-2:])


def test_the_preference_is_the_difference_of_log_probabilities_up_to_the_answer(model):
    short, long = why.length_pairs(made_up(1))[0]
    sums = [sum(with_entropies(model, [r])[0].logprobs[: r.think_tokens + 2]) for r in (short, long)]
    assert why.length_preference(model, [(short, long)]) == pytest.approx([sums[1] - sums[0]], abs=1e-3)


def test_the_preference_of_a_model_that_marks_no_thinking_is_over_whole_responses(model):
    def unmarked(r: Rollout) -> Rollout:
        whole = Span(r.prompt_len, len(r.token_ids))
        return replace(r, think=whole, answer=whole)

    pair = tuple(map(unmarked, why.length_pairs(made_up(1))[0]))
    sums = [sum(with_entropies(model, [r])[0].logprobs) for r in pair]
    assert why.length_preference(model, [pair]) == pytest.approx([sums[1] - sums[0]], abs=1e-3)
    assert abs(sums[1] - sums[0]) > 1


def test_results_of_tools_are_no_part_of_the_preference(model):
    short, long = why.length_pairs(made_up(1))[0]
    with_result = replace(long, results=(Span(8, 11),))
    every, own = (why.length_preference(model, [(short, r)])[0] for r in (long, with_result))
    assert every - own == pytest.approx(sum(with_entropies(model, [long])[0].logprobs[2:5]), abs=1e-3)


def test_an_unchanged_model_has_no_effects_and_no_shares(model):
    table = why.head_effects(Condition(model), Condition(model), why.length_pairs(made_up()))
    assert not table[["alone", "put back", "effect", "whole"]].to_numpy().any() and table["share"].isna().all()


def test_the_only_edited_head_is_named_first_and_makes_the_whole_change(model):
    for known in ((3, 1), (0, 2)):
        changed = scaled(model, [known])
        table = why.head_effects(Condition(model), Condition(changed), why.length_pairs(made_up()))
        first = table.iloc[0]
        assert (first["layer"], first["head"]) == known
        # The head's inputs are those of base, so its output patched either way gives one of the two models.
        assert first["alone"] == pytest.approx(first["whole"], abs=1e-3) and first["put back"] == pytest.approx(
            first["whole"], abs=1e-3
        )
        earlier = table.loc[table["layer"] <= known[0], "effect"].iloc[1:]
        assert (earlier.abs() < 1e-3).all()  # other heads of this layer, and earlier ones, are equal in both models
        outputs = why.output_changes(Condition(model), Condition(changed), made_up(), direction_of(model))
        same_layer = outputs[(outputs["layer"] == known[0]) & (outputs["head"] >= 0)].set_index("head")["norm"]
        assert same_layer.idxmax() == known[1] and (same_layer.drop(known[1]) < 1e-4 * same_layer.max()).all()


def test_the_output_change_of_a_steered_model_lies_along_the_steering(model):
    v = direction_of(model)
    steered = Condition(model, (steering(v, 2.0, layers=[2]),))
    table = why.output_changes(Condition(model), steered, made_up(), v).set_index(["layer", "head"])
    assert table.loc[(2, -1), "cosine"] == pytest.approx(1, abs=1e-4)
    assert table.loc[(2, -1), "norm"] == pytest.approx(2 * float(v.vector[2].norm()), rel=1e-3)
    assert table.loc[(1, -1), "norm"] < 1e-4 and table.loc[(2, 0), "norm"] < 1e-4 < table.loc[(3, 0), "norm"]
    counts = {-1: model.layout.n_layers, 0: len(model.layout.all_heads)}
    assert all(table.loc[(2, head), "random"] == why.random_cosine(model.layout.d_model, n) for head, n in counts.items())


@pytest.mark.parametrize("count", [1, 4, 32])
def test_the_largest_cosine_with_random_directions_stays_below_its_bound_in_95_percent_of_draws(count):
    rng = np.random.default_rng(0)

    def largest(vectors):
        noise = rng.standard_normal((20000, *vectors.shape))
        return np.abs((noise * vectors).sum(-1) / np.linalg.norm(noise, axis=-1) / np.linalg.norm(vectors, axis=-1)).max(-1)

    assert (largest(rng.standard_normal((count, 16))) < why.random_cosine(16, count)).mean() == pytest.approx(0.95, abs=0.006)


def test_the_bound_is_not_exceeded_more_often_if_all_vectors_share_one_random_direction():
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((12, 16)) + 2 * rng.standard_normal(16)
    noise = rng.standard_normal((20000, 16))
    cosines = np.abs(noise @ vectors.T) / np.linalg.norm(noise, axis=1)[:, None] / np.linalg.norm(vectors, axis=1)
    assert (cosines.max(1) < why.random_cosine(16, 12)).mean() > 0.95


def test_entropies_and_steps_are_paired_by_problem(tiny):
    problems, sampling = tasks.load("arithmetic", "dev", 4), Sampling(n=2, max_new_tokens=150, details=True)
    before = rollouts(tiny, problems, sampling)
    same = why.step_changes(tiny, before, before, problems)
    assert same["kind"].tolist() == list(why.STEPS) and not same["difference"].to_numpy().any()
    lines = sum(r.text.partition("<think>")[2].partition("</think>")[0].strip().count("\n") + 1 for r in before)
    assert same["base"].sum() * len(before) == pytest.approx(lines)
    doubled = [replace(r, entropies=tuple(2 * h for h in r.entropies)) for r in before]
    table = why.entropy_changes(before, doubled).set_index("phase")
    assert table["changed"].to_numpy() == pytest.approx(2 * table["base"].to_numpy())
    assert table["difference"].to_numpy() == pytest.approx(table["base"].to_numpy())


def test_undoing_the_edited_heads_undoes_all_and_random_heads_nothing_before_them(tiny, tmp_path):
    heads = ((0, 1), (0, 5))
    changed, problems = scaled(tiny, heads), tasks.load("arithmetic", "dev", 12)
    settings = {"sampling": Sampling(n=2, max_new_tokens=80), "draws": 1, "out": tmp_path}
    table = why.undo(Condition(tiny), Condition(changed), heads, problems, **settings)
    rows = table.set_index(["heads", "way", "measure"])["change"]
    for measure in why.MEASURES:
        whole = rows[why.WHOLE, "", measure]
        # All of the change is in these heads: put back they give base's tokens, alone those of the changed model.
        assert rows["top", "put back", measure] == pytest.approx(whole) and rows["top", "alone", measure] == pytest.approx(whole)
        assert rows["random 0", "alone", measure] == 0  # other heads of the first layer did not change
    assert rows[why.WHOLE, "", "think_tokens"] != 0
    assert table[table["heads"] == "top"]["which"].unique().tolist() == ["0.1, 0.5"]


def test_no_two_random_controls_are_the_same_heads(tiny, monkeypatch):
    like = Plan((HeadEdit(0, 1, "scale", 1.0),), None, "one head", tiny.provenance())
    drawn = [edits.random_heads(like, tiny.layout, seed=seed).heads for seed in range(7)]
    assert len({frozenset(heads) for heads in drawn}) < 7  # seeds choose equal heads
    problems, sampled = tasks.load("arithmetic", "dev", 2), made_up(2)  # the lengths do not matter here
    monkeypatch.setattr(generate, "rollouts", lambda *a, **k: [r for r in sampled if r.sample < 2])
    monkeypatch.setattr(why, "patch", lambda *a: None)
    monkeypatch.setattr(why, "patched", lambda target, _: target)
    for draws, different in ((3, 3), (7, 7), (9, 7)):  # seven other heads are in the layer
        table = why.undo(Condition(tiny), Condition(tiny), ((0, 1),), problems, Sampling(n=2), draws=draws)
        random = table[table["heads"].str.startswith("random")]
        assert random["heads"].nunique() == random["which"].nunique() == different
    first = edits.different_draws(lambda seed: edits.random_heads(like, tiny.layout, seed=seed), 1, seed=0)
    assert [plan.heads for plan in first] == drawn[:1]


def test_problems_that_the_changed_model_was_made_from_are_refused(tiny):
    problems = tasks.load("arithmetic", "dev", 3)
    changed = replace(scaled(tiny, [(0, 0)]), made_from=(origins.record(p.id for p in problems),))
    with pytest.raises(evaluate.OverlapError):
        why.undo(Condition(tiny), Condition(changed), ((0, 0),), problems)


def test_with_allowed_overlap_the_whole_analysis_runs_and_its_page_says_that_problems_are_not_held_out(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(why_page, "extraction_rollouts", lambda *a, **k: [])
    monkeypatch.setattr(why_page, "extract_direction", lambda *a, **k: (direction_of(tiny), None))
    numbers = ["alone", "put back", *(f"{name}{end}" for name in ("effect", "share", "whole") for end in ("", "_low", "_high"))]
    effects = pd.DataFrame([(*h, *[0.1] * len(numbers)) for h in tiny.layout.all_heads], columns=["layer", "head", *numbers])
    monkeypatch.setattr(why, "head_effects", lambda *a, **k: effects)
    monkeypatch.setattr(why, "length_pairs", lambda *a: [])
    study = jobs.Study("arithmetic", problems=4, samples=1, max_new_tokens=12, allow_overlap=True)
    test = study.load("test", tiny)
    changed = replace(scaled(tiny, [(0, 1), (0, 5)]), made_from=(origins.record_in(origins.record([test[0].id, test[3].id])),))
    settings = jobs.WhySettings(heads=((0, 1),), draws=1, pairs=2)
    with pytest.raises(evaluate.OverlapError, match="was made from 2 of the 8 problems"):
        jobs.why_report(tiny, changed, replace(study, allow_overlap=False), settings, tmp_path)
    assert not list(tmp_path.iterdir())
    jobs.why_report(tiny, changed, study, settings, tmp_path)
    assert "NOT held out: of the 8 dev and test problems, changed was made from 2." in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "why.json").read_text())["overlap"] == {"base": 0, "changed": 2}


def test_changes_that_patched_heads_would_miss_are_refused_before_anything_is_sampled(tiny):
    v = direction_of(tiny)
    plan = Plan((HeadEdit(1, 2, "scale", 1.0),), None, "one head", tiny.provenance())
    for act in (edits.RuntimeEdit(plan), steering(v, 0.1, where="attn_out")):
        with pytest.raises(ValueError, match="patching heads would miss it"):
            jobs.find_reasons(Condition(tiny), Condition(tiny, (act,)), v, {"dev": [], "test": []})


def test_models_of_other_shapes_are_refused_before_anything_is_sampled(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(why_page, "extraction_rollouts", lambda *a, **k: pytest.fail("responses were sampled"))
    with pytest.raises(WrongModelError, match="patch between models of one architecture"):
        jobs.why_report(tiny, zoo.model_of_type("qwen3"), jobs.Study(problems=4, samples=2), jobs.WhySettings(), tmp_path)


def test_two_models_of_the_same_weights_are_refused_before_anything_is_sampled(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(why_page, "extraction_rollouts", lambda *a, **k: pytest.fail("responses were sampled"))
    with pytest.raises(ValueError, match="have the same weights"):
        jobs.why_report(tiny, tiny, jobs.Study(problems=8, samples=2), jobs.WhySettings(), tmp_path)


def test_responses_for_the_tables_are_sampled_with_every_given_setting(tiny, monkeypatch):
    asked = []

    def stop(target, problems, sampling, **kwargs):
        asked.append(sampling)
        raise InterruptedError

    monkeypatch.setattr(generate, "rollouts", stop)
    given = Sampling(3, 0.6, 0.9, 20, max_new_tokens=40, seed=5, batch_size=8)
    with pytest.raises(InterruptedError):
        why.find_reasons(Condition(tiny), Condition(tiny), direction_of(tiny), {"dev": [], "test": []}, given)
    assert asked == [replace(given, details=True)]


def test_the_figure_shows_every_head_and_random_controls_in_grey():
    content = json.loads((Path(__file__).parents[2] / "data" / "why" / "results.json").read_text())
    tables = {k: pd.DataFrame(rows) for k, rows in content["reasons"]["ThinkEdit (ours)"]["tables"].items()}
    drawn = figures.reasons(tables, "Why")
    grid = next(trace.z for trace in drawn.data if trace.type == "heatmap")
    shown = tables["heads"].set_index(["layer", "head"])["effect"]
    assert grid.shape == (4, 8) and grid[2][4] == shown[2, 4] and grid[3][2] == shown[3, 2]
    colours = {
        name: trace.marker.color for trace in drawn.data if trace.type == "scatter" for name in trace.y if isinstance(name, str)
    }
    assert len({colours[f"random {i}, {way}"] for i in range(3) for way in ("put back", "alone")}) == 1
    assert len({colours["top, put back"], colours["top, alone"], colours["random 0, alone"]}) == 3
