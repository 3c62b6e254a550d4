"""The probe for early exits: it reads the state after the final norm, its labels are graded answers, and it refuses other models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from zoo import model_of_type

from toolkit import exits
from toolkit.exits import EarlyExit, RandomExit
from toolkit.generate import Sampling, rollouts
from toolkit.lm import Condition
from toolkit.methods import exit_probe
from toolkit.methods.exit_probe import Chunks, ExitProbe
from toolkit.store import WrongModelError
from toolkit.tasks import arithmetic
from toolkit.tasks.grading import grade

RULE = EarlyExit(RandomExit((0.0,), 0), "\n")


@pytest.fixture(scope="module")
def found(tiny):
    problems = arithmetic.load("train", 16)
    base = rollouts(tiny, problems, Sampling(n=3, max_new_tokens=60), progress=False)
    return problems, base, exit_probe.chunks(tiny, RULE, base, problems)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "olmo2"])
def test_a_state_is_the_last_one_after_the_final_norm(model_type):
    lm, ids = model_of_type(model_type), [5, 30, 31, 40]
    out = lm.model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    assert torch.allclose(exit_probe.last_state(lm, ids), out.hidden_states[-1][0, -1].detach(), atol=1e-5)


def test_a_chunk_is_labelled_by_the_answer_that_is_forced_there(tiny, found):
    problems, base, chunks = found
    known, at = {p.id: p for p in problems}, 0
    for r in base:
        for _, reader in exits.candidates(tiny, RULE, r):
            ids = [*reader.ids, tiny.token_id("</think>")]
            while ids[-1] not in tiny.eos_ids and len(ids) < len(reader.ids) + 22:
                ids.append(int(tiny.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            answer = tiny.text([i for i in ids[len(reader.ids) + 1 :] if i not in tiny.eos_ids])
            assert chunks.right[at] == grade(known[r.problem_id], answer)
            at += 1
    assert at == len(chunks.right) and 0 < chunks.right.mean() < 1


def test_a_fitted_probe_equals_the_scikit_learn_pipeline_that_it_was_fitted_with(tiny, found):
    chunks = found[2]
    probe = exit_probe.fit(tiny, chunks)
    pipeline = exit_probe.logistic_model(len(chunks.right), 1.0).fit(chunks.states, chunks.right)
    expected = pipeline.predict_proba(chunks.states)[:, 1]
    got = torch.sigmoid(torch.tensor(chunks.states) @ torch.tensor(probe.weight) + probe.bias).numpy()
    assert got == pytest.approx(expected, abs=1e-4)


def test_thinking_stops_at_the_first_chunk_whose_probability_is_above_the_threshold(tiny, found):
    problems, _, chunks = found
    probe = replace(exit_probe.fit(tiny, chunks), threshold=0.6)
    rule, outcomes = EarlyExit(probe, "\n"), set()
    for r in rollouts(Condition(tiny, rules=(rule,)), problems, Sampling(n=2, max_new_tokens=60), progress=False):
        for at, reader in exits.candidates(tiny, rule, r, closed=True):
            stops = probe.probability(tiny, reader.ids) > 0.6
            close = r.token_ids[at] == tiny.token_id("</think>")
            assert close or not stops  # where the check does not stop, the model may
            outcomes.add((stops, close))
    assert {(True, True), (False, False)} <= outcomes


def test_calibration_is_that_of_probes_on_other_problems(found):
    rng = np.random.default_rng(0)
    problems = np.repeat([f"p{i}" for i in range(40)], 5)
    right = rng.random(200) < 0.5
    noise = rng.normal(size=(200, 6))
    assert exit_probe.calibration(Chunks(noise + 3 * right[:, None], right, problems))["auc"] > 0.95
    assert abs(exit_probe.calibration(Chunks(noise, right, problems))["auc"] - 0.5) < 0.15


def test_bad_input_is_refused(tiny, llama, found, problems_of):
    _, base, chunks = found
    with pytest.raises(exit_probe.OneOutcomeError, match="forced answers are right"):
        exit_probe.fit(tiny, replace(chunks, right=np.ones(len(chunks.right), bool)))
    with pytest.raises(WrongModelError, match="another model"):
        exit_probe.fit(tiny, chunks).probability(llama, [5, 6])
    with pytest.raises(ValueError, match="threshold"):
        ExitProbe((0.0,), 0.0, tiny.provenance(), 1.5)
    with pytest.raises(KeyError, match="are not among"):
        exit_probe.chunks(tiny, RULE, base, problems_of(1))
