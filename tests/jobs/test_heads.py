"""Heads through every lens: agreement of lenses, entropy when masked, detected patterns, conditions seen through them."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import hypergeom, spearmanr

from toolkit import attention, bridges, edits, entropies, figures, generate, jobs, stats, store, tasks
from toolkit.generate import Sampling
from toolkit.jobs import heads
from toolkit.lm import Condition, NoThinkTagsError
from toolkit.methods import phase_entropy
from toolkit.types import HeadEdit, HeadScores, Plan, Span


def scores_of(values, provenance) -> HeadScores:
    return HeadScores(torch.as_tensor(values, dtype=torch.float64), "made up", "share", provenance)


def lenses_of(provenance, n_layers: int = 4, n_heads: int = 8, seed: int = 0) -> dict[str, HeadScores]:
    rng = np.random.default_rng(seed)
    a, c = rng.normal(size=(2, n_layers, n_heads))
    return {"a": scores_of(a, provenance), "twice a": scores_of(2 * a, provenance), "c": scores_of(c, provenance)}


# --- agreement ------------------------------------------------------------------------------------------------


def test_a_lens_agrees_with_itself_rescaled_and_not_with_noise(provenance):
    table = jobs.agreement(lenses_of(provenance), 4).set_index("pair")
    same, other = table.loc["a / twice a"], table.loc["a / c"]
    assert same["shared"] == 4 and same["spearman"] == pytest.approx(1.0)
    assert same["p_holm"] < 0.05 and same["p_in_layer"] < 0.05
    assert other["p_holm"] > 0.05 and other["p_spearman"] > 0.05


def test_free_permutations_give_the_hypergeometric_p_and_ranks_the_spearman(provenance):
    some = lenses_of(provenance, seed=3)
    table = jobs.agreement(some, 6, times=20_000).set_index("pair")
    for pair, row in table.iterrows():
        a, b = (some[name].score.flatten().numpy() for name in pair.split(" / "))
        assert row["p"] == pytest.approx(hypergeom.sf(row["shared"] - 1, 32, 6, 6), abs=0.02)
        found = spearmanr(a, b)
        assert row["spearman"] == pytest.approx(found.statistic)
        assert row["p_spearman"] == pytest.approx(found.pvalue, abs=0.02)
        assert row["expected"] == pytest.approx(36 / 32)


def test_lenses_that_only_share_a_layer_agree_by_chance_within_it(provenance):
    """Both like layer 1, each other heads of it: more than free permutations share, not more than permutations within layers."""
    rng = np.random.default_rng(0)
    layer = np.zeros((4, 8))
    layer[1] = 10
    found = {name: scores_of(layer + rng.normal(size=(4, 8)), provenance) for name in ("a", "b")}
    row = jobs.agreement(found, 4).iloc[0]
    assert row["p_in_layer"] > 0.2 and row["p_holm"] == row["p_in_layer"], "one pair: nothing to correct"
    assert row["p"] < row["p_in_layer"]
    assert row["p_spearman"] < 0.05 < row["p_spearman_in_layer"]


def test_the_corrected_p_rarely_calls_lenses_alike_that_merely_like_the_same_layers(provenance):
    """The free permutation does so in about half of all cases."""
    rng, free, corrected = np.random.default_rng(0), [], []
    for trial in range(60):
        liked = 2 * rng.normal(size=(8, 1))
        some = {name: scores_of(liked + rng.normal(size=(8, 8)), provenance) for name in "ab"}
        row = jobs.agreement(some, 6, times=300, seed=trial).iloc[0]
        free.append(row["p"] <= 0.05)
        corrected.append(row["p_holm"] <= 0.05)
    assert np.mean(corrected) <= 0.1 and np.mean(free) > 0.3


def test_heads_that_tie_at_the_cut_are_shared_by_chance_only(provenance):
    """Two lenses that tell no head from another do not agree, whatever heads come first."""
    flat = {name: scores_of(np.zeros((2, 4)), provenance) for name in "ab"}
    row = jobs.agreement(flat, 2, times=50).iloc[0]
    assert row["shared"] == pytest.approx(row["expected"]) and row["p_holm"] == 1.0
    assert np.isnan(row["spearman"]) and np.isnan(row["p_spearman"])


def test_p_within_a_layer_equals_all_permutations_by_hand(provenance):
    values = {"a": [[3.0, 2.0, 1.0, 0.0]], "b": [[2.0, 3.0, 0.0, 1.0]]}
    row = jobs.agreement({k: scores_of(v, provenance) for k, v in values.items()}, 2, times=20_000).iloc[0]
    shared = [len({0, 1} & set(p[:2])) >= 2 for p in permutations(range(4))]
    assert row["p_in_layer"] == pytest.approx(np.mean(shared), abs=0.02)


def test_holm_equals_the_procedure_step_by_step():
    p = np.array([0.01, 0.04, 0.03, 0.005, 0.8])
    got = stats.holm(p)
    assert got == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.8])
    assert stats.holm(np.array([0.6, 0.7])) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("seed", range(3))
def test_holm_never_lowers_a_p_and_keeps_their_order(seed):
    p = np.random.default_rng(seed).uniform(size=12)
    got = stats.holm(p)
    assert (got >= p).all() and (got <= 1).all()
    assert (np.diff(got[np.argsort(p)]) >= 0).all()


# --- lenses ---------------------------------------------------------------------------------------------------


def test_entropy_when_masked_equals_masking_one_head_by_hand(tiny, problems_of):
    found = generate.rollouts(tiny, problems_of(3), Sampling(n=2, max_new_tokens=40), progress=False)
    change = jobs.entropy_sensitivity(tiny, found)
    layer, head = change.ranked()[0]
    silent = edits.apply(tiny, Plan((HeadEdit(layer, head, "scale", 1.0),), None, "by hand", tiny.provenance()))

    def mean(model) -> float:
        return float(np.mean([phase_entropy.phase_means(r).think for r in entropies.with_entropies(model, found)]))

    assert change.score[layer, head].item() == pytest.approx(mean(silent) - mean(tiny), abs=1e-4)
    assert change.score[layer, head] > 0


def test_entropy_when_masked_needs_thinking(tiny, problems_of):
    found = generate.rollouts(tiny, problems_of(1), Sampling(max_new_tokens=20), progress=False)
    with pytest.raises(NoThinkTagsError, match="None of the 1 rollouts"):
        jobs.entropy_sensitivity(tiny, [replace(r, think=None) for r in found])


def test_detected_patterns_equal_our_own_attention_rows(tiny, problems_of):
    ids = [list(r.token_ids) for r in generate.rollouts(tiny, problems_of(2), Sampling(max_new_tokens=30), progress=False)]
    found = bridges.detect_heads(tiny, ids)
    previous = torch.zeros(4, 8, dtype=torch.float64)
    duplicate = torch.zeros(4, 8, dtype=torch.float64)
    for row in ids:
        weights = attention.rows(tiny, row, Span(0, len(row))).double()
        tokens = torch.tensor(row)
        same = (tokens[:, None] == tokens[None]).tril(-1)
        previous += weights.diagonal(-1, dim1=2, dim2=3).sum(-1) / weights.sum((2, 3)) / len(ids)
        duplicate += (weights * same).sum((2, 3)) / weights.sum((2, 3)) / len(ids)
    assert torch.allclose(found["previous token"].score, previous, atol=1e-4)
    assert torch.allclose(found["duplicate token"].score, duplicate, atol=1e-4)


def test_induction_is_attention_to_what_followed_the_same_token_in_a_random_sequence_read_twice(tiny):
    """Each query's earlier equal token stands half a sequence back, so induction looks one past it."""
    ids = list(range(10, 40))
    score = bridges.detect_heads(tiny, [ids], repeated=30)["induction"].score
    order = torch.tensor(ids)[torch.randperm(30, generator=torch.Generator().manual_seed(0))]
    weights = attention.rows(tiny, order.repeat(2).tolist(), Span(0, 60)).double()
    expected = weights.diagonal(-29, dim1=2, dim2=3)[..., 1:].sum(-1) / weights.sum((2, 3))
    assert torch.allclose(score, expected, atol=1e-4)


