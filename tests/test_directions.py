"""States, estimators over them, dose and stability, against naive loops in fp64 and planted signals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from toolkit import collect, directions, hooks, passes
from toolkit.collect import THINK, States
from toolkit.lm import LM, NoThinkTagsError
from toolkit.positions import Positions
from toolkit.sites import Site
from toolkit.types import Rollout, Span

FAMILIES = ("llama", "gpt2")


@pytest.fixture(params=FAMILIES)
def family(request, model_of) -> LM:
    return model_of(request.param)


@pytest.fixture(scope="module")
def paired_rollouts(rollout_of) -> tuple[Rollout, ...]:
    """12 problems; each has two long and one or two short rollouts, but the last has only long ones."""
    found = []
    for i in range(12):
        sizes = [4 + i % 3, 20 + i, 30 - i] + ([5 + i % 2] if i % 2 else [])
        sizes = [20, 25] if i == 11 else sizes
        found += [replace(rollout_of(n, seed=s, name=f"q{i}"), sample=s) for s, n in enumerate(sizes)]
    return tuple(found)


@torch.no_grad()
def one_pass(lm: LM, rollout: Rollout, kind: str) -> Tensor:
    """``[seq, layers, width]`` of one sequence by itself, nothing padded."""
    with hooks.record(lm.layout, [Site(kind, layer) for layer in range(lm.layout.n_layers)]) as values:
        lm.model(input_ids=torch.tensor([rollout.token_ids]), use_cache=False)
    return torch.stack([values[Site(kind, layer)][0] for layer in range(lm.layout.n_layers)], dim=1).double()


def predictors(r: Rollout) -> range:
    return range(r.think.start - 1, r.think.stop - 1)


def made_up(
    provenance,
    *,
    problems: int = 40,
    rows: int = 4,
    layers: int = 2,
    width: int = 6,
    signal: Sequence[float] = (3.0, 0.0),
    seed: int = 0,
) -> States:
    """Half of each problem's rows long; long rows are shifted by ``signal[layer]`` along the first axis. Problems differ too."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(problems, 1, layers, width)) + rng.normal(size=(problems, rows, layers, width))
    long = np.arange(rows) % 2 == 0
    values[:, long, :, 0] += np.asarray(signal)
    tokens = np.where(long, 100, 10)[None].repeat(problems, 0).ravel() + rng.integers(0, 9, problems * rows)
    table = pd.DataFrame(
        {
            "problem_id": [f"p{i}" for i in range(problems) for _ in range(rows)],
            "sample": list(range(rows)) * problems,
            "label": ["long" if x else "short" for x in long] * problems,
            "think_tokens": tokens,
        }
    )
    return States(torch.from_numpy(values.reshape(-1, layers, width)).float(), table, "resid_post", "think", provenance)


# --- states --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resid_mid", "resid_post", "z"])
def test_states_are_the_naive_means_row_by_row_in_the_order_given(family, kind, mixed_rollouts, by_length, monkeypatch):
    monkeypatch.setattr(passes, "BATCH_TOKENS", 130)
    found = collect.states(family, mixed_rollouts, kind, by=by_length)
    kept = [r for r in mixed_rollouts if by_length(r) and r.think_tokens]
    assert found.values.dtype == torch.float32 and found.values.shape == (len(kept), 3, family.layout.width(kind))
    for row, r in enumerate(kept):
        naive = sum(one_pass(family, r, kind)[t] for t in predictors(r)) / r.think_tokens
        assert torch.allclose(found.values[row].double(), naive, atol=1e-4)
    assert found.rows.problem_id.tolist() == [r.problem_id for r in kept]
    assert found.rows.label.tolist() == [by_length(r) for r in kept]
    assert found.rows.think_tokens.tolist() == [r.think_tokens for r in kept]
    assert (found.kind, found.positions, found.provenance.fingerprint) == (kind, "think", family.fingerprint)
    assert "remaining" not in found.rows


