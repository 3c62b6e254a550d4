"""Sampling: the same rollout whatever shares its batch, the distribution that was asked for, nothing lost to a kill."""

from __future__ import annotations

import copy
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from torch import Tensor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from toolkit import collect, edits, generate, slots, store
from toolkit.decode import Batch, batches
from toolkit.edits import RuntimeEdit, Steering
from toolkit.engines import OwnLoop, loop, responses
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition, ThinkTags
from toolkit.memory import FittingSize
from toolkit.sampling import Streams, draw
from toolkit.types import Direction, HeadEdit, Plan, Problem, Rollout

SAMPLED = Sampling(n=2, max_new_tokens=24, seed=7)
LONG = replace(SAMPLED, max_new_tokens=120)  # responses end by themselves, at different steps


def sample(target, problems, sampling=SAMPLED, **kwargs) -> list[Rollout]:
    return rollouts(target, problems, sampling, progress=False, **kwargs)


@contextmanager
def spying(lm: LM):
    """Shapes ``(rows, tokens)`` of every call of the model, by a raw hook."""
    seen: list[tuple[int, int]] = []
    handle = lm.model.register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def endless(lm: LM) -> LM:
    """The model without end-of-sequence ids: every response uses up its budget."""
    lm = replace(lm)
    lm.__dict__["eos_ids"] = frozenset({10**6})
    return lm


def direction_of(lm: LM, kind: str = "resid_mid", scale: float = 1.0, seed: int = 0) -> Direction:
    vector = scale * torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(seed))
    return Direction(vector, kind, "think", "by hand", 1, 1, lm.provenance())


# --- the same rollout whatever shares its batch --------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_equals_single(any_lm, batch_size, problems_of):
    """Prompts of different lengths, left padded together, sampled: tokens, log-probabilities and entropies."""
    sampling = replace(SAMPLED, details=True)
    together = sample(any_lm, problems_of(5), sampling)
    apart = sample(any_lm, problems_of(5), replace(sampling, batch_size=batch_size))
    for a, b in zip(together, apart, strict=True):
        assert replace(a, logprobs=None, entropies=None) == replace(b, logprobs=None, entropies=None)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert a.entropies == pytest.approx(b.entropies, abs=1e-4)


def test_rollouts_do_not_depend_on_the_order_or_the_company_of_problems(any_lm, problems_of):
    problems = problems_of(6)
    base = {(r.problem_id, r.sample): r for r in sample(any_lm, problems)}
    shuffled = random.Random(3).sample(problems, 6)
    found = sample(any_lm, shuffled)
    assert {(r.problem_id, r.sample): r for r in found} == base
    assert [r.problem_id for r in found] == [p.id for p in shuffled for _ in range(2)]
    assert sample(any_lm, problems[2:3]) == [base["p2", 0], base["p2", 1]]
    assert sample(any_lm, problems, replace(SAMPLED, n=1)) == [base[p.id, 0] for p in problems]


def test_rollouts_do_not_depend_on_how_many_prompt_tokens_share_a_batch(llama, problems_of, monkeypatch):
    base = sample(llama, problems_of(6))
    monkeypatch.setattr(loop, "PREFILL_TOKENS", 45)
    with spying(llama) as seen:
        assert sample(llama, problems_of(6)) == base
    assert sum(tokens > 1 for _, tokens in seen) > 2, "still one batch"


@given(
    lengths=st.lists(st.integers(1, 50), max_size=30).map(sorted),
    tokens=st.integers(1, 200),
    most=st.none() | st.integers(1, 9),
)
def test_batches_hold_every_item_once_in_order_and_stay_within_their_bounds(lengths, tokens, most):
    found = batches(lengths, lambda n: n, tokens, most=most)
    assert [n for batch in found for n in batch] == lengths
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(batch) <= tokens
        assert 1 <= len(batch) <= (most or len(lengths))


@given(
    prompts=st.lists(st.integers(1, 20), max_size=30).map(sorted),
    tokens=st.integers(1, 100),
    most=st.none() | st.integers(1, 9),
)
def test_the_tokens_of_equal_prompts_count_once(prompts, tokens, most):
    """A prompt is its length here. A batch ends only where the next item would exceed a limit."""
    found = batches(prompts, lambda n: n, tokens, most=most, shared=lambda n: n)
    assert [n for batch in found for n in batch] == prompts
    for batch in found:
        assert len(batch) == 1 or len(set(batch)) * max(batch) <= tokens
        assert 1 <= len(batch) <= (most or len(prompts))
    for batch, following in pairwise(found):
        more = [*batch, following[0]]
        assert len(more) > (most or len(prompts)) or len(set(more)) * max(more) > tokens


