"""Decoding in slots gives the responses of decoding in batches, whoever joins or leaves, step by step or from a recording."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from card import pretended
from tape import Recorder, Tape
from test_generate import crowded, endless, spying
from test_steering import SCOPES, Script, direction_of
from test_waiting import INTERVENTIONS
from zoo import model_of_type

from toolkit import families, hooks, phases, recording, slots, store
from toolkit import lm as lms
from toolkit.decode import Batch, prefill
from toolkit.edits import steering
from toolkit.engines import EngineError, OwnLoop, loop
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition, ThinkTags
from toolkit.slots import Slots, obstacle

SAMPLING = Sampling(n=3, max_new_tokens=40, seed=5, details=True)
IN_SLOTS, IN_BATCHES = OwnLoop(in_slots=True), OwnLoop(in_slots=False)
SERVED = ("llama", "qwen2", "qwen3", "phi3", "olmo2", "gpt2", "gpt_neox", "gpt_neox_sequential", "tiny-reasoner")
REFUSED = ("mistral", "gemma2", "gemma3")


def sample(target, problems, sampling=SAMPLING, engine=IN_SLOTS, **kwargs):
    return rollouts(target, problems, sampling, engine=engine, progress=False, **kwargs)


def check_equal(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        assert replace(a, logprobs=None, entropies=None) == replace(b, logprobs=None, entropies=None)
        if b.logprobs is not None:
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
            assert a.entropies == pytest.approx(b.entropies, abs=1e-4)


@contextmanager
def recorded(monkeypatch, *, after: int = 2, width: int = 16):
    """Slots whose steps are recorded on a tape after two calls, and whose width grows every 16 tokens; yields the recorder."""
    recorder = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "recorder_for", lambda device: recorder)
        patch.setattr(slots, "WIDTH_STEP", width)
        patch.setattr(slots, "Repeated", lambda *args: recording.Repeated(*args, after=after))
        yield recorder


@contextmanager
def counted_passes(lm: LM):
    """Shapes ``(rows, tokens)`` of every call of the model, without a hook, which would be an obstacle to slots."""
    shapes: list[tuple[int, ...]] = []
    own = lm.model.forward

    def forward(*args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return own(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm.model, "forward", forward)
        yield shapes


# --- the same logits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVED)
def test_a_step_gives_the_logits_of_the_models_own_cache(name, model_of, problems_of):
    """Rows of different lengths, fed the same tokens; a third row joins after ten steps."""
    lm = model_of(name)
    prompts = [lm.prompt_ids(p.messages) for p in problems_of(5)]
    tokens = torch.randint(5, 103, (30, 5), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode(), hooks.wrap_attention(lm.layout, lambda layer, attend, q, k, v: attend(q, k, v)):
        cache, first, mask = prefill(lm, prompts)
        batch = Batch(lm, cache, mask, 30)
        expected = [first, *(batch.step(row) for row in tokens)]
    scale = max(float(logits.abs().max()) for logits in expected)
    with torch.inference_mode():
        places = Slots(lm, 6, 8)
        found = [places.join([4, 0, 2], prompts[:3])]
        for row in tokens[:10]:
            found.append(places.step(torch.stack([row[1], row[0], row[2], row[0], row[0], row[0]]))[[4, 0, 2]])
            torch.testing.assert_close(found[-1], expected[len(found) - 1][:3], rtol=1e-5, atol=1e-5 * scale)
        late = places.join([5, 1], prompts[3:])
        torch.testing.assert_close(late, expected[0][3:], rtol=1e-5, atol=1e-5 * scale)
        for i in range(20):
            row, new = tokens[10 + i], tokens[i]
            logits = places.step(torch.stack([row[1], new[4], row[2], row[0], row[0], new[3]]))
            torch.testing.assert_close(logits[[4, 0, 2]], expected[11 + i][:3], rtol=1e-5, atol=1e-5 * scale)
            torch.testing.assert_close(logits[[5, 1]], expected[1 + i][3:], rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("name", SERVED)
def test_slots_sample_what_batches_sample(name, model_of, problems_of):
    lm = model_of(name)
    check_equal(sample(lm, problems_of(5)), sample(lm, problems_of(5), engine=IN_BATCHES))


def test_every_family_that_slots_serve_is_sampled_as_in_batches(problems_of):
    """Families for which ``obstacle`` finds nothing; the others are decoded in batches."""
    few, served = replace(SAMPLING, n=1, max_new_tokens=12), 0
    for model_type in families.SUPPORTED:
        lm = model_of_type(model_type)
        if obstacle(Condition(lm)) is None:
            check_equal(sample(lm, problems_of(3), few), sample(lm, problems_of(3), few, IN_BATCHES))
            served += 1
    assert served >= 30


@pytest.mark.parametrize("name", SCOPES)
def test_every_scope_acts_in_slots_as_in_batches(name, llama, problems_of, monkeypatch):
    """Scripted phases that differ between rows; rows join, so each row's think tokens are counted from its own start."""
    condition = Condition(llama, (steering(direction_of(llama), 0.7, during=SCOPES[name]),), rules=(Script(),))
    sampling = replace(SAMPLING, batch_size=4)
    expected = sample(condition, problems_of(4), sampling, IN_BATCHES)
    check_equal(sample(condition, problems_of(4), sampling), expected)
    with recorded(monkeypatch) as recorder:
        check_equal(sample(condition, problems_of(4), sampling), expected)
    assert recorder.counts["repeated"] > 10


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_recorded_steps_sample_what_batches_sample(name, tiny, problems_of, monkeypatch, caplog):
    """With every intervention. Rows join, the cache grows and shrinks, slots are given up: all with recordings in between."""
    condition = Condition(tiny, INTERVENTIONS[name](tiny))
    sampling = replace(SAMPLING, batch_size=5)
    with recorded(monkeypatch) as recorder, caplog.at_level(logging.WARNING):
        found = sample(condition, problems_of(4), sampling)
    check_equal(found, sample(condition, problems_of(4), sampling, IN_BATCHES))
    assert recorder.counts["recorded"] >= 2 and recorder.counts["repeated"] > 20
    assert not caplog.records


