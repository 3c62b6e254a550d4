"""Stability-filtered directions: shares are counted over real continuations, and the vector equals a naive version."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scripts import Steps
from zoo import model_of_type

from toolkit import collect, hooks, step_states, steps
from toolkit.collect import States
from toolkit.generate import Sampling, continuations, rollouts
from toolkit.lm import Condition
from toolkit.methods import stable_directions
from toolkit.methods.stable_directions import Boundary
from toolkit.sites import Site
from toolkit.step_states import starts_with

LABEL = starts_with("wait")


@pytest.fixture(scope="module")
def sampled(tiny, problems_of):
    problems = problems_of(30)
    return problems, rollouts(tiny, problems, Sampling(n=3, max_new_tokens=90), progress=False)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_a_state_is_read_where_the_first_token_of_its_step_is_predicted(model_type, problems_of):
    lm = model_of_type(model_type)
    found = rollouts(Condition(lm, rules=(Steps(),)), problems_of(3), Sampling(max_new_tokens=24), progress=False)
    states = step_states.step_states(lm, found, "resid_post", lambda text: "even" if len(text.strip()) % 2 == 0 else None)
    at = 0
    for r in found:
        with hooks.record(lm.layout, [Site("resid_post", 1)]) as seen, torch.inference_mode():
            lm.body(input_ids=torch.tensor([r.token_ids]), use_cache=False)
        for n, step in enumerate(s for s in steps.think_steps(lm, r) if len(s.span)):
            if len(step.text.strip()) % 2 == 0:
                assert torch.allclose(states.values[at, 1], seen[Site("resid_post", 1)][0, step.span.start - 1], atol=1e-4)
                assert tuple(states.rows.loc[at, ["problem_id", "step", "label"]]) == (r.problem_id, n, "even")
                at += 1
    assert at == len(states.rows) > 5


def test_stability_is_the_share_of_continuations_that_begin_with_the_behaviour_again(tiny, sampled):
    problems, found = sampled
    known = {p.id: p for p in problems}
    boundaries = stable_directions.stabilities(tiny, found, problems, LABEL, draws=5, tokens=30, seed=2)
    at = 0
    for r in found:
        for n, step in enumerate(steps.think_steps(tiny, r)):
            if not step.text.strip().startswith("wait"):
                continue
            prompt = [(known[r.problem_id], r.token_ids[: step.span.start])]
            again = continuations(tiny, prompt, Sampling(5, 0.7, 0.95, max_new_tokens=30, seed=2))
            share = sum(tiny.text(c.token_ids[c.prompt_len :]).startswith("wait") for c in again) / 5
            assert boundaries[at] == Boundary(r.problem_id, r.sample, n, share)
            at += 1
    assert at == len(boundaries) > 5 and len({b.stability for b in boundaries}) > 1


def made(lm, seed=0):
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame(
        {
            "problem_id": np.repeat([f"p{i}" for i in range(6)], 5), "sample": 0, "step": np.tile(range(5), 6),
            "label": np.tile(["recheck", "other", "recheck", "other", "other"], 6),
        }
    )  # fmt: skip
    rows.loc[rows["problem_id"] == "p5", "label"] = "other"  # a question with one class only
    values = torch.tensor(rng.normal(size=(30, 3, 12)), dtype=torch.float32)
    return States(values, rows, "resid_post", "step starts", lm.provenance())


def test_the_vector_equals_a_naive_version_question_by_question(tiny):
    states, k = made(tiny), 2
    questions = States(
        torch.randn(6, 3, 12, generator=torch.Generator().manual_seed(1)),
        states.rows.iloc[:6],
        "resid_post",
        "q",
        tiny.provenance(),
    )
    boundaries = [Boundary(f"p{i}", 0, n, 0.9 if (i + n) % 4 else 0.1) for i in range(6) for n in (0, 2)]
    kept = stable_directions.keep_stable(states, boundaries, 0.8)
    v = stable_directions.direction(kept, questions, k)
    stable, total = {(b.problem_id, b.step) for b in boundaries if b.stability >= 0.8}, np.zeros((3, 12))
    for layer in range(3):
        q = questions.values[:, layer].double().numpy()
        vectors = np.linalg.eigh(q.T @ q)[1][:, ::-1][:, :k]  # right singular vectors
        for i in range(5):
            mine = [j for j in range(30) if states.rows["problem_id"][j] == f"p{i}"]
            yes = [j for j in mine if states.rows["label"][j] == "recheck" and (f"p{i}", states.rows["step"][j]) in stable]
            no = [j for j in mine if states.rows["label"][j] == "other"]
            if yes:
                d = states.values[yes, layer].double().numpy().mean(0) - states.values[no, layer].double().numpy().mean(0)
                total[layer] += d - vectors @ (vectors.T @ d)
        total[layer] /= np.linalg.norm(total[layer])
    assert v.vector.numpy() == pytest.approx(total, abs=1e-6)
    assert v.norms.tolist() == pytest.approx([1.0] * 3)


def test_states_of_questions_are_those_of_the_last_prompt_token(tiny, sampled):
    found = sampled[1][:6]
    states = stable_directions.question_states(tiny, found, "resid_post")
    assert len(states.rows) == len({r.problem_id for r in found})
    with hooks.record(tiny.layout, [Site("resid_post", 3)]) as seen, torch.inference_mode():
        tiny.body(input_ids=torch.tensor([found[0].token_ids[: found[0].prompt_len]]), use_cache=False)
    row = list(states.rows["problem_id"]).index(found[0].problem_id)
    assert torch.allclose(states.values[row, 3], seen[Site("resid_post", 3)][0, -1], atol=1e-4)


def test_bad_input_is_refused(tiny, sampled):
    problems, found = sampled
    with pytest.raises(KeyError, match="are not among"):
        stable_directions.stabilities(tiny, found, problems[:1], LABEL)
    with pytest.raises(ValueError, match="is of class 'recheck'"):
        stable_directions.stabilities(tiny, found, problems, starts_with("hmm"))
    with pytest.raises(ValueError, match="none of them empty"):
        starts_with("")
    states = made(tiny)
    boundaries = [Boundary(f"p{i}", 0, n, 0.5) for i in range(6) for n in (0, 2)]
    with pytest.raises(ValueError, match="Choose a smaller tau"):
        stable_directions.keep_stable(states, boundaries, 0.8)
    with pytest.raises(ValueError, match="expected a share"):
        stable_directions.keep_stable(states, boundaries, 1.5)
    with pytest.raises(ValueError, match="singular directions"):
        stable_directions.singular(torch.zeros(3, 2, 8), 4)
    assert collect.MLP == "resid_post"