def test_single_positions_know_what_was_read_and_what_remains(family, mixed_rollouts, monkeypatch):
    monkeypatch.setattr(passes, "BATCH_TOKENS", 130)
    found = collect.states(family, mixed_rollouts, "resid_post", each=True)
    row = 0
    for r in mixed_rollouts:
        if not r.think_tokens:
            continue
        naive = one_pass(family, r, "resid_post")
        for t in predictors(r):
            assert torch.allclose(found.values[row].double(), naive[t], atol=1e-4)
            read = sum(r.think.start <= i <= t for i in range(len(r.token_ids)))
            line = found.rows.iloc[row]
            assert (line.problem_id, line.position) == (r.problem_id, read)
            assert line.remaining == r.think_tokens - read if r.closed else math.isnan(line.remaining)
            row += 1
    assert row == len(found.rows) == len(found.values)
    closed = found.rows[found.rows.remaining.notna()].groupby("problem_id")
    assert (closed.remaining.max() == closed.think_tokens.first()).all() and (closed.remaining.min() == 1).all()


def test_all_thinking_is_read_and_none_remains_outside_of_it(llama, rollout_of):
    """Positions of the whole sequence. They had negative numbers of remaining tokens in the answer."""
    whole = Positions("whole", lambda r: range(len(r.token_ids)))
    closed, cut = rollout_of(6, name="closed"), rollout_of(6, name="cut", closed=False)
    silent = replace(rollout_of(6, name="silent"), think=None, answer=Span(5, 15))
    called = replace(
        rollout_of(6, name="called"), results=(Span(8, 10), Span(13, 14))
    )  # tool results in thinking and in the answer
    rows = collect.states(llama, [closed, cut, silent, called], "resid_post", positions=whole, each=True).rows
    for r in (closed, cut, silent, called):
        of, placed = rows[rows.problem_id == r.problem_id], {t for span in r.results for t in range(span.start, span.stop)}
        assert len(of) == len(r.token_ids)
        for t, line in enumerate(of.itertuples()):
            counted = range(r.think.start, r.think.stop) if r.think else range(r.prompt_len, len(r.token_ids))
            read, after = (sum(i in counted and i not in placed for i in part) for part in (range(t + 1), range(t + 1, 999)))
            assert line.position == read
            assert line.remaining == after if r in (closed, called) else math.isnan(line.remaining)
    assert (rows.remaining.dropna() >= 0).all() and (rows.remaining == 0).any()


def test_a_subsample_of_positions_follows_seed_and_rollout_only(llama, mixed_rollouts, rollout_of):
    r = rollout_of(30)
    few = collect.sample_positions(THINK, 5, seed=3)
    assert few.of(r) == few.of(r) and len(set(few.of(r))) == 5 and list(few.of(r)) == sorted(few.of(r))
    assert set(few.of(r)) <= set(predictors(r))
    assert collect.sample_positions(THINK, 5, seed=4).of(r) != few.of(r)
    assert few.of(replace(r, sample=1)) != few.of(r)
    assert list(few.of(rollout_of(4))) == list(predictors(rollout_of(4)))
    everything = collect.states(llama, mixed_rollouts, "resid_mid", positions=few, each=True)
    part = collect.states(llama, mixed_rollouts[3:9], "resid_mid", positions=few, each=True)
    same = everything.rows.problem_id.isin(part.rows.problem_id).to_numpy()
    for chosen in (same, np.flatnonzero(same)):
        pd.testing.assert_frame_equal(everything.take(chosen).rows, part.rows)
        assert torch.allclose(everything.take(chosen).values, part.values, atol=1e-5)
    assert everything.positions == "5 of think"
    with pytest.raises(ValueError, match="at_most=0"):
        collect.sample_positions(THINK, 0)


def test_every_position_is_drawn_about_equally_often(rollout_of):
    few, counts = collect.sample_positions(THINK, 2), np.zeros(8)
    for i in range(2000):
        r = replace(rollout_of(8), sample=i)
        counts[np.asarray(few.of(r)) - (r.think.start - 1)] += 1
    assert abs(counts / 500 - 1).max() < 0.15


def test_states_after_running_out_of_memory_are_the_same(llama, mixed_rollouts):
    def crowded(module, args, output):
        if len(output[0] if isinstance(output, tuple) else output) > 3:
            raise RuntimeError("can't allocate memory: 1 TB")

    expected = collect.states(llama, mixed_rollouts, "resid_post", each=True)
    handle = llama.layout.blocks[1].mlp.register_forward_hook(crowded)
    try:
        found = collect.states(llama, mixed_rollouts, "resid_post", each=True)
    finally:
        handle.remove()
    pd.testing.assert_frame_equal(found.rows, expected.rows)
    assert torch.allclose(found.values, expected.values, atol=1e-4)