def test_samples_of_one_problem_fill_the_batch_however_long_their_prompt_is(llama, problems_of, monkeypatch):
    problems = problems_of(2)
    monkeypatch.setattr(loop, "PREFILL_TOKENS", 2 * max(len(llama.prompt_ids(p.messages)) for p in problems))
    with spying(llama) as seen:
        sample(llama, problems, replace(SAMPLED, n=8, max_new_tokens=4))
    assert next(rows for rows, tokens in seen if tokens == 1) == 16


def test_streams_go_on_beyond_their_block_of_256_numbers(llama, problems_of):
    lm, sampling = endless(llama), Sampling(max_new_tokens=300, seed=2)
    together = sample(lm, problems_of(3), sampling)
    assert [r.response_tokens for r in together] == [300] * 3
    assert together[1:2] == sample(lm, problems_of(3)[1:2], sampling)
    tail = [r.token_ids[-44:] for r in together]
    assert tail[0] != together[0].token_ids[together[0].prompt_len :][:44]


def test_seed_sample_and_problem_each_give_another_stream(llama, problems_of):
    problems = problems_of(1)
    twin = replace(problems[0], id="another name")
    found = sample(llama, [*problems, twin], replace(SAMPLED, max_new_tokens=40))
    other_seed = sample(llama, problems, replace(SAMPLED, max_new_tokens=40, seed=8))
    assert len({r.token_ids for r in [*found, *other_seed]}) == 6


def test_the_same_seed_gives_the_same_rollouts(tiny, problems_of):
    assert sample(tiny, problems_of(3)) == sample(tiny, problems_of(3))


def test_samples_of_a_problem_share_one_prefill(llama, problems_of):
    with spying(llama) as seen:
        sample(llama, problems_of(3), replace(SAMPLED, n=5))
    assert seen[0][0] == 3 and seen[1] == (15, 1)
    assert [tokens for _, tokens in seen[1:]] == [1] * (len(seen) - 1)


# --- finished rows leave -------------------------------------------------------------------------------------


def test_finished_rows_leave_the_batch(tiny, problems_of):
    """Rows that have ended cost at most a few more steps, not until the longest ends."""
    problems = [replace(p, id=f"{p.id}-{i}") for i in range(4) for p in problems_of(8)]
    with spying(tiny) as seen:
        found = sample(tiny, problems, Sampling(n=1, max_new_tokens=200, seed=1))
    lengths = [r.response_tokens for r in found]
    rows = [rows for rows, _ in seen[1:]]
    assert rows == sorted(rows, reverse=True), "rows never come back"
    assert rows[0] == 32 > rows[-1]
    assert max(lengths) > 1.5 * np.mean(lengths), "this model's responses differ too little in length to show anything"
    assert sum(rows) <= sum(n + loop.CHECK_EVERY for n in lengths) / 0.9
    assert len(rows) <= max(lengths) + loop.CHECK_EVERY


def test_nothing_is_decoded_once_every_row_has_ended(llama, problems_of, monkeypatch):
    """Every token ends: one step of prefill, and at most one look's worth of decoding."""
    lm = replace(llama)
    lm.__dict__["eos_ids"] = frozenset(range(103))
    with spying(lm) as seen:
        found = sample(lm, problems_of(3), replace(SAMPLED, max_new_tokens=200))
    assert {r.response_tokens for r in found} == {1}
    assert {r.finish for r in found} == {"stop"}
    assert len(seen) <= loop.CHECK_EVERY


def test_the_budget_is_the_number_of_response_tokens(llama, problems_of):
    for budget in (1, 7, 8, 9):
        found = sample(endless(llama), problems_of(2), Sampling(max_new_tokens=budget))
        assert {(r.response_tokens, r.finish) for r in found} == {(budget, "length")}


# --- against transformers ------------------------------------------------------------------------------------


