"""CREST: chosen heads lose their component at the ends of steps and keep their norm; the control turns other heads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripts import Steps
from zoo import model_of_type

from toolkit import hooks
from toolkit.collect import States
from toolkit.generate import Sampling, rollouts
from toolkit.lm import Condition
from toolkit.methods import crest
from toolkit.methods.crest import HeadRotation, Turn
from toolkit.sites import Site
from toolkit.store import WrongModelError

SAMPLING = Sampling(n=2, max_new_tokens=26, seed=5, details=True)


def rotation_of(lm, heads, seed=0, **more):
    generator, turns = torch.Generator().manual_seed(seed), []
    for layer, head in heads:
        v = torch.randn(lm.layout.head_dims[layer], generator=generator)
        turns.append(Turn(layer, head, v / v.norm()))
    return HeadRotation(tuple(turns), lm.provenance(), ends="\n", **more)


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_a_rotation_keeps_the_norm_and_removes_the_share_of_the_component(seed, share):
    generator = torch.Generator().manual_seed(seed)
    z, v = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    v = v / v.norm()
    new = crest.rotated(z, v, share)
    assert float(new.norm()) == pytest.approx(float(z.norm()))
    u = [float(a - share * float(z @ v) * b) for a, b in zip(z, v, strict=True)]
    length = sum(a * a for a in u) ** 0.5
    assert new.tolist() == pytest.approx([a * float(z.norm()) / length for a in u])


def test_a_head_that_lies_along_its_vector_is_left_alone():
    v = torch.tensor([0.6, 0.8])
    assert torch.equal(crest.rotated(5 * v, v), 5 * v)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt_neox"])
def test_rotated_decoding_equals_a_naive_pass_that_turns_heads_at_the_ends_of_steps(model_type, problems_of):
    lm = model_of_type(model_type)
    act = rotation_of(lm, [(0, 1), (2, 0), (2, 3)])
    line, changed = lm.token_id("\n"), 0
    for r in rollouts(Condition(lm, (act,), rules=(Steps(),)), problems_of(3), SAMPLING, progress=False):
        acts = [t for t in range(r.think.start, r.think.stop) if r.token_ids[t] == line]

        def naive(layer, acts=acts):
            def fn(z, _):
                z = z.clone()
                for turn in act.turns:
                    if turn.layer != layer:
                        continue
                    size = lm.layout.head_dims[layer]
                    part = slice(turn.head * size, (turn.head + 1) * size)
                    for t in acts:
                        old = z[0, t, part].clone()
                        new = old - (old @ turn.vector) * turn.vector
                        z[0, t, part] = new * old.norm() / new.norm()
                return z

            return fn

        ids = torch.tensor([r.token_ids])
        with torch.inference_mode():
            base = lm.model(input_ids=ids, use_cache=False).logits[0]
            with hooks.rewrite(lm.layout, {Site("z", layer): naive(layer) for layer in (0, 2)}):
                logits = lm.model(input_ids=ids, use_cache=False).logits[0]
        changed += bool((base - logits).abs().max() > 1e-3)
        expected = logits[r.prompt_len - 1 : -1].log_softmax(-1).gather(1, ids[0, r.prompt_len :, None])[:, 0]
        found = torch.tensor(r.logprobs)
        assert found[found != 0].numpy() == pytest.approx(expected[found != 0].numpy(), abs=1e-4)  # 0: placed by the rule
    assert changed >= 3


def states_of(lm, seed=0):
    """Outputs of heads in which only heads (1, 2) and (0, 3) tell the classes apart."""
    rng, width = np.random.default_rng(seed), lm.layout.width("z")
    label = np.tile(["recheck", "other"], 60)
    values = torch.tensor(rng.normal(size=(120, lm.layout.n_layers, width)), dtype=torch.float32)
    for layer, head, size in ((1, 2, 3.0), (0, 3, 2.0)):
        values[label == "recheck", layer, head * lm.layout.head_dims[layer]] += size
    rows = pd.DataFrame({"problem_id": np.repeat([f"p{i}" for i in range(30)], 4), "label": label, "sample": 0})
    return States(values, rows, "z", "step starts", lm.provenance())


def test_the_heads_that_tell_the_steps_apart_are_chosen_with_the_vector_that_does():
    lm = model_of_type("llama")
    states = states_of(lm)
    scored = crest.scores(states, lm.layout)
    act = crest.rotation(states, lm.layout, scored, 2)
    assert [(t.layer, t.head) for t in act.turns] == [(0, 3), (1, 2)]
    assert all(float(t.vector[0]) > 0.9 for t in act.turns)
    with pytest.raises(ValueError, match="choose 1 to that many"):
        crest.rotation(states, lm.layout, scored, 1 + len(lm.layout.all_heads))


def test_the_control_turns_as_many_other_heads_of_any_layer():
    lm = model_of_type("llama")
    act, states = rotation_of(lm, [(0, 1), (2, 0), (2, 3)]), states_of(lm)
    for seed in range(3):
        control = crest.random_turns(act, lm.layout, states, seed=seed)
        heads = {(t.layer, t.head) for t in control.turns}
        assert len(heads) == 3 and heads.isdisjoint({(0, 1), (2, 0), (2, 3)})
    # Four of one layer's heads are turned: drawn from that layer only, every control would hold the same others.
    full = rotation_of(lm, [(0, head) for head in range(lm.layout.heads[0] // 2)])
    drawn = {tuple((t.layer, t.head) for t in crest.random_turns(full, lm.layout, states, seed=s).turns) for s in range(5)}
    assert len(drawn) > 1
    assert str(crest.random_turns(act, lm.layout, states, seed=0)) != str(crest.random_turns(act, lm.layout, states, seed=1))
    with pytest.raises(ValueError, match="Turn fewer heads"):
        crest.random_turns(rotation_of(lm, lm.layout.all_heads[:9]), lm.layout, states, seed=0)


def test_bad_input_is_refused_before_the_context_is_entered():
    lm, other = model_of_type("llama"), model_of_type("qwen3")
    act = rotation_of(lm, [(0, 1)])
    with pytest.raises(WrongModelError, match="made from"):
        act(other)
    with pytest.raises(WrongModelError, match="no head"):
        replace(act, turns=(Turn(0, 99, act.turns[0].vector),))(lm)
    with pytest.raises(ValueError, match="norm"):
        replace(act, turns=(Turn(0, 1, 2 * act.turns[0].vector),))
    with pytest.raises(ValueError, match="listed twice"):
        replace(act, turns=act.turns * 2)
    with pytest.raises(ValueError, match="share from 0 to 1"):
        replace(act, share=1.5)
    with pytest.raises(ValueError, match="No token"), replace(act, ends="\n\n")(lm):
        pass
