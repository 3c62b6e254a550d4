"""Decoding in two blocks gives what the model's own cache and attention give, whoever leaves when."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from toolkit import decode, hooks
from toolkit.decode import Batch, Blocks, prefill
from toolkit.engines import loop
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM


def own_way(lm: LM):
    """Something that stands around attention, and changes nothing: decoding takes the model's own way."""
    return hooks.wrap_attention(lm.layout, lambda layer, attend, q, k, v: attend(q, k, v))


def prompts_of(lm: LM, problems) -> list[list[int]]:
    return [lm.prompt_ids(p.messages) for p in problems]


def logits_of(lm: LM, prompts: list[list[int]], *, leaving: dict[int, list[int]], steps: int = 40) -> list[torch.Tensor]:
    """Logits of every step, rows in their first order; before step s the rows of ``leaving[s]`` go."""
    with torch.inference_mode():
        cache, first, mask = prefill(lm, prompts)
        batch, alive, found = Batch(lm, cache, mask, steps), list(range(len(prompts))), [first]
        for step in range(steps):
            if step in leaving:
                order = batch.keep([i for i, row in enumerate(alive) if row not in leaving[step]])
                alive = [alive[i] for i in order]
            tokens = torch.tensor([(7 * row + step) % 100 for row in alive])
            with batch.acting():
                logits = batch.step(tokens)
            found.append(logits[torch.tensor(alive).argsort()])
    return found


@pytest.mark.parametrize("count", [1, 5])
def test_two_blocks_give_the_logits_of_the_models_own_cache(any_lm, count, problems_of):
    prompts = prompts_of(any_lm, problems_of(count))
    leaving = {3: [0], 20: [2, 3]} if count > 1 else {}
    with own_way(any_lm):
        expected = logits_of(any_lm, prompts, leaving=leaving)
    found = logits_of(any_lm, prompts, leaving=leaving)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_whole_sequences_in_fp32_are_kept_in_two_blocks_and_leave_in_place(name, model_of, problems_of):
    lm = model_of(name)
    cache, _, mask = prefill(lm, prompts_of(lm, problems_of(5)))
    batch = Batch(lm, cache, mask, 8)
    assert batch.blocks and all(isinstance(layer, Blocks) for layer in cache.layers)
    place = batch.blocks[0].keys.data_ptr()
    assert batch.keep([1, 2, 4]) == [4, 1, 2]
    assert batch.blocks[0].keys.data_ptr() == place and batch.blocks[0].keys.shape[0] == 3
    assert cache.get_seq_length() == mask.shape[1]


def test_prompts_of_one_length_get_no_mask_and_the_same_logits(any_lm, problems_of):
    """Neither in prefill nor in decoding; with a third, shorter prompt both have one."""
    long, short = sorted(prompts_of(any_lm, problems_of(2)), key=len, reverse=True)
    masks: list[bool] = []
    spy = any_lm.model.register_forward_pre_hook(lambda m, a, k: masks.append(k["attention_mask"] is not None), with_kwargs=True)
    try:
        alone = logits_of(any_lm, [long, long[::-1]], leaving={}, steps=20)
        assert not any(masks)
        padded = logits_of(any_lm, [long, long[::-1], short], leaving={}, steps=20)
        assert all(masks[21:])
    finally:
        spy.remove()
    for a, b in zip(alone, padded, strict=True):
        torch.testing.assert_close(a, b[:2], rtol=1e-4, atol=1e-4)


def test_other_number_types_and_strange_layouts_take_the_models_own_way(llama, problems_of):
    prompts = prompts_of(llama, problems_of(3))
    half = replace(llama, model=copy.deepcopy(llama.model).bfloat16())
    for lm in (half, replace(llama, model=copy.deepcopy(llama.model))):  # both with the layout of another model
        cache, _, mask = prefill(lm, prompts)
        assert not Batch(lm, cache, mask, 4).blocks
        found = rollouts(lm, problems_of(3), Sampling(max_new_tokens=8), progress=False)
        assert len(found) == 3


def test_blocks_join_and_nothing_sampled_changes(tiny, problems_of, monkeypatch):
    sampling = Sampling(n=4, max_new_tokens=60, seed=3, details=True)
    base = rollouts(tiny, problems_of(6), sampling, progress=False)
    with own_way(tiny):
        own = rollouts(tiny, problems_of(6), sampling, progress=False)
    monkeypatch.setattr(decode, "NEWEST", 3)
    monkeypatch.setattr(loop, "COMPACT_BELOW", 0.99)
    often = rollouts(tiny, problems_of(6), sampling, progress=False)
    assert [r.token_ids for r in base] == [r.token_ids for r in own] == [r.token_ids for r in often]
    for a, b in zip(base, own, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