@torch.no_grad()
def test_greedy_equals_transformers_generate(any_lm, problems_of):
    """Left padded, with the same end-of-sequence ids."""
    lm, problems = any_lm, problems_of(4)
    prompts = [lm.prompt_ids(p.messages) for p in problems]
    width = max(map(len, prompts))
    assert width > 16 > min(map(len, prompts)), "prompts on both sides of the sliding windows"
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    theirs = lm.model.generate(
        ids,
        attention_mask=(torch.arange(width) >= torch.tensor([width - len(p) for p in prompts])[:, None]).long(),
        do_sample=False,
        max_new_tokens=40,
        pad_token_id=0,
        eos_token_id=sorted(lm.eos_ids),
    )
    ours = sample(lm, problems, Sampling(temperature=0.0, max_new_tokens=40))
    for rollout, row in zip(ours, theirs[:, width:].tolist(), strict=True):
        response = list(rollout.token_ids[rollout.prompt_len :])
        assert row[: len(response)] == response
        assert not any(row[len(response) :])


def test_greedy_gives_the_same_response_to_every_sample(tiny, problems_of):
    found = sample(tiny, problems_of(1), Sampling(n=3, temperature=0.0, max_new_tokens=40))
    assert len({r.token_ids for r in found}) == 1


# --- details equal teacher-forced values ---------------------------------------------------------------------


def forced(lm: LM, rollout: Rollout, temperature: float, intervention=None) -> tuple[list[float], list[float]]:
    """Log-probabilities and entropies of a response from one teacher-forced pass."""
    logp = torch.log_softmax(collect.logits(lm, rollout, intervention).double() / temperature, dim=-1)
    tokens = torch.tensor(rollout.token_ids[rollout.prompt_len :])
    return logp.gather(1, tokens[:, None])[:, 0].tolist(), (-(logp.exp() * logp).sum(dim=-1)).tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_and_entropies_equal_teacher_forced_values(any_lm, temperature, problems_of):
    sampling = replace(SAMPLED, n=1, details=True, temperature=temperature, max_new_tokens=30)
    for rollout in sample(any_lm, problems_of(3), sampling):
        logprobs, entropies = forced(any_lm, rollout, temperature)
        assert rollout.logprobs == pytest.approx(logprobs, abs=1e-3)
        assert rollout.entropies == pytest.approx(entropies, abs=1e-3)
        assert len(rollout.logprobs) == rollout.response_tokens


@pytest.mark.parametrize("engine", [loop.OwnLoop(in_slots=False), loop.OwnLoop(in_slots=True)], ids=["batches", "slots"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_placed_token_has_log_probability_0_even_if_the_model_would_have_written_it(engine, temperature, tiny, problems_of):
    """A rule places again the third to sixth token that the model writes: the response stays the same. Others keep their log-probability."""
    sampling = replace(SAMPLED, details=True, temperature=temperature)
    free = sample(tiny, problems_of(3), sampling, engine=engine)
    written = {tuple(r.token_ids[: r.prompt_len + 2]): r.token_ids[r.prompt_len + 2 : r.prompt_len + 6] for r in free}

    def again(lm, reader, drawn):
        return written.get(tuple(reader.ids))

    ruled = sample(Condition(tiny, rules=(again,)), problems_of(3), sampling, engine=engine)
    for before, after in zip(free, ruled, strict=True):
        assert after.token_ids == before.token_ids
        assert after.logprobs[2:6] == (0.0,) * 4 and all(before.logprobs[2:6])
        assert after.logprobs[:2] == pytest.approx(before.logprobs[:2], abs=1e-5) and all(after.logprobs[6:])
        assert after.entropies[:6] == pytest.approx(before.entropies[:6], abs=1e-5)


def test_without_details_none_are_kept(llama, problems_of):
    assert all(r.logprobs is None and r.entropies is None for r in sample(llama, problems_of(1)))


@pytest.mark.parametrize("kind", ["resid_mid", "resid_post"])
def test_steered_cached_decoding_equals_the_steered_teacher_forced_pass(any_lm, kind, problems_of):
    """Steering acts in prefill and in every decode step alike. Unsteered, the same tokens have other probabilities."""
    steering = Steering(direction_of(any_lm, kind, 0.5), 0.8)
    sampling = replace(SAMPLED, n=1, details=True, max_new_tokens=30)
    for rollout in sample(Condition(any_lm, (steering,)), problems_of(2), sampling):
        logprobs, entropies = forced(any_lm, rollout, 1.0, steering)
        assert rollout.logprobs == pytest.approx(logprobs, abs=1e-3)
        assert rollout.entropies == pytest.approx(entropies, abs=1e-3)
        assert rollout.logprobs != pytest.approx(forced(any_lm, rollout, 1.0)[0], abs=1e-2)


def test_run_time_edited_cached_decoding_equals_the_edited_teacher_forced_pass(any_lm, problems_of):
    plan = plan_of(any_lm)
    sampling = replace(SAMPLED, n=1, details=True, max_new_tokens=30)
    for rollout in sample(Condition(any_lm, (RuntimeEdit(plan),)), problems_of(2), sampling):
        logprobs, _ = forced(edits.apply(any_lm, plan), rollout, 1.0)
        assert rollout.logprobs == pytest.approx(logprobs, abs=1e-3)


def plan_of(lm: LM, seed: int = 0, strength: float = 2.0) -> Plan:
    every = [(layer, head) for layer in range(lm.layout.n_layers) for head in range(lm.layout.n_heads)]
    chosen = tuple(HeadEdit(*at, "project_out", strength) for at in every)
    return Plan(chosen, direction_of(lm, seed=seed), "all heads, by hand", lm.provenance())


# --- the distribution ----------------------------------------------------------------------------------------

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.4, 3.0, -4.0, 1.0, 0.0])  # no two alike: ties may break either way
GRID = (torch.arange(100_000, dtype=torch.float64) + 0.5).div(100_000).float()


