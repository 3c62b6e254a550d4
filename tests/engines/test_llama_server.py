"""Against the real llama-server (``make llama``): sampling through it, its control vectors, and what happens when it is killed."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import replace

import httpx
import llama
import pytest
import torch

from toolkit import edits, exports, generate, store, tasks, vectors
from toolkit import lm as lms
from toolkit.edits import steering
from toolkit.engines import EngineError, Request, connect
from toolkit.exports.base import Settings
from toolkit.generate import Sampling
from toolkit.lm import LM, Condition, ThinkTags
from toolkit.types import Direction, HeadEdit, Plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(llama.server() is None, reason="llama-server is not built: make llama"),
    pytest.mark.skipif(lms.smollm2_path() is None, reason="SmolLM2 is not installed: make smol"),
]
SAMPLING = Sampling(max_new_tokens=24, seed=1)


@pytest.fixture(scope="module")
def smollm2() -> LM:
    return lms.load(lms.smollm2_path(), device="cpu", tags=ThinkTags(None, None))


@pytest.fixture(scope="module")
def problems(smollm2):
    return tasks.load("wordproblems", "test", 8, lm=smollm2)


def next_tokens(url: str, prompt: list[int], count: int = 200) -> dict[int, float]:
    """The server's log-probabilities of the most likely next tokens."""
    body = {
        "prompt": prompt,
        "n_predict": 1,
        "n_probs": count,
        "temperature": 0.0,
        "cache_prompt": False,
        "samplers": ["temperature"],
    }
    (row,) = httpx.post(f"{url}/completion", json=body, trust_env=False, timeout=60).json()["completion_probabilities"]
    return {entry["id"]: entry["logprob"] for entry in row["top_logprobs"]}


@torch.inference_mode()
def divergence(lm: LM, prompt: list[int], theirs: dict[int, float], *interventions) -> float:
    """KL divergence of our next-token distribution from the server's, over the tokens that the server lists, in nats."""
    with Condition(lm, interventions).active():
        ours = lm.model(torch.tensor([prompt], device=lm.device)).logits[0, -1].float().log_softmax(-1)
    listed = torch.tensor(list(theirs))
    there = torch.tensor(list(theirs.values()))
    return float((there.exp() * (there - ours[listed])).sum())


def test_a_control_vector_is_read_layer_for_layer_and_gives_the_steered_next_token(smollm2, problems, tmp_path):
    prompt = smollm2.prompt_ids(problems[0].messages)
    random = torch.randn(smollm2.layout.n_layers, smollm2.layout.d_model, generator=torch.Generator().manual_seed(0))
    random[0] = 0  # llama.cpp cannot steer the first block
    with torch.inference_mode():
        states = smollm2.model.base_model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[1:]
    norms = torch.stack([h[0].norm(dim=-1).square().mean().sqrt() for h in states])
    vector = 0.06 * norms[:, None] * torch.nn.functional.normalize(random, dim=1)
    v = Direction(vector, "resid_post", "think", "random", 1, 1, smollm2.provenance())
    off = Direction(vector.roll(1, 0), "resid_post", "think", "random", 1, 1, smollm2.provenance())
    vectors.save_gguf(v, tmp_path / "v.gguf", lm=smollm2, drop_layer_0=True)
    with llama.running(lms.smollm2_path(), "--control-vector", tmp_path / "v.gguf") as (url, _):
        steered = next_tokens(url, prompt)
    with llama.running(lms.smollm2_path()) as (url, _):
        plain = next_tokens(url, prompt)
    price = divergence(smollm2, prompt, plain)  # of the server's quantised kernels
    right = divergence(smollm2, prompt, steered, steering(v, 1.0))
    assert price < 0.05 and right < 0.05
    assert divergence(smollm2, prompt, steered, steering(off, 1.0)) > 10 * right, "one layer off"
    assert divergence(smollm2, prompt, steered) > 10 * right, "not steered"