def test_states_need_positions_and_name_their_classes(llama, rollout_of, provenance):
    with pytest.raises(NoThinkTagsError, match="None of the 1 rollouts"):
        collect.states(llama, [rollout_of(0)], "resid_post")
    with pytest.raises(KeyError, match="No class 'medium' in these states: choose one of long, short"):
        made_up(provenance).of("medium")


# --- differences of means ------------------------------------------------------------------------------------


def test_the_unpaired_difference_of_states_is_that_of_moments(family, mixed_rollouts, by_length):
    ours = directions.unpaired_difference(collect.states(family, mixed_rollouts, "resid_mid", by=by_length))
    moments = collect.moments(family, mixed_rollouts, by_length, kinds=("resid_mid",))
    theirs = directions.mean_difference(moments, "resid_mid")
    assert torch.allclose(ours.vector, theirs.vector, atol=1e-5)
    assert (ours.n_pos, ours.n_neg, ours.kind, ours.positions, ours.estimator) == (
        theirs.n_pos, theirs.n_neg, theirs.kind, theirs.positions, theirs.estimator,
    )  # fmt: skip


def test_the_paired_difference_equals_loops_over_problems(family, paired_rollouts, by_length):
    ours = directions.paired_difference(collect.states(family, paired_rollouts, "resid_post", by=by_length))
    deltas = []
    for problem in sorted({r.problem_id for r in paired_rollouts}):
        sides: dict[str, list[Tensor]] = {"long": [], "short": []}
        for r in paired_rollouts:
            if r.problem_id == problem:
                sides[by_length(r)].append(one_pass(family, r, "resid_post")[list(predictors(r))].mean(dim=0))
        if all(sides.values()):
            deltas.append(sum(sides["long"]) / len(sides["long"]) - sum(sides["short"]) / len(sides["short"]))
    assert torch.allclose(ours.vector, sum(deltas) / len(deltas), atol=1e-4)
    assert (len(deltas), ours.n_pos, ours.n_neg) == (11, 11, 11)
    assert ours.estimator == "paired_mean_difference"


def test_pairing_removes_what_differs_between_problems(provenance):
    """Hard problems are thought about long, and look different: only the paired estimator leaves that out."""
    states = made_up(provenance, signal=(3.0, 3.0))
    hard = np.arange(40) < 20
    values = states.values.view(40, 4, 2, 6).clone()
    values[hard, :, :, 5] += 10
    keep = [4 * i + s for i in range(40) for s in ((0, 2, 1) if hard[i] else (0, 1, 3))]
    states = replace(states, values=values.view(-1, 2, 6)).take(keep)
    axis = torch.zeros(2, 6, dtype=torch.float64)
    axis[:, 0] = 1
    unpaired, paired = (
        torch.cosine_similarity(e(states).vector, axis, dim=-1)
        for e in (directions.unpaired_difference, directions.paired_difference)
    )
    assert (paired > 0.95).all() and (unpaired < 0.85).all()


def test_nothing_to_pair_is_a_named_error(llama, mixed_rollouts, by_length):
    states = collect.states(llama, mixed_rollouts, "resid_mid", by=by_length)
    for estimator in (directions.paired_difference, directions.paired_pca):
        with pytest.raises(directions.NoPairsError, match=r"None of the 20 problems has both a 'long' and a 'short'.*unpaired"):
            estimator(states)


# --- principal components and probes as directions -----------------------------------------------------------


def top_eigenvector(C: Tensor) -> Tensor:
    return torch.linalg.eigh(C).eigenvectors[:, -1]


def test_pca_is_the_top_eigenvector_signed_and_scaled_by_the_mean_difference(family, paired_rollouts, by_length):
    states = collect.states(family, paired_rollouts, "resid_post", by=by_length)
    plain, ours = directions.unpaired_difference(states), directions.pca(states)
    for layer in range(3):
        x = states.values[:, layer].double()
        centred = x - x.mean(dim=0)
        expected = top_eigenvector(centred.T @ centred)
        assert abs(torch.cosine_similarity(ours.vector[layer], expected, dim=0)) == pytest.approx(1, abs=1e-6)
    assert (directions.cosine(ours, plain) >= 0).all() and torch.allclose(ours.norms, plain.norms)