def frequencies(logits: Tensor, sampling: Sampling) -> Tensor:
    """Share of the unit interval that each token is drawn from: its probability, without noise."""
    tokens, _ = draw(logits.expand(len(GRID), -1), GRID, sampling)
    return torch.bincount(tokens, minlength=len(logits)) / len(GRID)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax(temperature):
    expected = torch.softmax(LOGITS / temperature, dim=0)
    found = frequencies(LOGITS, Sampling(temperature=temperature))
    assert torch.allclose(found, expected, atol=1e-4)


def test_sampled_first_tokens_follow_the_models_softmax(llama, problems_of):
    """Chi-square over 4,000 samples through the whole engine, streams included."""
    problem = problems_of(1)[0]
    found = sample(llama, [problem], Sampling(n=4000, max_new_tokens=1, batch_size=4000))
    with torch.no_grad():
        logits = llama.model(torch.tensor([llama.prompt_ids(problem.messages)])).logits[0, -1]
    expected = 4000 * torch.softmax(logits.double(), dim=0).numpy()
    observed = np.bincount([r.token_ids[-1] for r in found], minlength=103)
    rare = expected < 5
    observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (observed, expected))
    assert len(expected) > 10
    assert scipy_stats.chisquare(observed, expected).pvalue > 1e-3


def test_streams_of_different_rows_are_uniform_and_independent():
    keys = [(f"p{i // 4}", i % 4) for i in range(40)]
    streams = Streams(keys, seed=0)
    drawn = torch.stack([streams.at(step, range(40), torch.arange(40)) for step in range(512)])
    assert scipy_stats.kstest(drawn.flatten().numpy(), "uniform").pvalue > 1e-3
    correlation = np.corrcoef(drawn.numpy(), rowvar=False) - np.eye(40)
    assert np.abs(correlation).max() < 0.2