def test_every_step_runs_the_same_operations_whatever_the_phases(llama, problems_of):
    """So no decision of Python depends on values."""
    act = steering(direction_of(llama), 0.7, during=SCOPES["first 4 think tokens"])
    opening, closing = (llama.token_id(tag) for tag in (llama.tags.open, llama.tags.close))
    script = [[9, 9, 9], [opening, 9, 9], [9, opening, 9], [closing, 9, 9], [9, 9, opening], [9, closing, 9]]
    with act(llama), torch.inference_mode():
        places, names = Slots(llama, 3, 64), []
        places.join([0, 1, 2], [llama.prompt_ids(p.messages) for p in problems_of(3)])
        places.step(torch.tensor([9, 9, 9]))
        for tokens in script:
            with Tape() as tape:
                places.step(torch.tensor(tokens))
            names.append(tape.names)
    assert len(names[0]) > 50
    assert all(other == names[0] for other in names)


# --- joining -------------------------------------------------------------------------------------------------


def test_rows_join_as_others_leave(tiny, problems_of):
    """As many rows as slots are decoded until none waits; far fewer steps than batch after batch."""
    sampling = replace(SAMPLING, n=8, max_new_tokens=120, batch_size=8)
    with counted_passes(tiny) as apart:
        expected = sample(tiny, problems_of(8), sampling, IN_BATCHES)
    with counted_passes(tiny) as together:
        check_equal(sample(tiny, problems_of(8), sampling), expected)
    assert {rows for rows, tokens in together if tokens == 1} <= {8, 4, 2, 1}
    least = sum(r.response_tokens - 1 for r in expected) / 8
    assert least - 8 <= together.count((8, 1)) <= 1.2 * least
    steps = [sum(tokens == 1 for _, tokens in shapes) for shapes in (together, apart)]
    assert steps[0] < 0.85 * steps[1]


@pytest.mark.parametrize("budget", [1, 7, 8, 9])
def test_the_budget_is_the_number_of_response_tokens_in_slots_too(budget, llama, problems_of):
    sampling = Sampling(n=3, max_new_tokens=budget, batch_size=4)
    found = sample(endless(llama), problems_of(3), sampling)
    assert {(r.response_tokens, r.finish) for r in found} == {(budget, "length")}
    check_equal(found, sample(endless(llama), problems_of(3), sampling, IN_BATCHES))


def test_the_random_numbers_of_a_row_do_not_depend_on_when_it_joins(llama, problems_of):
    """More than a block of 256 numbers, begun in the middle of another row's block."""
    sampling = Sampling(n=3, max_new_tokens=300, batch_size=2, seed=2)
    lm = endless(llama)
    check_equal(sample(lm, problems_of(1), sampling), sample(lm, problems_of(1), sampling, IN_BATCHES))


def test_no_position_lies_beyond_the_models_context(model_of, problems_of):
    """GPT-2 has an embedding for each of its 512 positions, and none for the 513th."""
    lm = endless(model_of("gpt2"))
    prompts = [len(lm.prompt_ids(p.messages)) for p in problems_of(2)]
    sampling = Sampling(n=2, max_new_tokens=512 - max(prompts), batch_size=3)
    assert all(r.finish == "length" for r in sample(lm, problems_of(2), sampling))


