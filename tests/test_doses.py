"""Dose-response: what is tabulated is what was sampled; the usable range, the dial and the choice follow their stated rules."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from toolkit import collect, directions, doses, edits, entropies, evaluate, figures
from toolkit.doses import Doses, DoseSweep
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition, NoThinkTagsError
from toolkit.methods import efficiency_steering
from toolkit.phases import Scope
from toolkit.types import Direction, Provenance, Report

SAMPLING = Sampling(n=2, max_new_tokens=60, seed=1, details=True)


def direction_of(lm: LM, scale: float = 0.3) -> Direction:
    vector = scale * torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(0))
    return Direction(vector, "resid_post", "think", "by hand", 1, 1, lm.provenance())


@pytest.fixture(scope="module")
def swept(tiny, problems_of) -> Doses:
    v = direction_of(tiny)
    named = {"length": v, doses.RANDOM: directions.random_like(v, seed=0)}
    return doses.sweep(tiny, named, problems_of(4), SAMPLING, DoseSweep((-0.5, 0.5), layers=(1, 2)))


def test_every_direction_has_every_strength_and_zero_is_the_base(swept):
    for name in ("length", doses.RANDOM):
        rows = swept.curve(name, "think_tokens")
        assert rows.index.tolist() == [-0.5, 0.0, 0.5]
        assert rows["mean"][0.0] == pytest.approx(evaluate.outcomes(swept.report, "base").think_tokens.mean())
        assert (rows["low"] <= rows["mean"]).all() and (rows["mean"] <= rows["high"]).all()
    with pytest.raises(KeyError, match="length, random direction"):
        swept.curve("other", "think_tokens")


def test_a_dose_is_what_the_steered_model_samples(swept, tiny, problems_of):
    act = edits.steering(direction_of(tiny), 0.5, layers=(1, 2))
    found = rollouts(Condition(tiny, (act,)), problems_of(4), SAMPLING, progress=False)
    lengths = np.array([r.think_tokens for r in found]).reshape(4, 2)
    assert swept.curve("length", "think_tokens")["mean"][0.5] == pytest.approx(lengths.mean())
    assert swept.curve("length", "think_tokens_q50")["mean"][0.5] == pytest.approx(np.median(lengths))


def test_perplexity_is_of_the_bases_own_responses(swept, tiny, problems_of):
    found = rollouts(tiny, problems_of(4), SAMPLING, progress=False)
    own = -np.concatenate([r.logprobs for r in found])
    assert swept.curve("length", "perplexity")["mean"][0.0] == pytest.approx(np.exp(own.mean()), rel=1e-4)
    act, loss = edits.steering(direction_of(tiny), 0.5, layers=(1, 2)), []
    for r in found:
        logp = collect.logits(tiny, r, act).log_softmax(-1)
        loss += [-logp[i, token].item() for i, token in enumerate(r.token_ids[r.prompt_len :])]
    assert swept.curve("length", "perplexity")["mean"][0.5] == pytest.approx(np.exp(np.mean(loss)), rel=1e-5)


def test_perplexity_holds_few_logits_at_a_time_and_equals_the_naive_formula(tiny, problems_of, monkeypatch):
    found = rollouts(tiny, problems_of(3), SAMPLING, progress=False)
    act, total = edits.steering(direction_of(tiny), 0.5, layers=(1, 2)), 0.0
    for r in found:
        logp = collect.logits(tiny, r, act).double().log_softmax(-1)
        total -= sum(logp[i, token].item() for i, token in enumerate(r.token_ids[r.prompt_len :]))
    naive = np.exp(total / sum(r.response_tokens for r in found))
    sizes = []
    monkeypatch.setattr(entropies, "with_entropies", partial(entropies.with_entropies, chunk=12 * tiny.vocab_size))
    head = tiny.model.get_output_embeddings()
    with head.register_forward_hook(lambda module, inputs, output: sizes.append(output[..., 0].numel())):
        measured, low, high = doses._perplexity(tiny, found, act)
    assert measured == pytest.approx(naive, rel=1e-6) and low < measured < high
    assert max(sizes) <= 12 < max(r.response_tokens for r in found)


def test_the_relative_dose_is_over_the_steered_layers(swept, tiny, problems_of):
    found = rollouts(tiny, problems_of(4), SAMPLING, progress=False)
    typical = collect.typical_norm(tiny, found, "resid_post")
    expected = (0.5 * direction_of(tiny).norms / typical)[[1, 2]].max()
    assert swept.curve("length", "relative_dose")["mean"][0.5] == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_without_think_tags_is_refused_before_anything_is_sampled(tiny, problems_of, tmp_path):
    bare = replace(tiny, tags=None)
    with pytest.raises(NoThinkTagsError, match=r"no think tags.*--think response"):
        doses.sweep(bare, {"length": direction_of(tiny)}, problems_of(1), SAMPLING, DoseSweep((0.5,)), out=tmp_path)
    assert not [*tmp_path.iterdir()]


def test_responses_that_never_think_still_get_a_relative_dose(tiny, problems_of):
    found = [replace(r, think=None) for r in rollouts(tiny, problems_of(1), SAMPLING, progress=False)]
    typical = doses.typical_norms(tiny, found, "resid_post")
    assert torch.equal(typical, collect.typical_norm(tiny, found, "resid_post", positions=doses.RESPONSE))


def test_a_sweep_that_was_killed_goes_on(tiny, problems_of, tmp_path):
    named, plan = {"length": direction_of(tiny)}, DoseSweep((0.5,))
    once = doses.sweep(tiny, named, problems_of(3), SAMPLING, plan, out=tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    again = doses.sweep(tiny, named, problems_of(3), SAMPLING, plan, out=tmp_path)
    assert stamps and stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    pd.testing.assert_frame_equal(once.table, again.table)


def made_up(closed: list[float], looping: list[float], lengths: list[float]) -> Doses:
    """Doses -1, -0.5, 0, 0.5, 1 with given outcomes; every response of a dose is as long as its mean."""
    strengths = [-1.0, -0.5, 0.0, 0.5, 1.0]
    rows, judged = [], []
    for i, a in enumerate(strengths):
        for metric, values in {"closed": closed, "looping": looping, "think_tokens": lengths, "accuracy": [0.5] * 5}.items():
            rows.append(("v", a, metric, values[i], values[i], values[i]))
        name = f"v {a:+g}" if a else "base"
        for sample in range(2):
            judged.append({"condition": name, "problem_id": "p", "sample": sample, "task": "", "difficulty": 0, "correct": True,
                           "think_tokens": lengths[i], "response_tokens": lengths[i] + 5, "closed": True, "looping": False, "leaking": False,
                           "finish": "stop"})  # fmt: skip
    table = pd.DataFrame(rows, columns=["direction", "strength", "metric", "mean", "low", "high"])
    frame = pd.DataFrame(judged)
    return Doses(
        table, Report(frame, {name: {} for name in frame["condition"].unique()}, "base", Provenance("m", None, "f" * 64, "t", "0"))
    )


@pytest.mark.parametrize(
    ("closed", "looping", "expected"),
    [
        ([1, 1, 1, 1, 1], [0, 0, 0, 0, 0], (-1, 1)),
        ([1, 1, 1, 1, 0.9], [0, 0, 0, 0, 0], (-1, 0.5)),
        ([1, 1, 1, 0.9, 1], [0, 0, 0, 0, 0], (-1, 0)),  # whole again beyond a break does not count
        ([1, 1, 1, 1, 1], [0.2, 0.04, 0, 0, 0], (-0.5, 1)),
    ],
)
def test_the_usable_range_ends_where_responses_break(closed, looping, expected):
    made = made_up([float(c) for c in closed], [float(x) for x in looping], [10.0, 20.0, 30.0, 40.0, 50.0])
    assert doses.usable_range(made, "v") == expected


def test_monotone_counts_only_the_usable_range():
    broken = made_up([1.0, 1.0, 1.0, 1.0, 0.2], [0.0] * 5, [10.0, 20.0, 30.0, 40.0, 5.0])
    assert doses.monotonicity(broken, "v") == pytest.approx(1.0)


def test_the_dial_takes_the_nearest_dose_and_counts_hits():
    made = made_up([1.0] * 5, [0.0] * 5, [10.0, 20.0, 30.0, 40.0, 50.0])
    dial = doses.targets(made, "v", shares=(0.5, 1.0, 1.4)).set_index("target")
    assert dial["strength"].to_dict() == {15.0: -1.0, 30.0: 0.0, 42.0: 0.5}
    assert dial.loc[30.0, ["precise", "flexible", "base_precise"]].tolist() == [100.0, 100.0, 100.0]
    assert dial.loc[42.0, ["precise", "flexible", "base_flexible"]].tolist() == [100.0, 100.0, 0.0]
    assert dial.loc[15.0, "rmse"] == pytest.approx(5.0)


def test_the_choice_is_made_layer_by_layer(tiny, problems_of):
    v = direction_of(tiny)
    plan = DoseSweep((-0.5, 0.5), layers=(1, 2), during=Scope(newest=True))
    chosen, table = doses.choose_dose(tiny, v, problems_of(3), SAMPLING, plan, max_loss=100.0)
    assert sorted(table[["layer", "strength"]].itertuples(index=False, name=None)) == [(1, -0.5), (1, 0.5), (2, -0.5), (2, 0.5)]
    act = edits.steering(v, chosen.strength, layers=(chosen.layer,), during="newest")
    found = rollouts(Condition(tiny, (act,)), problems_of(3), SAMPLING, progress=False)
    base = rollouts(tiny, problems_of(3), SAMPLING, progress=False)
    saved = 1 - np.mean([r.think_tokens for r in found]) / np.mean([r.think_tokens for r in base])
    assert chosen.shortening == pytest.approx(saved, abs=1e-6)
    assert chosen == efficiency_steering.choose(table, max_loss=100.0)


def test_figures_hold_every_direction_and_the_shaded_range(swept):
    for draw in (figures.dose_response, figures.damage):
        figure = draw(swept.table, usable={"length": (-0.5, 0.5)})
        assert {trace.name for trace in figure.data if trace.name} == {"length", doses.RANDOM}
        assert len(figure.layout.shapes) >= 2