@pytest.mark.parametrize(
    ("top_p", "top_k"), [(0.9, 0), (0.5, 0), (0.61, 0), (0.01, 0), (1.0, 3), (1.0, 1), (1.0, 100), (0.9, 3), (0.7, 4)]
)
def test_top_p_and_top_k_mean_what_they_mean_in_transformers(top_p, top_k):
    """Truncate as transformers does, top-k first, then renormalise."""
    logits = LOGITS[None].clone()
    if top_k:
        logits = TopKLogitsWarper(min(top_k, logits.shape[1]))(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    expected = torch.softmax(logits[0], dim=0)
    found = frequencies(LOGITS, Sampling(top_p=top_p, top_k=top_k))
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.equal(found > 0, expected > 0)


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.9, 0), (1.0, 3)])
def test_log_probabilities_are_those_of_the_distribution_drawn_from_and_entropies_of_the_full_softmax(top_p, top_k):
    sampling = Sampling(temperature=0.7, top_p=top_p, top_k=top_k, details=True)
    share = frequencies(LOGITS, replace(sampling, details=False))
    tokens, details = draw(LOGITS.expand(50, -1), GRID[:: len(GRID) // 50], sampling)
    assert torch.allclose(details[0].exp(), share[tokens], atol=1e-4)
    p = torch.softmax(LOGITS.double() / 0.7, dim=0)
    assert torch.allclose(details[1].double(), -(p * p.log()).sum().expand(50), atol=1e-5)


@pytest.mark.parametrize("u", [0.0, 1.0 - 2**-24, 1.0])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=2), Sampling(top_p=0.5)], ids=["full", "top_k", "top_p"])
def test_no_number_draws_a_token_of_probability_zero(u, sampling):
    """Both ends of the unit interval (fp64 uniforms below 1 round to 1 in fp32), the last token impossible."""
    logits = torch.tensor([[0.0, 2.0, 1.0, 0.5, -torch.inf]])
    tokens, details = draw(logits, torch.tensor([u]), replace(sampling, details=True))
    assert torch.isfinite(details[0]).all(), f"token {tokens.item()} has probability zero"
    assert tokens.item() < 4


def test_entropies_of_logits_with_minus_infinity_are_finite():
    """Some models mask padded vocabulary rows with -inf."""
    logits = torch.tensor([[1.0, 2.0, -torch.inf, 0.0]])
    _, details = draw(logits, torch.tensor([0.3]), Sampling(details=True))
    p = torch.softmax(logits[0, [0, 1, 3]].double(), dim=0)
    assert details[1].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-6)


# --- out of memory -------------------------------------------------------------------------------------------


@contextmanager
def crowded(lm: LM, fits: int):
    """Every decoding step of more than ``fits`` rows runs out of memory; yields the number of rows of each such step."""
    failed: list[int] = []

    def check(module, args, kwargs):
        rows, tokens = kwargs["input_ids"].shape
        if tokens == 1 and rows > fits:
            failed.append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = lm.model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield failed
    finally:
        handle.remove()


def test_running_out_of_memory_halves_the_batch_and_changes_nothing(llama, problems_of, tmp_path):
    base = sample(llama, problems_of(5))
    with crowded(llama, 3) as failed:
        found = sample(llama, problems_of(5), out=tmp_path / "r")
    assert failed
    assert found == base
    assert sorted(store.load_rollouts(tmp_path / "r"), key=str) == sorted(base, key=str)


def test_responses_that_had_ended_when_memory_ran_out_are_not_sampled_again(tiny, problems_of, monkeypatch):
    base, ended, decode = sample(tiny, problems_of(4), LONG), [], loop._decode
    by_length = sorted(r.response_tokens for r in base)

    def counted(condition, rows, sampling):
        for row, response in decode(condition, rows, sampling):
            ended.append((rows[row].problem_id, rows[row].sample))
            yield row, response

    monkeypatch.setattr(loop, "_decode", counted)
    step, widths = Batch.step, []

    def full(batch, tokens):
        widths.append(batch.width)
        if not failed and batch.width - widths[0] > by_length[3]:  # once, after some responses have ended
            failed.append(len(ended))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(batch, tokens)

    failed: list[int] = []
    monkeypatch.setattr(Batch, "step", full)
    assert sample(tiny, problems_of(4), LONG) == base
    assert failed and 0 < failed[0] < len(base)
    assert sorted(ended) == sorted((r.problem_id, r.sample) for r in base), "each response is sampled to its end once"


@pytest.mark.parametrize("in_slots", [True, False])
def test_ctrl_c_keeps_the_responses_that_have_ended(in_slots, tiny, problems_of, tmp_path, monkeypatch):
    engine, steps, ended = OwnLoop(in_slots=in_slots), [], []
    base = sample(tiny, problems_of(4), LONG, engine=engine)
    late = sorted(r.response_tokens for r in base)[len(base) // 2]
    kind = slots.Slots if in_slots else Batch
    step, finished = kind.step, responses.Rules.finished

    def interrupted(batch, tokens):
        steps.append(1)
        if len(steps) > late:
            raise KeyboardInterrupt
        return step(batch, tokens)

    def counted(rules, over):
        for pair in finished(rules, over):
            ended.append(pair)
            yield pair

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kind, "step", interrupted)
        patch.setattr(responses.Rules, "finished", counted)
        sample(tiny, problems_of(4), LONG, engine=engine, out=tmp_path)
    assert len(store.load_rollouts(tmp_path)) == len(ended) > 0
    assert sample(tiny, problems_of(4), LONG, engine=engine, out=tmp_path) == base