def test_paired_pca_keeps_the_common_difference(family, paired_rollouts, by_length):
    states = collect.states(family, paired_rollouts, "resid_post", by=by_length)
    plain, ours = directions.paired_difference(states), directions.paired_pca(states)
    delta = directions.differences(states)
    for layer in range(3):
        expected = top_eigenvector(sum(torch.outer(d, d) for d in delta[:, layer]))
        assert abs(torch.cosine_similarity(ours.vector[layer], expected, dim=0)) == pytest.approx(1, abs=1e-6)
    assert (directions.cosine(ours, plain) >= 0).all() and torch.allclose(ours.norms, plain.norms)
    one = states.take(np.flatnonzero(states.rows.problem_id == "q0"))
    assert directions.cosine(directions.paired_pca(one), directions.paired_difference(one)).numpy() == pytest.approx(1)


def test_logistic_is_the_gradient_of_a_probe_whose_own_objective_is_flat(provenance):
    """Mean loss with balanced classes + penalty/2 |w|^2 over standardised features, differentiated by hand."""
    states = made_up(provenance, signal=(1.5, 0.5))
    keep = np.flatnonzero((states.rows.label == "long") | (states.rows["sample"] == 1))  # 80 long, 40 short
    states = states.take(keep)
    ours = directions.logistic(states, penalty=0.5)
    y = (states.rows.label == "long").to_numpy()
    for layer in range(2):
        x = states.values[:, layer].double().numpy()
        mean, scale = x.mean(0), x.std(0)
        x = (x - mean) / scale
        fitted = directions.logistic_model(len(y), 0.5).fit(states.values[:, layer].double().numpy(), y)
        w, b = fitted[-1].coef_[0], fitted[-1].intercept_[0]
        weight = np.where(y, len(y) / (2 * y.sum()), len(y) / (2 * (~y).sum()))
        slope = weight * (1 / (1 + np.exp(-(x @ w + b))) - y) / len(y)
        assert abs(x.T @ slope + 0.5 * w).max() < 1e-4 and abs(slope.sum()) < 1e-4
        expected = torch.from_numpy(w / scale)
        assert torch.cosine_similarity(ours.vector[layer], expected, dim=0) == pytest.approx(1, abs=1e-6)
    assert torch.allclose(ours.norms, directions.unpaired_difference(states).norms)
    assert (ours.n_pos, ours.n_neg, ours.estimator) == (80, 40, "logistic")


@pytest.mark.parametrize("target", ["think_tokens", "remaining"])
def test_ridge_equals_the_closed_form(family, mixed_rollouts, target):
    states = collect.states(family, mixed_rollouts, "resid_mid", positions=collect.sample_positions(THINK, 3), each=True)
    ours = directions.ridge(states, target, penalty=0.3)
    kept = states.rows[target].notna().to_numpy().copy()
    assert kept.all() == (target == "think_tokens")
    y = np.log1p(states.rows[target].to_numpy(float)[kept])
    for layer in range(3):
        x = states.values[kept, layer].double().numpy()
        z = (x - x.mean(0)) / x.std(0)
        w = np.linalg.solve(z.T @ z + 0.3 * len(y) * np.eye(z.shape[1]), z.T @ (y - y.mean())) / x.std(0)
        assert torch.cosine_similarity(ours.vector[layer], torch.from_numpy(w), dim=0) == pytest.approx(1, abs=1e-6)
        above = y > np.median(y)
        gap = x[above].mean(0) - x[~above].mean(0)
        assert ours.norms[layer].item() == pytest.approx(np.linalg.norm(gap), rel=1e-6)
    assert (ours.n_pos, ours.n_neg) == (above.sum(), (~above).sum())
    assert ours.estimator == f"ridge({target})"


ESTIMATORS = (
    directions.unpaired_difference,
    directions.paired_difference,
    directions.pca,
    directions.paired_pca,
    directions.logistic,
    directions.ridge,
)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_finds_a_planted_direction_and_plus_is_longer(estimator, provenance):
    states = made_up(provenance, signal=(6.0, -6.0))
    axis = torch.zeros(2, 6, dtype=torch.float64)
    axis[0, 0], axis[1, 0] = 1, -1
    v = estimator(states)
    assert (torch.cosine_similarity(v.vector, axis, dim=-1) > 0.9).all()
    assert v.vector.dtype == torch.float64


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_layer_where_nothing_varies_has_the_zero_direction(estimator, provenance):
    states = made_up(provenance)
    flat = states.values.clone()
    flat[:, 1] = 1.0
    v = estimator(replace(states, values=flat))
    assert torch.isfinite(v.vector).all() and not v.vector[1].any() and v.vector[0].any()


