"""ReBalance: strengths follow the confidence of the steps so far, in decoding and in passes over whole sequences."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripts import Steps
from zoo import model_of_type

from toolkit import collect, hooks, tasks
from toolkit.certainty import step_confidence
from toolkit.directions import random_like
from toolkit.entropies import with_entropies
from toolkit.generate import Sampling, rollouts
from toolkit.lm import Condition
from toolkit.methods import rebalance
from toolkit.methods.rebalance import PUBLISHED, Confident, Levels
from toolkit.sites import Site
from toolkit.store import WrongModelError
from toolkit.types import Direction

SAMPLING = Sampling(n=2, max_new_tokens=26, seed=5, details=True)
LIMITS = Levels(0.2, 0.6, 1e-4, 1e-2)


def act_of(lm, layer=1, scale=1.0):
    v = 0.5 * torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(0))
    v = Direction(v, "resid_pre", "step starts", "by hand", 1, 1, lm.provenance())
    return Confident(v, layer, LIMITS, scale, "\n")


def naive_strength(c, v, limits):
    def sigmoid(x):
        return 1 / (1 + math.exp(-max(-60.0, min(60.0, x))))

    k = 2 / (limits.high - limits.low)
    b = (0.01 + 1.0) / 2 / math.tanh(1)
    f = (0.01 - 1.0) / 2 + b * math.tanh(k * (c - (limits.low + limits.high) / 2))
    s_c, s_v = 1200 / (limits.high - limits.low), 1200 / (limits.high_variance - limits.low_variance)
    over = sigmoid(s_c * (limits.low - c)) * sigmoid(s_v * (v - limits.high_variance))
    under = sigmoid(s_c * (c - limits.high)) * sigmoid(s_v * (limits.low_variance - v))
    return f + over * (-2.0 - f) + under * (0.1 - f)


def naive(lm, act, r):
    """Logits of the response and the strength at each position: tokens are added one at a time, and each pass is over the whole sequence."""
    ids, strengths, certain, logits = list(r.token_ids), [0.0] * len(r.token_ids), [], []
    line = lm.token_id("\n")

    def fn(h, _):
        return h + act.scale * torch.tensor(strengths[: h.shape[1]])[None, :, None] * act.direction.vector[act.layer]

    for n in range(1, len(ids)):
        t = n - 1  # the newest token
        if r.think.start <= t < r.think.stop and ids[t] == line:
            groups = [[]]  # certainties of the tokens of each step so far
            for i in range(r.think.start, t):
                groups.append([]) if ids[i] == line else groups[-1].append(certain[i - 1])
            means = [sum(g) / len(g) if g else None for g in groups]
            if means[-1] is not None:
                before = next((c for c in reversed(means[:-1]) if c is not None), None)
                v = 0.0 if before is None else (means[-1] - before) ** 2 / 4
                strengths[t] = naive_strength(means[-1], v, act.limits)
        with hooks.rewrite(lm.layout, {Site("resid_pre", act.layer): fn}), torch.inference_mode():
            last = lm.model(input_ids=torch.tensor([ids[:n]]), use_cache=False).logits[0, -1]
        logits.append(last)
        certain.append(float(last.softmax(-1).max()))
    return torch.stack(logits)[r.prompt_len - 1 :], strengths


@given(st.floats(0, 1), st.floats(0, 0.25))
def test_the_strength_equals_its_formula(c, v):
    found = rebalance.strength(torch.tensor(c, dtype=torch.float64), torch.tensor(v, dtype=torch.float64), PUBLISHED)
    assert float(found) == pytest.approx(naive_strength(c, v, PUBLISHED), abs=1e-6)


def test_uncertain_steps_that_vary_get_the_strongest_push_and_sure_ones_that_do_not_the_gentlest():
    c, v = torch.tensor([0.5, 0.95, 0.5, 0.95]), torch.tensor([0.05, 0.0, 0.0, 0.05])
    found = rebalance.strength(c, v, PUBLISHED).tolist()
    assert found[:2] == pytest.approx([-2.0, 0.1], abs=1e-3)
    assert -2 < found[2] < -1 and 0.01 < found[3] < 0.2


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt_neox"])
def test_decoding_equals_a_naive_loop_that_computes_each_strength_from_the_steered_logits(model_type, problems_of):
    lm = model_of_type(model_type)
    act, seen = act_of(lm), set()
    for r in rollouts(Condition(lm, (act,), rules=(Steps(),)), problems_of(3), SAMPLING, progress=False):
        logits, strengths = naive(lm, act, r)
        expected = logits.log_softmax(-1).gather(1, torch.tensor(r.token_ids[r.prompt_len :])[:, None])[:, 0]
        found = torch.tensor(r.logprobs)
        assert found[found != 0].numpy() == pytest.approx(expected[found != 0].numpy(), abs=2e-4)
        seen |= {round(s, 3) for s in strengths}
    assert len(seen) > 5  # strengths differ between steps and rows


def naive_confidence(certainty, part):
    """Confidences of the steps with tokens, one token at a time; the newest may have none."""
    steps = [[]]
    for at, p in enumerate(part):
        if p == 2:
            steps.append([])
        elif p == 1:
            steps[-1].append(certainty[at - 1] if at else 0.0)
    earlier, newest = [sum(s) / len(s) for s in steps[:-1] if s], steps[-1]
    c = sum(newest) / len(newest) if newest else 0.0
    return c, (c - earlier[-1]) ** 2 / 4 if earlier else 0.0, len(newest)


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.sampled_from([0, 1, 1, 2])), min_size=1, max_size=12), st.integers(0, 5))
def test_the_confidence_of_a_step_is_compared_with_that_of_the_last_step_that_has_tokens(tokens, turn):
    rows = [tokens, tokens[turn % len(tokens) :] + tokens[: turn % len(tokens)]]  # rows of a batch do not mix
    certainty, part = (torch.tensor([[token[i] for token in row] for row in rows], dtype=torch.float32) for i in (0, 1))
    found = torch.stack(step_confidence(certainty, part), dim=1)
    expected = [naive_confidence(*zip(*row, strict=True)) for row in rows]
    assert found.numpy() == pytest.approx(np.array(expected), abs=1e-5)


def test_an_empty_step_leaves_the_variance_of_the_next_step_as_it_is():
    certainty, part = torch.tensor([[0.5, 0.9, 0.9, 0.9, 0.2]]), torch.tensor([[0.0, 1.0, 2.0, 2.0, 1.0]])
    c, v, count = (float(x) for x in step_confidence(certainty, part))
    assert (c, v, count) == (pytest.approx(0.9), pytest.approx((0.9 - 0.5) ** 2 / 4), 1)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_pass_over_a_sequence_gives_the_logits_of_decoding(model_type, problems_of):
    lm = model_of_type(model_type)
    act = act_of(lm)
    for r in rollouts(Condition(lm, (act,), rules=(Steps(),)), problems_of(2), replace(SAMPLING, n=1), progress=False):
        expected, _ = naive(lm, act, r)
        assert torch.allclose(collect.logits(lm, r, act), expected, atol=2e-3)
        with act(lm), torch.inference_mode(), hooks.record(lm.layout, [Site("resid_post", 0)]) as seen:
            whole = lm.model(input_ids=torch.tensor([r.token_ids]), use_cache=False).logits[0, r.prompt_len - 1 : -1]
        assert torch.allclose(whole, expected, atol=2e-3)
        assert seen[Site("resid_post", 0)].shape[1] == len(r.token_ids)


def test_log_probabilities_of_padded_batches_are_those_of_decoding(tiny):
    v = torch.randn(tiny.layout.n_layers, tiny.layout.d_model, generator=torch.Generator().manual_seed(0))
    v = Direction(v, "resid_pre", "step starts", "by hand", 1, 1, tiny.provenance())
    steered = Condition(tiny, (Confident(v, 1, Levels(0.8, 0.97, 1e-5, 1e-2), 1.0, "\n"),))
    responses = rollouts(steered, tasks.load("arithmetic", "test", 6), Sampling(max_new_tokens=40, details=True), progress=False)
    assert len({r.prompt_len for r in responses}) > 1
    again, without = (with_entropies(which, responses) for which in (steered, tiny))
    for sampled, read in zip(responses, again, strict=True):
        assert np.array(read.logprobs) == pytest.approx(np.array(sampled.logprobs), abs=5e-4)
    assert any(np.abs(np.array(p.logprobs) - np.array(r.logprobs)).max() > 5e-3 for p, r in zip(without, responses, strict=True))


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_states_and_attention_under_it_are_those_of_decoding(model_type, problems_of):
    lm = model_of_type(model_type)
    act = act_of(lm)
    problems = problems_of(2)
    responses = rollouts(Condition(lm, (act,), rules=(Steps(),)), problems, replace(SAMPLING, n=1), progress=False)
    with act(lm):
        together = collect.states(lm, responses, "z").values
        one_by_one = [collect.states(lm, [r], "z").values for r in responses]
    without = collect.states(lm, responses, "z").values
    assert torch.allclose(together, torch.cat(one_by_one), atol=1e-4) and not torch.allclose(together, without, atol=1e-3)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_confidences_are_means_of_the_largest_probabilities_of_a_step(model_type, problems_of):
    lm = model_of_type(model_type)
    sampled = rollouts(Condition(lm, rules=(Steps(),)), problems_of(3), SAMPLING, progress=False)
    table, line = rebalance.confidences(lm, sampled, "\n"), lm.token_id("\n")
    at = 0
    for r in sampled:
        probs = lm.model(input_ids=torch.tensor([r.token_ids]), use_cache=False).logits[0].softmax(-1).amax(-1).tolist()
        start, before, step = r.think.start, None, 0
        for t in range(r.think.start, r.think.stop):
            if r.token_ids[t] == line:
                values = [probs[i - 1] for i in range(start, t)]
                if values:
                    row, c = table.iloc[at], sum(values) / len(values)
                    v = 0.0 if before is None else (c - before) ** 2 / 4
                    assert (row["problem_id"], row["sample"], row["step"], row["position"]) == (
                        r.problem_id,
                        r.sample,
                        step,
                        start - 1,
                    )
                    assert (row["confidence"], row["variance"]) == pytest.approx((c, v), abs=1e-5)
                    before, step, at = c, step + 1, at + 1
                start = t + 1
    assert at == len(table) > 10


def test_the_direction_points_from_confident_steps_to_those_with_a_word_or_low_confidence(tiny, problems_of):
    sampled = rollouts(tiny, problems_of(12), Sampling(n=3, max_new_tokens=80), progress=False)
    table = rebalance.confidences(tiny, sampled, "\n")
    limits = rebalance.levels(table)
    v = rebalance.direction(tiny, sampled, table, limits, words=("wait",))
    over, under = [], []
    for r in sampled:
        with hooks.record(tiny.layout, [Site("resid_pre", 2)]) as seen, torch.inference_mode():
            tiny.body(input_ids=torch.tensor([r.token_ids]), use_cache=False)
        for _, row in table[(table["problem_id"] == r.problem_id) & (table["sample"] == r.sample)].iterrows():
            h = seen[Site("resid_pre", 2)][0, int(row["position"])].double()
            if "wait" in row["text"] or row["confidence"] < limits.low:
                over.append(h)
            elif row["confidence"] > limits.high:
                under.append(h)
    expected = torch.stack(over).mean(0) - torch.stack(under).mean(0)
    assert torch.allclose(v.vector[2], expected, atol=1e-4) and (v.n_pos, v.n_neg) == (len(over), len(under))
    assert 0 <= rebalance.best_layer(tiny, sampled, table) < tiny.layout.n_layers


def test_scale_0_changes_nothing_and_the_control_has_the_same_norm(tiny, problems_of):
    act, plain = act_of(tiny, scale=0.0), rollouts(tiny, problems_of(3), SAMPLING, progress=False)
    steered = rollouts(Condition(tiny, (act,)), problems_of(3), SAMPLING, progress=False)
    assert [r.token_ids for r in plain] == [r.token_ids for r in steered]
    control = replace(act, direction=random_like(act.direction, seed=1))
    assert torch.allclose(control.direction.norms, act.direction.norms)


def test_bad_input_is_refused(tiny):
    act, other = act_of(tiny), model_of_type("llama")
    with pytest.raises(ValueError, match="need one at 'resid_pre'"):
        replace(act, direction=replace(act.direction, kind="resid_post"))
    with pytest.raises(IndexError, match="does not exist"):
        replace(act, layer=99)
    with pytest.raises(ValueError, match="equally certain"):
        Levels(0.9, 0.9, 0.0, 0.1)
    with pytest.raises(WrongModelError):
        act(other)
    with pytest.raises(ValueError, match="confidence of the steps in this KV cache is unknown"):
        out = tiny.model(input_ids=torch.tensor([[2, 26]]), use_cache=True)
        with act(tiny):
            tiny.model(input_ids=torch.tensor([[27]]), past_key_values=out.past_key_values, use_cache=True)