def test_a_long_sequence_is_cut_for_its_patterns_and_no_activations_are_cached(tiny, monkeypatch):
    from transformer_lens.model_bridge import TransformerBridge

    monkeypatch.setattr(TransformerBridge, "run_with_cache", lambda *a, **k: pytest.fail("activations were cached"))
    ids = [10, 11, 12, 13] * 8
    cut, whole = bridges.detect_heads(tiny, [ids], longest=14), bridges.detect_heads(tiny, [ids])
    for name, scores in bridges.detect_heads(tiny, [ids[:14]]).items():
        assert torch.equal(cut[name].score, scores.score)
    assert not torch.allclose(cut["duplicate token"].score, whole["duplicate token"].score)


def test_patterns_need_sequences(tiny):
    with pytest.raises(ValueError, match="0 sequences"):
        bridges.detect_heads(tiny, [])
    with pytest.raises(ValueError, match="longest=1"):
        bridges.detect_heads(tiny, [[10, 11]], longest=1)


# --- conditions -----------------------------------------------------------------------------------------------


def test_a_condition_seen_through_the_lenses_differs_from_base_only_if_it_does_something(tiny):
    study = jobs.Study(problems=4, samples=2, max_new_tokens=60)
    search = jobs.Search(instances=4, max_new_tokens=40)
    plan = Plan((HeadEdit(1, 2, "scale", 1.0), HeadEdit(1, 3, "scale", 1.0)), None, "two heads", tiny.provenance())
    judged = {
        "base": Condition(tiny),
        "again": Condition(tiny),
        "silenced": Condition(edits.apply(tiny, plan)),
    }
    table = jobs.condition_effects(judged, study, search.haystacks(tiny, "test"), plan.heads).set_index(["condition", "metric"])
    assert (table.loc["again", "difference"] == 0).all()
    assert table.loc[("silenced", "write"), "mean"] == 0, "a silenced head writes nothing"
    assert table.loc[("base", "write"), "low"] > 0
    assert set(table.loc["base"].index) == {
        "accuracy", "think_tokens", "think_entropy", "answer_entropy", "retrieved", "write",
    }  # fmt: skip