def test_running_out_of_memory_halves_the_slots_and_keeps_what_is_done(tiny, problems_of, tmp_path, monkeypatch):
    sampling = replace(SAMPLING, batch_size=8)
    expected = sample(tiny, problems_of(5), sampling, IN_BATCHES)
    monkeypatch.setattr(loop, "obstacle", lambda condition: None)  # the hook that runs out of memory would be one
    with crowded(tiny, 4) as failed:
        found = sample(tiny, problems_of(5), sampling, out=tmp_path / "r")
    assert failed == [8]
    check_equal(found, expected)
    assert len(store.load_rollouts(tmp_path / "r")) == len(found)


def test_responses_are_handed_on_as_they_end_and_no_intervention_acts_meanwhile(tiny, problems_of):
    condition = Condition(tiny, (steering(direction_of(tiny), 0.3, during="think"),))
    sampling = replace(SAMPLING, batch_size=4)
    requests = [r for p in problems_of(4) for r in [loop.Request(tiny.prompt_ids(p.messages), p.id, s) for s in range(3)]]
    counted: list[int] = []
    parts = list(IN_SLOTS.session(condition, requests, sampling).sample(requests, counted.append))
    assert [len(part) for part in parts] == [4, 4, 4]
    assert sorted(i for part in parts for i, _ in part) == list(range(12))
    assert counted == [1] * 12

    def hooked() -> list[tuple[int, int]]:
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in tiny.model.modules()]

    before = hooked()  # transformers leaves hooks of its own on a model that has returned its hidden states
    for _ in IN_SLOTS.session(condition, requests, sampling).sample(requests, counted.append):
        assert hooked() == before
        assert not torch.is_inference_mode_enabled()


# --- recording -----------------------------------------------------------------------------------------------


def failing(run):
    raise RuntimeError("operation not permitted when stream is capturing")


def without_memory(run):
    raise torch.OutOfMemoryError("CUDA out of memory")


def deviating(run):
    result = run()
    return lambda: None, result + 1


@pytest.mark.parametrize("record", [failing, without_memory, deviating])
def test_a_step_that_cannot_be_recorded_runs_as_it_is_with_a_warning(record, tiny, problems_of, monkeypatch, caplog):
    expected = sample(tiny, problems_of(3), engine=IN_BATCHES)
    with recorded(monkeypatch), caplog.at_level(logging.WARNING):
        monkeypatch.setattr(loop, "recorder_for", lambda device: record)
        check_equal(sample(tiny, problems_of(3)), expected)
    assert "could not be recorded" in caplog.text


def test_a_number_frozen_by_a_recording_is_noticed():
    """The tape does what a CUDA graph does: Python is not run again."""
    state, steps = torch.zeros(1), []

    def run():
        steps.append(1)
        state.add_(len(steps))
        return state * 1

    repeat, result = Recorder()(run)
    repeat()
    assert result.item() == 2  # 1 + 1, not 1 + 2


def test_without_a_gpu_nothing_is_recorded():
    assert recording.recorder_for(torch.device("cpu")) is None
    assert recording.recorder_for(torch.device("cuda")) is recording.cuda_graph


# --- what slots do not serve ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_models_with_other_caches_are_decoded_in_batches(name, model_of, problems_of):
    lm = model_of(name)
    assert obstacle(Condition(lm))
    with pytest.raises(EngineError, match="in batches"):
        sample(lm, problems_of(2))


def test_everything_that_a_recording_would_miss_is_an_obstacle(llama):
    assert obstacle(Condition(llama)) is None
    assert "every step" in obstacle(Condition(llama, (lambda lm: hooks.record(lm.layout, ()),)))
    spelled = replace(llama, tags=ThinkTags("<thought>", "</thought>"))
    act = steering(direction_of(llama), 0.5, during="all")
    assert obstacle(Condition(spelled)) is None
    assert "single token" in obstacle(Condition(spelled, (act,)))
    with hooks.record(llama.layout, [hooks.Site("resid_post", 0)]):
        assert "hooks" in obstacle(Condition(llama))
    with hooks.wrap_attention(llama.layout, lambda layer, attend, q, k, v: attend(q, k, v)):
        assert "attention" in obstacle(Condition(llama))
    with torch.autocast("cpu"):
        assert "autocast" in obstacle(Condition(llama))


def test_on_a_cpu_the_default_is_batches_and_on_a_gpu_slots_where_they_can(llama, model_of):
    with pretended(llama) as (there, _):
        assert isinstance(OwnLoop().session(Condition(there), [], SAMPLING), loop._SlotSession)
        assert not isinstance(IN_BATCHES.session(Condition(there), [], SAMPLING), loop._SlotSession)
    with pretended(model_of("mistral")) as (there, _):
        assert not isinstance(OwnLoop().session(Condition(there), [], SAMPLING), loop._SlotSession)
    assert not isinstance(OwnLoop().session(Condition(llama), [], SAMPLING), loop._SlotSession)


