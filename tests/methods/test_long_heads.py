"""LongHeads: chunk keys, choices and attention against naive loops; all chunks selected is full attention; positions stay in the window."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from toolkit import chunk_attention, generate, tasks
from toolkit.chunk_attention import Turns, attend_chunks, chunk_keys
from toolkit.generate import Sampling
from toolkit.lm import Condition
from toolkit.methods import long_heads
from toolkit.methods.long_heads import LongHeads, choose
from toolkit.sites import UnsupportedModelError
from toolkit.types import Span

ROTARY = ["llama", "qwen3", "gpt_neox"]
HEADS, KV, DIM, W, K, N = 4, 2, 8, 3, 4, 23
SMALL = LongHeads(W, W * K)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotated(x, position):
    """Rotate entry pairs (i, i + d/2) as complex numbers: an oracle independent of transformers."""
    half = x.shape[-1] // 2
    angles = torch.tensor([position * 10000 ** (-2 * i / x.shape[-1]) for i in range(half)])
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(half), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def rotate(q, k, cos, sin):
    def half(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([-b, a], dim=-1)

    return q * cos[:, None] + half(q) * sin[:, None], k * cos[:, None] + half(k) * sin[:, None]


def turns(w=W, k=K, dim=DIM):
    def table(at):
        angles = at[:, None] * torch.tensor([10000 ** (-2 * i / dim) for i in range(dim // 2)]).repeat(2)
        return angles.cos(), angles.sin()

    return Turns(rotate, *table(torch.arange(w)), *table(w * torch.arange(k)), w)


# --- the parts ---------------------------------------------------------------------------------------------------


def test_chunk_keys_are_those_of_the_formula_written_out():
    q, k, v = (normal(HEADS, 2, W, DIM, seed=s) for s in range(3))
    keys = chunk_keys(q, k, v, 0.5)
    for h in range(HEADS):
        for i in range(2):
            each = [sum(a * v[h, i, s] for s, a in enumerate(torch.softmax(0.5 * (k[h, i] @ q[h, i, t]), 0))) for t in range(W)]
            mean = sum(each) / W
            expected = sum(a * k[h, i, s] for s, a in enumerate(torch.softmax(0.5 * (k[h, i] @ mean), 0)))
            assert torch.allclose(keys[h, i], expected, atol=1e-5)


def naive_choice(scores, j, rule):
    """The chunks of one head at one token, from its scores of all chunks before its own."""
    if j < K:
        return list(range(j + 1))
    if rule == "recent":
        return list(range(j - K + 1, j + 1))
    if rule == "sinks":
        return [0, *range(j - K + 2, j + 1)]
    others = sorted(range(1, j - 1), key=lambda i: -scores[i])[: K - 3]
    return sorted({0, j - 1, j, *others})


@pytest.mark.parametrize("rule", ["scores", "sinks", "recent"])
def test_choices_are_those_of_a_naive_loop(rule):
    query, keys = normal(HEADS, N, DIM), normal(HEADS, N // W, DIM, seed=1)
    chosen = choose(query, keys, torch.arange(N), LongHeads(W, W * K, rule))
    missing = (N - 1) // W + 1
    for h in range(HEADS):
        for t in range(N):
            scores = [float(query[h, t] @ key) for key in keys[h]]
            assert [c for c in chosen[h, t].tolist() if c < missing] == naive_choice(scores, t // W, rule)


def test_scores_computed_in_parts_choose_the_same(monkeypatch):
    query, keys = normal(HEADS, N, DIM), normal(HEADS, N // W, DIM, seed=1)
    whole = choose(query, keys, torch.arange(N), SMALL)
    monkeypatch.setattr(long_heads, "SCORE_NUMBERS", 5 * HEADS * 8)
    assert torch.equal(choose(query, keys, torch.arange(N), SMALL), whole)


def test_random_choices_are_uniform_seeded_and_keep_the_forced_chunks():
    at, keys = torch.full((4000,), 12 * W), torch.zeros(HEADS, 12, DIM)
    chosen = choose(torch.zeros(HEADS, len(at), DIM), keys, at, LongHeads(W, W * K, "random"))
    shares = torch.bincount(chosen.flatten(), minlength=13) / chosen[..., 0].numel()
    assert shares[[0, 11, 12]].tolist() == [1, 1, 1]
    assert torch.allclose(shares[1:11], torch.tensor(0.1), atol=0.015)
    again = choose(torch.zeros(HEADS, len(at), DIM), keys, at, LongHeads(W, W * K, "random", seed=1))
    assert not torch.equal(again, chosen)


def test_a_chunk_whose_keys_point_along_the_query_is_selected():
    query = normal(1, 1, DIM)
    keys = normal(1, 9, DIM, seed=2)
    keys[0, 5] = 10 * query[0, 0]
    assert 5 in choose(query, keys, torch.tensor([9 * W]), SMALL)[0, 0].tolist()


@pytest.mark.parametrize("few", [0, N])
def test_chunked_attention_equals_a_naive_loop_with_consecutive_positions(few, monkeypatch):
    monkeypatch.setattr(chunk_attention, "FEW", few)
    query, key, value = normal(HEADS, N, DIM), normal(KV, N, DIM, seed=1), normal(KV, N, 5, seed=2)
    local = [torch.stack([rotated(x[:, t], t % W) for t in range(N)], dim=1) for x in (query, key)]
    chosen = choose(normal(HEADS, N, DIM, seed=3), normal(HEADS, N // W, DIM, seed=4), torch.arange(N), SMALL)
    out = attend_chunks(turns(), (*local, value), chosen, torch.arange(N), 0.4)
    n = (N - 1) // W + 1
    for h in range(HEADS):
        for t in range(N):
            chunks = [c for c in chosen[h, t].tolist() if c < n]
            seen = [(r * W + s - c * W, s) for r, c in enumerate(chunks) for s in range(c * W, min((c + 1) * W, t + 1))]
            position = (len(chunks) - 1) * W + t % W
            assert position < W * K and all(p <= position for p, _ in seen)
            logits = torch.stack([rotated(query[h, t], position) @ rotated(key[h // 2, s], p) for p, s in seen])
            expected = sum(a * value[h // 2, s] for a, (_, s) in zip(torch.softmax(0.4 * logits, 0), seen, strict=True))
            assert torch.allclose(out[h, t], expected, atol=1e-5)


# --- a model -----------------------------------------------------------------------------------------------------


def logits(lm, ids, settings=None, steps=()):
    """Logits of all tokens, in passes that begin at ``steps``."""
    with torch.inference_mode(), settings(lm) if settings else nullcontext():
        cache, parts = None, []
        for start, stop in zip((0, *steps), (*steps, ids.shape[1]), strict=True):
            out = lm.model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    return torch.cat(parts, dim=1)


def text(lm, n=40):
    return torch.randint(lm.vocab_size, (1, n), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("rule", ["scores", "random"])
def test_with_all_chunks_selected_it_is_full_attention(name, rule, model_of):
    lm = model_of(name)
    ids = text(lm)
    assert torch.allclose(logits(lm, ids, LongHeads(8, 40, rule)), logits(lm, ids), atol=1e-4)
    assert not torch.allclose(logits(lm, ids, LongHeads(4, 16, rule)), logits(lm, ids), atol=1e-3), "some chunks left out"


@pytest.mark.parametrize("name", ROTARY)
def test_passes_from_the_cache_equal_one_pass(name, model_of):
    lm = model_of(name)
    ids = text(lm)
    whole = logits(lm, ids, LongHeads(4, 16))
    for steps in ([25], [3, 4, 21, 22, 23, 24, 39]):
        assert torch.allclose(logits(lm, ids, LongHeads(4, 16), steps), whole, atol=1e-4)


def test_no_position_is_beyond_the_window(llama, monkeypatch):
    seen = []
    forward = Turns.forward
    monkeypatch.setattr(Turns, "forward", lambda self, q, chunks: seen.append(int(chunks.max())) or forward(self, q, chunks))
    with LongHeads(4, 16)(llama), torch.inference_mode():
        seen.clear()  # of the check at entry, which has another window
        llama.model(text(llama, 60))
    assert max(seen) == 3  # further by 3 chunks of 4 tokens, and by at most 3 tokens within a chunk: below 16


def test_the_latest_chunks_alone_are_a_sliding_window(llama):
    """Tokens further back than the window change nothing in one layer; with the rule ``scores``, they do."""
    ids = text(llama, 41)
    changed = ids.clone()
    changed[0, 4:20] = (changed[0, 4:20] + 1) % llama.vocab_size
    last = {}
    for rule in ("recent", "scores"):
        chosen = [
            long_heads.selections(llama, x[0].tolist(), Span(40, 41), LongHeads(4, 20, rule))[0, :, 0] for x in (ids, changed)
        ]
        last[rule] = chosen
    assert all(torch.equal(c[:, :6], torch.zeros_like(c[:, :6])) for c in last["recent"])
    assert all(bool(c[:, 0].all()) and int(c.sum()) == 5 * len(c) for c in last["scores"])


def test_greedy_responses_are_those_of_the_model_as_long_as_the_window_holds_them(tiny):
    problems = tasks.load("lookup", "test", 2, lm=tiny)
    sampling = Sampling(temperature=0.0, max_new_tokens=16, batch_size=1)
    plain, chunked = (generate.rollouts(c, problems, sampling) for c in (tiny, Condition(tiny, (LongHeads(32, 1024),))))
    assert [r.token_ids for r in plain] == [r.token_ids for r in chunked]


def test_what_it_cannot_read_is_refused(model_of, llama):
    for name in ("gpt2", "mistral", "gemma3"):  # no rotary embeddings, sliding windows, both kinds of layers
        with pytest.raises(UnsupportedModelError, match="expected one rotary module and full attention"):
            LongHeads(4, 16)(model_of(name))
    with pytest.raises(ValueError, match="longer than the context"):
        LongHeads(256, 2**24)(llama)
    with pytest.raises(ValueError, match="one sequence at a time"), LongHeads(4, 16)(llama), torch.inference_mode():
        llama.model(text(llama).repeat(2, 1))
    with pytest.raises(ValueError, match="in order"), LongHeads(4, 16)(llama), torch.inference_mode():
        cache = llama.model(text(llama), use_cache=True).past_key_values
        cache.crop(-29)
        llama.model(text(llama), past_key_values=cache)


@pytest.mark.parametrize("settings", [{"rule": "best"}, {"chunk": 0}, {"chunk": 100, "window": 450}, {"chunk": 8, "window": 24}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=r"choose|must be"):
        LongHeads(**settings)


def test_an_extended_model_differs_only_in_its_context(llama):
    longer = long_heads.extended(llama, 10**5)
    assert longer.model.config.max_position_embeddings == 10**5 != llama.model.config.max_position_embeddings
    assert {p.data_ptr() for p in longer.model.parameters()} == {p.data_ptr() for p in llama.model.parameters()}
    assert torch.equal(logits(longer, text(llama)), logits(llama, text(llama)))


def test_a_window_may_not_exceed_the_context_that_the_model_had_before_it_was_extended(llama):
    own = llama.model.config.max_position_embeddings
    longer = long_heads.extended(long_heads.extended(llama, 4 * own), 8 * own)  # extended twice: the first context counts
    with pytest.raises(ValueError, match=f"window={2 * own} is longer than the context of .*, {own} tokens as loaded"):
        LongHeads(own // 4, 2 * own)(longer)
    LongHeads(own // 4, own)(longer)
    assert not hasattr(llama.model.config, long_heads.ORIGINAL), "the model itself is unchanged"


def test_hit_rates_count_free_queries_that_select_every_chunk_of_the_needle():
    chosen = torch.zeros(1, 2, 3, 8, dtype=torch.bool)
    chosen[0, 0, 1:, 2:4] = True  # head 0: both chunks at the last two of three queries
    chosen[0, 1, :, 3] = True  # head 1: one chunk of two
    rates = long_heads.hit_rates(chosen, Span(28, 31), Span(11, 13), LongHeads(4, 16))
    assert rates.tolist() == [[pytest.approx(2 / 3), 0.0]]
    near = long_heads.hit_rates(chosen, Span(28, 31), Span(25, 27), LongHeads(4, 16))
    assert math.isnan(near[0, 0])


def test_random_chunks_hold_the_needle_as_often_as_computed():
    settings, span, rng = LongHeads(4, 24), Span(37, 41), np.random.default_rng(0)
    for needle in (Span(9, 11), Span(11, 13), Span(3, 5)):  # in one chunk, in two, in the first one, which is forced
        chosen = torch.zeros(1, 4000, len(span), 11, dtype=torch.bool)
        for i, query in enumerate(range(span.start, span.stop)):
            own = query // 4
            chosen[..., i, [0, own - 1, own]] = True
            places = rng.random((4000, own - 2)).argsort(axis=1)[:, : settings.chunks - long_heads.FORCED] + 1
            chosen[0, torch.arange(4000)[:, None], i, torch.tensor(places)] = True
        simulated = long_heads.hit_rates(chosen, span, needle, settings).mean().item()
        assert long_heads.chance_of_hits(span, needle, settings) == pytest.approx(simulated, abs=0.012, nan_ok=True)