def test_conditions_are_compared_even_if_no_head_raises_the_needles_logits(tiny):
    """The atlas passes the heads with a positive write score, and a model may have none."""
    study = jobs.Study(problems=4, samples=2, max_new_tokens=60)
    haystacks = jobs.Search(instances=4, max_new_tokens=40).haystacks(tiny, "test")
    table = jobs.condition_effects({"base": Condition(tiny), "again": Condition(tiny)}, study, haystacks, [])
    assert (table.loc[table["metric"] == "write", ["mean", "difference"]].to_numpy() == 0).all()
    figures.differences(table, "write")


def test_the_table_has_a_row_a_head_best_first(provenance):
    some = lenses_of(provenance)
    table = heads.head_table(some)
    assert len(table) == 32 and table["a"].is_monotonic_decreasing
    assert table.iloc[0]["head"] == "{}.{}".format(*some["a"].ranked()[0])


def test_without_transformer_lens_the_atlas_says_so_before_any_work(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_lens.head_detector", None)
    with pytest.raises(ImportError, match=r"reasoning-length-toolkit\[lens\]"):
        jobs.atlas(tiny, jobs.Study(), jobs.Search(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_seed_of_the_study_seeds_the_random_controls_of_the_atlas(tiny, tmp_path, monkeypatch):
    seeds = []
    found = SimpleNamespace(plan=SimpleNamespace(direction=None), direction=None)

    def stop(lm, direction, settings):
        seeds.append(settings.seed)
        raise InterruptedError

    monkeypatch.setattr(heads.bridges, "check_transformer_lens", lambda: None)
    monkeypatch.setattr(heads, "extraction_rollouts", lambda *a, **k: [])
    monkeypatch.setattr(heads, "find_heads", lambda lm, rollouts, settings, *a, **k: seeds.append(settings.seed) or found)
    monkeypatch.setattr(heads.edit, "edit_conditions", lambda lm, findings, settings: seeds.append(settings.seed) or {})
    monkeypatch.setattr(heads.edit, "steering_conditions", stop)
    with pytest.raises(InterruptedError):
        jobs.atlas(tiny, jobs.Study(seed=7), jobs.Search(), tmp_path)
    assert seeds == [7, 7, 7]


def test_atlas_writes_what_it_returns(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "FEW", 4)
    search = jobs.Search(instances=4, max_new_tokens=40)
    found = generate.rollouts(tiny, tasks.load("arithmetic", "train", 30), Sampling(n=4, max_new_tokens=80), progress=False)
    atlas = jobs.atlas(tiny, jobs.Study(problems=3, samples=1, max_new_tokens=60), search, tmp_path / "out", rollouts=found)
    written = store.read_json(tmp_path / "out" / "atlas.json")
    assert [row["head"] for row in written["heads"]] == list(atlas.heads["head"])
    assert len(written["overlaps"]) == len(atlas.overlaps) == len(atlas.scores) * (len(atlas.scores) - 1) // 2
    assert {row["condition"] for row in written["conditions"]} >= {"base", jobs.OURS, "steered longer"}
    assert "plotly" in (tmp_path / "out" / "report.html").read_text()