def test_responses_that_have_ended_are_handed_on_after_some_time(tiny, problems_of, monkeypatch):
    monkeypatch.setattr(loop, "HAND_ON", 0.0)
    requests = [loop.Request(tiny.prompt_ids(p.messages), p.id, 0) for p in problems_of(4)]
    parts = list(OwnLoop(in_slots=True).session(Condition(tiny), requests, LONG).sample(requests, lambda n: None))
    assert [len(part) for part in parts] == [1, 1, 1, 1]


def test_the_size_that_fits_is_remembered(llama, problems_of):
    """Twelve responses in two batches of six: only the first batch runs out of memory."""
    with crowded(llama, 3) as failed:
        sample(endless(llama), problems_of(6), replace(SAMPLED, batch_size=6))
    assert failed == [6]


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=20), fits=st.integers(9, 60))
def test_batches_that_do_not_fit_fail_less_often_than_they_are_halved(sizes, fits):
    """Every row is run once, in order; a size that has failed is never tried again."""
    fitting, done, failed = FittingSize(sum), [], []

    def run(rows):
        assert all(sum(rows) < size for size in failed), "a size that is known not to fit"
        if sum(rows) > fits:
            failed.append(sum(rows))
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(rows)

    for at in range(0, len(sizes), 7):
        fitting.run(sizes[at : at + 7], run)
    assert done == sizes


def test_errors_that_are_not_about_memory_are_not_caught():
    def run(rows):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        FittingSize().run([1, 2], run)


# --- streamed and resumable ----------------------------------------------------------------------------------


class Killed(BaseException):
    """Like KeyboardInterrupt, and nobody else's."""


@contextmanager
def killed_after(monkeypatch, batches: int):
    """The run is killed when it begins its next batch."""
    decode, begun = loop._decode, []

    def until(*args, **kwargs):
        begun.append(len(args[1]))
        if len(begun) > batches:
            raise Killed
        return decode(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_decode", until)
        yield begun


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_killed_run_goes_on_where_it_was_and_equals_an_uninterrupted_one(after, tiny, problems_of, tmp_path, monkeypatch):
    problems, sampling, out = problems_of(5), replace(SAMPLED, batch_size=4, details=True), tmp_path / "r"
    base = sample(tiny, problems, replace(sampling, batch_size=4))
    with killed_after(monkeypatch, after), pytest.raises(Killed):
        sample(tiny, problems, sampling, out=out)
    assert len(store.load_rollouts(out)) == 4 * after
    with killed_after(monkeypatch, 99) as begun:
        resumed = sample(tiny, problems, sampling, out=out)
    assert resumed == base
    assert sum(begun) == 10 - 4 * after, "work was done twice"
    assert sorted(store.load_rollouts(out), key=str) == sorted(base, key=str)
    with killed_after(monkeypatch, 0):
        assert sample(tiny, problems, sampling, out=out) == base, "a finished run samples nothing"


def test_a_run_killed_while_writing_loses_that_batch_only_and_leaves_no_broken_part(tiny, problems_of, tmp_path, monkeypatch):
    import pandas as pd

    problems, sampling, out = problems_of(4), replace(SAMPLED, batch_size=4), tmp_path / "r"
    write, calls = pd.DataFrame.to_parquet, []

    def cut_short(frame, path, *args, **kwargs):
        write(frame, path, *args, **kwargs)
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(path.read_bytes()[:100])
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pd.DataFrame, "to_parquet", cut_short)
        sample(tiny, problems, sampling, out=out)
    assert len(store.load_rollouts(out)) == 4
    assert sample(tiny, problems, sampling, out=out) == sample(tiny, problems, sampling)