def test_a_head_edit_as_gguf_lora_is_recognised_among_what_the_server_offers(smollm2, problems, tmp_path):
    v = torch.randn(smollm2.layout.n_layers, smollm2.layout.d_model, generator=torch.Generator().manual_seed(0))
    heads = tuple(HeadEdit(layer, head, "project_out", 12.0) for layer in (5, 10, 15, 20, 25) for head in range(0, 9, 2))
    plan = Plan(heads, Direction(v, "attn_out", "think", "random", 0, 0, smollm2.provenance()), "25 heads", smollm2.provenance())
    plan = edits.with_direction(plan, edits.random_written(plan, smollm2.layout, seed=0))
    edited = edits.apply(smollm2, plan)
    exports.find("gguf-lora").write(smollm2, plan, tmp_path / "edit.gguf", Settings(base=str(lms.smollm2_path())))
    with llama.running(lms.smollm2_path(), "--lora", tmp_path / "edit.gguf", "--lora-init-without-apply") as (url, _):
        engine = connect(url, smollm2)
        requests = [Request(smollm2.prompt_ids(p.messages), p.id, 0) for p in problems]
        for lm, name in ((smollm2, "base"), (edited, str(tmp_path / "edit.gguf"))):
            session = engine.session(Condition(lm), requests, SAMPLING)
            assert session.served.name == name
    with llama.running(lms.smollm2_path()) as (url, _), pytest.raises(EngineError, match="does not serve"):
        connect(url, smollm2, tolerance=10.0).session(Condition(edited), requests, SAMPLING)


def test_rollouts_come_from_the_served_weights_and_another_model_is_refused(smollm2, problems):
    with llama.running(lms.smollm2_path()) as (url, _):
        engine = connect(url, smollm2)
        found = generate.rollouts(smollm2, problems, SAMPLING, engine=engine, progress=False)
        assert all(0 < r.response_tokens <= 24 for r in found)
        assert all(
            r.token_ids[: r.prompt_len] == tuple(smollm2.prompt_ids(p.messages)) for r, p in zip(found, problems, strict=True)
        )
        again = generate.rollouts(smollm2, problems, SAMPLING, engine=connect(url, smollm2, parallel=1), progress=False)
        assert sum(a.token_ids == b.token_ids for a, b in zip(found, again, strict=True)) >= 4, "seeds repeat most responses"
        other = lms.child(smollm2, turned_around(smollm2), "another model")
        with pytest.raises(EngineError, match="does not serve another model"):
            generate.rollouts(other, problems, SAMPLING, engine=connect(url), progress=False)


def turned_around(lm: LM):
    """The model with one attention layer's output turned around."""
    import copy

    model = copy.deepcopy(lm.model)
    with torch.no_grad():
        model.model.layers[10].self_attn.o_proj.weight.neg_()
    return model


def test_a_killed_server_loses_nothing_and_the_same_call_goes_on(smollm2, problems, tmp_path, monkeypatch):
    monkeypatch.setattr("toolkit.engines.server.STORED", (1, 1.0))
    port = llama.free_port()

    def impatient(url: str):
        engine = connect(url, smollm2, parallel=2)
        return replace(engine, client=replace(engine.client, patience=2.0))

    longer = Sampling(n=2, max_new_tokens=48, seed=3)
    with llama.running(lms.smollm2_path(), port=port) as (url, process):

        def kill_after_some() -> None:
            while not (tmp_path / "r" / "header.json").exists() or store.count_rollouts(tmp_path / "r") < 3:
                time.sleep(0.1)
            process.send_signal(signal.SIGKILL)

        killer = threading.Thread(target=kill_after_some, daemon=True)
        killer.start()
        with pytest.raises(EngineError, match="No server answers"):
            generate.rollouts(smollm2, problems, longer, engine=impatient(url), out=tmp_path / "r", progress=False)
        killer.join()
    kept = store.load_rollouts(tmp_path / "r")
    assert 3 <= len(kept) < 16
    with llama.running(lms.smollm2_path(), port=port) as (url, _):
        found = generate.rollouts(smollm2, problems, longer, engine=impatient(url), out=tmp_path / "r", progress=False)
    assert len(found) == 16 and {r.token_ids for r in kept} <= {r.token_ids for r in found}