def test_tags_of_one_token_are_told_from_others(llama):
    assert phases.single_tokens(llama) and phases.single_tokens(replace(llama, tags=None))
    assert not phases.single_tokens(replace(llama, tags=ThinkTags(None, "</thought>")))


# --- a fixed shape -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_a_fixed_shape_a_response_is_bitwise_the_same_whatever_the_others(dtype, model_of, problems_of):
    """Log-probabilities and entropies are equal to the last bit: alone, among others, in another order, joining late."""
    lm, engine = model_of("llama", dtype), OwnLoop(fixed=(4, 80))
    problems = problems_of(6)
    base = {(r.problem_id, r.sample): r for r in sample(lm, problems, engine=engine)}
    for some in (problems[::-1], problems[2:3], problems[1:4]):
        for r in sample(lm, some, engine=engine):
            assert r == base[r.problem_id, r.sample]


def test_what_does_not_fit_into_the_fixed_shape_is_refused_before_any_work(llama, problems_of):
    with spying(llama) as seen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "obstacle", lambda condition: None)
        with pytest.raises(EngineError, match=r"fixed width is 41: give fixed=\(4, \d+\)"):
            sample(llama, problems_of(3), engine=OwnLoop(fixed=(4, 41)))
    assert not seen


def test_a_fixed_shape_is_part_of_the_header_and_needs_slots(llama, model_of, problems_of, tmp_path):
    assert OwnLoop().header == IN_SLOTS.header == {} and OwnLoop(fixed=(4, 80)).header == {"shape": "4 x 80"}
    sample(llama, problems_of(2), out=tmp_path / "r")
    with pytest.raises(store.WrongModelError, match="shape"):
        sample(llama, problems_of(2), engine=OwnLoop(fixed=(4, 80)), out=tmp_path / "r")
    with pytest.raises(EngineError, match="needs slots"):
        OwnLoop(in_slots=False, fixed=(4, 80))
    with pytest.raises(EngineError, match="cannot be decoded in slots"):
        OwnLoop(fixed=(4, 80)).check(Condition(model_of("mistral")), SAMPLING)


# --- waiting -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "steered while thinking", "clamped on a ramp", "mean"])
def test_slots_wait_once_in_eight_steps(name, tiny, problems_of):
    during, counted = INTERVENTIONS[name](tiny), []
    with pretended(tiny) as (there, waits):
        for steps in (24, 72):
            waits.clear()
            patch = pytest.MonkeyPatch()
            patch.setattr(loop, "recorder_for", lambda device: None)
            found = sample(Condition(endless(there), during), problems_of(3), replace(SAMPLING, max_new_tokens=steps))
            patch.undo()
            counted.append(waits.total())
    assert counted[1] - counted[0] <= (72 - 24) / 8
    expected = sample(Condition(endless(tiny), during), problems_of(3), replace(SAMPLING, max_new_tokens=72), IN_BATCHES)
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]


def test_rows_that_join_and_leave_on_a_gpu_are_sampled_as_on_a_cpu(tiny, problems_of, monkeypatch):
    sampling = replace(SAMPLING, batch_size=4)
    expected = sample(tiny, problems_of(5), sampling, IN_BATCHES)
    monkeypatch.setattr(loop, "recorder_for", lambda device: None)
    with pretended(tiny) as (there, _):
        found = sample(there, problems_of(5), sampling, OwnLoop())
    check_equal(found, expected)


# --- on a real GPU (never run yet) ---------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", INTERVENTIONS)
def test_a_cuda_graph_samples_what_single_operations_sample(name, tiny, problems_of, caplog, monkeypatch):
    """Rounding may turn a few responses, so nearly all must be equal. A step that could not be recorded would log a warning."""
    there = lms.load("tiny-reasoner", device="cuda")
    condition = Condition(there, INTERVENTIONS[name](tiny))
    sampling = replace(SAMPLING, n=8, batch_size=16)
    recordings = []
    monkeypatch.setattr(loop, "recorder_for", lambda device: lambda run: recordings.append(device) or recording.cuda_graph(run))
    with caplog.at_level(logging.WARNING):
        found = sample(condition, problems_of(8), sampling, OwnLoop())
    assert recordings and not caplog.records
    expected = sample(condition, problems_of(8), sampling, IN_BATCHES)
    assert sum(a.token_ids == b.token_ids for a, b in zip(found, expected, strict=True)) >= 0.9 * len(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_a_fixed_shape_a_response_is_bitwise_the_same_on_a_gpu_too(dtype, problems_of):
    there, engine = lms.load("tiny-reasoner", device="cuda", dtype=dtype), OwnLoop(fixed=(4, 80))
    base = {(r.problem_id, r.sample): r for r in sample(there, problems_of(6), engine=engine)}
    for some in (problems_of(6)[::-1], problems_of(6)[2:3]):
        for r in sample(there, some, engine=engine):
            assert r == base[r.problem_id, r.sample]