def test_two_runs_into_one_directory_share_the_work_and_double_nothing(tiny, problems_of, tmp_path, monkeypatch, caplog):
    problems, sampling, decode, begun = problems_of(6), replace(SAMPLED, batch_size=2), loop._decode, []

    def counted(*args, **kwargs):
        begun.append(len(args[1]))
        return decode(*args, **kwargs)

    monkeypatch.setattr(loop, "_decode", counted)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: sample(tiny, problems, sampling, out=tmp_path), range(2))
    assert first == second == sample(tiny, problems, SAMPLED, out=tmp_path)
    assert len(store.load_rollouts(tmp_path)) == len(first) == sum(begun)
    assert f"Another process is sampling into {tmp_path}: waiting" in caplog.text


def test_a_stopped_run_says_how_much_is_kept_and_where(tiny, problems_of, tmp_path, monkeypatch):
    with killed_after(monkeypatch, 2), pytest.raises(Killed) as caught:
        sample(tiny, problems_of(5), replace(SAMPLED, batch_size=4), out=tmp_path)
    assert caught.value.__notes__ == [f"8 of 10 kept in {tmp_path}"]


def test_kept_responses_to_another_prompt_are_never_taken_for_this_ones(tiny, problems_of, tmp_path):
    """Whatever a header does not tell apart: the tokens do."""
    sample(tiny, problems_of(2), SAMPLED, out=tmp_path)
    other = other_template(tiny)
    store.write_json(store.load_header(tmp_path) | {"template": other.provenance().template_hash}, tmp_path / "header.json")
    with pytest.raises(store.WrongModelError, match="a response to another prompt of problem 'p0'"):
        sample(other, problems_of(2), SAMPLED, out=tmp_path)


def test_kept_rollouts_are_graded_by_the_present_grader_and_problems(tiny, problems_of, tmp_path, monkeypatch, caplog):
    """Their tokens are not sampled again; the files hold the new grades."""
    problems = [replace(p, meta={**p.meta, "grader": "facts", "golds": ["another word"], "wrong": []}) for p in problems_of(3)]
    first = sample(tiny, problems, SAMPLED, out=tmp_path)
    wanted = [replace(p, meta={**p.meta, "grader": "length", "low_words": -1, "high_words": None}) for p in problems]
    monkeypatch.setattr(loop, "_decode", lambda *a: pytest.fail("sampled again"))
    again = sample(tiny, wanted, SAMPLED, out=tmp_path)
    assert [r.correct for r in again] == [r.closed for r in again] and any(r.closed for r in again)
    assert [replace(r, correct=False) for r in again] == [replace(r, correct=False) for r in first]
    assert sorted(store.load_rollouts(tmp_path), key=str) == sorted(again, key=str)
    changed = sum(a != b for a, b in zip(first, again, strict=True))
    assert changed and f"{changed} of 6 rollouts kept in {tmp_path} are graded differently now" in caplog.text
    caplog.clear()
    assert sample(tiny, wanted, SAMPLED, out=tmp_path) == again and "differently" not in caplog.text


def test_a_stop_is_not_hidden_by_a_damaged_part(tiny, problems_of, tmp_path, monkeypatch):
    def stopped(*args):
        (tmp_path / "part-00007-x.parquet").write_bytes(b"torn")
        raise Killed

    monkeypatch.setattr(loop, "_decode", stopped)
    with pytest.raises(Killed) as caught:
        sample(tiny, problems_of(2), SAMPLED, out=tmp_path)
    assert caught.value.__notes__ == [f"0 of 4 kept in {tmp_path}"]


def test_responses_that_go_on_from_tokens_are_kept_too(tiny, problems_of, tmp_path, monkeypatch):
    problem = problems_of(1)[0]
    ids = tiny.prompt_ids(problem.messages)
    asked = [(problem, ids), (problem, [*ids, ids[0]]), (problem, ids)]
    wanted = generate.continuations(tiny, asked, SAMPLED)
    assert generate.continuations(tiny, asked, SAMPLED, out=tmp_path) == wanted
    with killed_after(monkeypatch, 0):
        assert generate.continuations(tiny, asked, SAMPLED, out=tmp_path) == wanted


def test_the_batch_size_may_change_on_resuming(tiny, problems_of, tmp_path, monkeypatch):
    with killed_after(monkeypatch, 1), pytest.raises(Killed):
        sample(tiny, problems_of(4), replace(SAMPLED, batch_size=3), out=tmp_path)
    assert sample(tiny, problems_of(4), SAMPLED, out=tmp_path) == sample(tiny, problems_of(4))