def test_a_target_that_does_not_vary_is_refused(provenance):
    states = made_up(provenance)
    with pytest.raises(ValueError, match="'think_tokens' does not vary enough over 160 rows"):
        directions.ridge(replace(states, rows=states.rows.assign(think_tokens=7)))


def test_cosines_name_every_pair_once(provenance):
    states = made_up(provenance)
    named = {e.__name__: e(states) for e in ESTIMATORS[:3]}
    table = directions.cosines(named)
    assert list(table) == ["unpaired_difference / paired_difference", "unpaired_difference / pca", "paired_difference / pca"]
    a, b = named["unpaired_difference"].vector, named["pca"].vector
    naive = [float(a[i] @ b[i] / (a[i].norm() * b[i].norm())) for i in range(2)]
    assert table["unpaired_difference / pca"].tolist() == pytest.approx(naive)


# --- dose ----------------------------------------------------------------------------------------------------


def test_typical_norms_equal_loops_with_and_without_second_moments(family, mixed_rollouts, by_length):
    kept = [r for r in mixed_rollouts if by_length(r) and r.think_tokens]
    squares = sum(one_pass(family, r, "resid_post")[list(predictors(r))].square().sum(-1).mean(0) for r in kept)
    expected = (squares / len(kept)).sqrt()
    assert torch.allclose(collect.typical_norm(family, kept, "resid_post"), expected, rtol=1e-5)
    moments = collect.moments(family, mixed_rollouts, by_length, kinds=("resid_post",), second=("resid_post",))
    assert torch.allclose(directions.typical_norm(moments, "resid_post"), expected, rtol=1e-5)
    with pytest.raises(KeyError, match=r"collect.typical_norm"):
        directions.typical_norm(moments, "resid_mid")


def test_the_spread_measured_by_projection_is_that_of_the_outer_products(family, mixed_rollouts, by_length):
    v = None
    for kind in ("resid_mid", "resid_post"):
        moments = collect.moments(family, mixed_rollouts, by_length, kinds=(kind,), second=(kind,))
        v = directions.mean_difference(moments, kind)
        measured = collect.spread(family, mixed_rollouts, v, by_length)
        assert torch.allclose(measured.separation, directions.separation(moments, v), rtol=1e-4)
        assert torch.allclose(measured.typical, directions.typical_norm(moments, kind), rtol=1e-5)
    with pytest.raises(KeyError, match="No rollout of class 'short': the classes are long"):
        collect.spread(family, mixed_rollouts, v, lambda r: "long" if by_length(r) == "long" else None)


def test_relative_dose_is_what_is_added_beside_what_it_is_added_to(provenance):
    v = directions.unpaired_difference(made_up(provenance))
    typical = torch.tensor([4.0, 0.5], dtype=torch.float64)
    naive = [float((-0.3 * v.vector[i]).norm() / typical[i]) for i in range(2)]
    assert directions.relative_dose(v, -0.3, typical).tolist() == pytest.approx(naive)
    scaled = directions.in_typical_units(v, typical)
    assert directions.relative_dose(scaled, -0.3, typical).tolist() == pytest.approx([0.3, 0.3])
    assert directions.cosine(scaled, v).tolist() == pytest.approx([1, 1])
    assert scaled.estimator == "mean_difference, typical norm"


# --- stability -----------------------------------------------------------------------------------------------


def naive_paired(values: Tensor, labels: Sequence[str], groups: Sequence[Sequence[int]]) -> Tensor:
    deltas = []
    for group in groups:
        long = [values[i] for i in group if labels[i] == "long"]
        short = [values[i] for i in group if labels[i] == "short"]
        deltas.append(sum(long) / len(long) - sum(short) / len(short))
    return sum(deltas) / len(deltas)