def other_template(lm: LM) -> LM:
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|user|>", "<|user|>Please ")
    return replace(lm, tokenizer=tokenizer)


def reworded(problems: list[Problem]) -> list[Problem]:
    """The same ids and answers, another question."""
    content = problems[0].messages[0]["content"]
    return [replace(problems[0], messages=({"role": "user", "content": f"{content} please"},)), *problems[1:]]


CHANGES = {
    "the model": lambda lm, ps, s, other: (other, ps, s),
    "the seed": lambda lm, ps, s, other: (lm, ps, replace(s, seed=99)),
    "the temperature": lambda lm, ps, s, other: (lm, ps, replace(s, temperature=0.5)),
    "the budget": lambda lm, ps, s, other: (lm, ps, replace(s, max_new_tokens=25)),
    "the problems": lambda lm, ps, s, other: (lm, ps[1:], s),
    "a gold answer": lambda lm, ps, s, other: (lm, [replace(ps[0], answer="0"), *ps[1:]], s),
    "a question": lambda lm, ps, s, other: (lm, reworded(ps), s),
    "the chat template": lambda lm, ps, s, other: (other_template(lm), ps, s),
    "the think tags": lambda lm, ps, s, other: (replace(lm, tags=ThinkTags(None, None)), ps, s),
    "steering": lambda lm, ps, s, other: (Condition(lm, (Steering(direction_of(lm), 0.1),)), ps, s),
}


@pytest.mark.parametrize("what", CHANGES)
def test_rollouts_made_otherwise_are_never_taken_for_this_runs(what, llama, model_of, problems_of, tmp_path):
    problems = problems_of(2)
    sample(llama, problems, SAMPLED, out=tmp_path)
    target, others, sampling = CHANGES[what](llama, problems, SAMPLED, model_of("qwen2"))
    with pytest.raises(store.WrongModelError, match=r"Choose another directory"):
        sample(target, others, sampling, out=tmp_path)
    assert sample(llama, problems, SAMPLED, out=tmp_path) == sample(llama, problems)


INTERVENTIONS = {
    "the strength of steering": lambda lm: (Steering(direction_of(lm), 0.1), Steering(direction_of(lm), 0.2)),
    "the direction of steering": lambda lm: (Steering(direction_of(lm), 0.1), Steering(direction_of(lm, seed=1), 0.1)),
    "the layers of steering": lambda lm: (Steering(direction_of(lm), 0.1), Steering(direction_of(lm), 0.1, (1,))),
    "the strength of an edit": lambda lm: (RuntimeEdit(plan_of(lm)), RuntimeEdit(plan_of(lm, strength=1.0))),
    "the direction of an edit": lambda lm: (RuntimeEdit(plan_of(lm)), RuntimeEdit(plan_of(lm, seed=1))),
    "the heads of an edit": lambda lm: (RuntimeEdit(plan_of(lm)), RuntimeEdit(replace(plan_of(lm), edits=plan_of(lm).edits[:2]))),
}


@pytest.mark.parametrize("what", INTERVENTIONS)
def test_rollouts_of_another_intervention_are_never_taken_for_this_runs(what, llama, problems_of, tmp_path):
    before, after = INTERVENTIONS[what](llama)
    sample(Condition(llama, (before,)), problems_of(1), SAMPLED, out=tmp_path)
    with pytest.raises(store.WrongModelError, match="interventions"):
        sample(Condition(llama, (after,)), problems_of(1), SAMPLED, out=tmp_path)


def test_the_error_names_what_differs(llama, problems_of, tmp_path):
    sample(llama, problems_of(1), SAMPLED, out=tmp_path)
    with pytest.raises(store.WrongModelError) as caught:
        sample(llama, problems_of(1), replace(SAMPLED, seed=123), out=tmp_path)
    for part in (str(tmp_path), "sampling seed 7 there, 123 here"):
        assert part in str(caught.value), part


def test_rollouts_of_a_model_without_think_tags_are_read_back_though_both_spans_are_the_whole_response(tiny, problems_of, tmp_path):
    untagged = replace(tiny, tags=ThinkTags(None, None))
    sampled = sample(untagged, problems_of(3), SAMPLED, out=tmp_path)
    assert any(r.think == r.answer and r.think_tokens for r in sampled)
    assert sorted(store.load_rollouts(tmp_path), key=str) == sorted(sampled, key=str)