def test_bootstrap_cosines_equal_a_loop_in_which_a_problem_drawn_twice_counts_twice(provenance):
    states = made_up(provenance, problems=9, signal=(1.0, 0.2))
    ours = directions.bootstrap_cosine(states, directions.paired_difference, times=20, seed=5)
    values, labels = states.values.double(), states.rows.label.tolist()
    groups = [[i for i, p in enumerate(states.rows.problem_id) if p == f"p{k}"] for k in range(9)]
    full = naive_paired(values, labels, groups)
    drawn = np.random.default_rng(5).integers(0, 9, (20, 9))
    found = [torch.cosine_similarity(naive_paired(values, labels, [groups[k] for k in row]), full, dim=-1) for row in drawn]
    found = torch.stack(found).numpy()
    assert ours["mean"].to_numpy() == pytest.approx(found.mean(0))
    assert ours["low"].to_numpy() == pytest.approx(np.quantile(found, 0.025, axis=0))
    assert ours["high"].to_numpy() == pytest.approx(np.quantile(found, 0.975, axis=0))


@pytest.mark.parametrize("estimator", ESTIMATORS[:2])
def test_a_strong_direction_is_stable_and_noise_has_the_cosines_the_docstring_says(estimator, provenance):
    states = made_up(provenance, width=200, signal=(20.0, 0.0))
    boot = directions.bootstrap_cosine(states, estimator, times=40)
    halves = directions.split_half_cosine(states, estimator, times=40)
    assert boot.low[0] > 0.95 and halves.low[0] > 0.9
    assert boot["mean"][1] == pytest.approx(1 / math.sqrt(2), abs=0.06)
    assert halves["mean"][1] == pytest.approx(0, abs=0.06)
    assert boot.index.name == "layer" and list(boot) == ["mean", "low", "high"]


def test_halves_share_no_problem(provenance):
    states, seen = made_up(provenance, problems=7), []

    def spy(part: States):
        seen.append({p.partition("#")[0] for p in part.rows.problem_id})
        return directions.paired_difference(part)

    directions.split_half_cosine(states, spy, times=5)
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert not first & second and len(first) == 3 and len(second) == 4
    with pytest.raises(ValueError, match="1 problem cannot be split"):
        directions.split_half_cosine(states.take([0, 1]), spy)


@pytest.mark.parametrize("measure", [directions.bootstrap_cosine, directions.split_half_cosine])
def test_resamples_without_a_class_are_drawn_again(measure, provenance):
    """Two of six problems have long thinking: of the resamples, (4/6)^6 = 9 % lack it, and of the splits 2 in 5 have a half without it."""
    states, missing = made_up(provenance, problems=6, signal=(3.0, 0.0)), []
    states = states.take(((states.rows.label == "short") | states.rows.problem_id.isin(["p1", "p4"])).to_numpy())

    def watched(part: States):
        missing.append("long" not in set(part.rows.label))
        return directions.unpaired_difference(part)

    table = measure(states, watched, times=60)
    assert any(missing) and np.isfinite(table.to_numpy()).all() and (table.low < table.high).all()
    pd.testing.assert_frame_equal(table, measure(states, directions.unpaired_difference, times=60))


def test_too_few_problems_of_a_class_are_an_error_that_says_so(provenance):
    states = made_up(provenance, problems=6)
    short = states.take((states.rows.label == "short").to_numpy())
    one = states.take(((states.rows.label == "short") | (states.rows.problem_id == "p2")).to_numpy())
    with pytest.raises(ValueError, match=r"100 draws from 6 problems.*'long'.*more problems"):
        directions.split_half_cosine(one, directions.unpaired_difference, times=5)
    with pytest.raises(KeyError, match="No class 'long'"):
        directions.split_half_cosine(short, directions.unpaired_difference, times=5)
    with pytest.raises(KeyError, match="No class 'long'"):
        directions.bootstrap_cosine(short, directions.unpaired_difference, times=5)


def test_stability_of_a_real_direction(family, mixed_rollouts, by_length):
    states = collect.states(family, mixed_rollouts, "resid_post", by=by_length)
    table = directions.bootstrap_cosine(states, directions.unpaired_difference, times=20)
    assert ((table.low <= table["mean"]) & (table["mean"] <= table.high) & (table.high <= 1 + 1e-9)).all()
    again = directions.bootstrap_cosine(states, directions.unpaired_difference, times=20)
    pd.testing.assert_frame_equal(table, again)
