"""Sampling by a server: the same responses as the toolkit's own loop, the right weights, and nothing lost when the server fails."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import llama
import pytest
from servers import KINDS, own_copy, serving

from toolkit import edits, engines, evaluate, generate, store
from toolkit.engines import CannotSampleError, EngineError, Request, connect, server
from toolkit.engines.client import Client
from toolkit.generate import Sampling
from toolkit.lm import LM, Condition
from toolkit.types import HeadEdit, Plan

PROBES = 4  # requests before the first response is sampled
EXACT = [kind for kind in KINDS if kind != "ollama"]
GREEDY = Sampling(n=2, temperature=0.0, max_new_tokens=60)
WARM = Sampling(n=3, max_new_tokens=60, seed=1)


def address(kind: str, url: str) -> str:
    return f"{url}/m0" if kind == "ollama" else url


def rollouts(engine, lm, problems, sampling=GREEDY, **kwargs):
    return generate.rollouts(lm, problems, sampling, engine=engine, progress=False, **kwargs)


def without(lm: LM, *heads: tuple[int, int], strength: float = 1.0) -> LM:
    """The model with some heads scaled down."""
    plan = Plan(tuple(HeadEdit(*head, "scale", strength) for head in heads), None, "heads off", lm.provenance())
    return edits.apply(lm, plan)


@pytest.fixture(scope="module")
def edited(tiny):
    return without(tiny, (2, 1))


@pytest.fixture(scope="module")
def otherwise(tiny):
    return without(tiny, (1, 0))


# --- what is sampled -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_rollouts_through_every_kind_of_server_equal_those_of_the_own_loop(kind, tiny, problems_of):
    with serving(kind, tiny) as (url, _):
        found = rollouts(connect(address(kind, url)), tiny, problems_of(4))
    assert found == rollouts(engines.OWN_LOOP, tiny, problems_of(4))


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("eos", [True, False])
def test_the_end_token_is_counted_once_whether_or_not_the_server_returns_it(kind, eos, tiny, problems_of):
    with serving(kind, tiny, eos=eos) as (url, _):
        assert rollouts(connect(url), tiny, problems_of(3)) == rollouts(engines.OWN_LOOP, tiny, problems_of(3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_needs_its_kind_named_is_sampled_like_one_that_was_found(kind, tiny, problems_of):
    with serving(kind, tiny) as (url, _):
        found = rollouts(connect(f"{kind}+{address(kind, url)}"), tiny, problems_of(2))
    assert len(found) == 4


def with_bos(lm: LM) -> tuple[LM, list[Request]]:
    """The model with a tokenizer that has a BOS, and requests whose prompts begin with it."""
    own = copy.deepcopy(lm.tokenizer)
    own.bos_token = "<|end|>"
    texts = ("1+2=", "3+4=", "5+6=")
    ids = [[own.bos_token_id, *own(text, add_special_tokens=False)["input_ids"]] for text in texts]
    return replace(lm, tokenizer=own), [Request(prompt, text, 0) for prompt, text in zip(ids, texts, strict=True)]


def sampled(engine, lm: LM, requests: list[Request]) -> dict[int, list[int]]:
    batches = engine.session(Condition(lm), requests, GREEDY).sample(requests, lambda n: None)
    return {index: response.tokens for batch in batches for index, response in batch}


@pytest.mark.parametrize("cached", [0, 2])
def test_ollama_reads_a_prompt_with_its_beginning_of_sequence_token_once(cached, tiny):
    lm, requests = with_bos(tiny)
    with serving("ollama", lm, cached=cached) as (url, _):
        assert sampled(connect(f"{url}/m0"), lm, requests) == sampled(engines.OWN_LOOP, lm, requests)


def test_a_beginning_of_sequence_token_too_many_or_too_few_in_ollama_is_an_error(tiny):
    lm, requests = with_bos(tiny)
    bare = [replace(request, prompt=request.prompt[1:]) for request in requests]
    for adds_bos, prompts, read in ((True, bare, "5 tokens of a prompt of 4"), (False, requests, "4 tokens of a prompt of 5")):
        with (
            serving("ollama", lm, adds_bos=adds_bos) as (url, _),
            pytest.raises(EngineError, match=rf"Ollama read {read}: .*beginning-of-sequence.*llama-server"),
        ):
            sampled(connect(f"{url}/m0"), lm, prompts)


@pytest.mark.parametrize("kind", ["vllm", "llama"])
def test_each_response_has_a_seed_of_its_own_that_a_repeated_call_repeats(kind, tiny, problems_of):
    with serving(kind, tiny) as (url, state):
        first, second = (rollouts(connect(url), tiny, problems_of(3), WARM) for _ in range(2))
        seeds = [
            body["seed"]
            for body in state.requests
            if body.get("n_probs") == 0 or ("n_probs" not in body and "logprobs" not in body)
        ]
    assert first == second
    assert len({r.token_ids for r in first}) > 3 and len(set(seeds)) >= 9


def test_probabilities_are_those_of_the_settings(tiny, problems_of):
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=20, max_new_tokens=5)
    with serving("vllm", tiny) as (url, state):
        rollouts(connect(url), tiny, problems_of(1), sampling)
    body = state.requests[-1]
    assert (body["temperature"], body["top_p"], body["top_k"], body["repetition_penalty"], body["min_p"]) == (
        0.7,
        0.9,
        20,
        1.0,
        0.0,
    )


# --- which weights are served --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_of_other_weights_is_refused_before_any_work_and_the_divergence_is_named(kind, tiny, edited, problems_of):
    with serving(kind, edited) as (url, state):
        with pytest.raises(EngineError, match=r"does not serve tiny-reasoner.* m?0?\S* \d\.\d+ nats per token"):
            rollouts(connect(address(kind, url), tiny, tolerance=0.02), tiny, problems_of(4))
        assert len(state.requests) <= PROBES, "only the probes were sent"


@pytest.mark.parametrize("kind", ["vllm", "llama"])
def test_the_adapter_that_computes_the_condition_is_found_by_log_probabilities(kind, tiny, edited, otherwise, problems_of):
    with serving(kind, tiny, otherwise, edited) as (url, _):
        engine = connect(url, tiny)
        for lm in (tiny, edited, otherwise):
            assert rollouts(engine, lm, problems_of(3)) == rollouts(engines.OWN_LOOP, lm, problems_of(3))


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_an_edit_is_loaded_into_a_running_server_as_an_adapter(kind, tiny, edited, problems_of, tmp_path):
    with serving(kind, tiny) as (url, state):
        engine = connect(url, tiny, adapters=tmp_path)
        assert rollouts(engine, edited, problems_of(3)) == rollouts(engines.OWN_LOOP, edited, problems_of(3))
        assert len(state.loaded) == 1
        rollouts(engine, edited, problems_of(2))
        assert len(state.loaded) == 1, "it is not loaded again"


@pytest.mark.parametrize("is_child", [True, False], ids=["edited", "a merged adapter"])
def test_an_edit_of_a_base_that_was_read_from_a_directory_is_loaded_as_an_adapter(is_child, tiny, edited, problems_of, tmp_path):
    base = replace(tiny, name=str(tmp_path / "model"), folder=tmp_path / "model")
    edit = replace(edited, folder=base.folder, parent=tiny.fingerprint if is_child else None)  # as ``child`` and ``load`` make them
    with serving("vllm", base) as (url, state):
        engine = connect(url, base, adapters=tmp_path / "adapters")
        assert rollouts(engine, edit, problems_of(2)) == rollouts(engines.OWN_LOOP, edit, problems_of(2))
        assert len(state.loaded) == 1
        engine.session(Condition(base), [generate.Request(base.prompt_ids(problems_of(1)[0].messages), "a", 0)], GREEDY)
        assert len(state.loaded) == 1, "the base is found by its directory"


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama"])
def test_an_edit_of_half_the_strength_is_not_taken_for_the_whole(kind, tiny, problems_of, tmp_path):
    whole, half = (without(tiny, (2, 1), strength=strength) for strength in (1.0, 0.5))
    with serving(kind, tiny, *((whole, half) if kind == "llama" else ())) as (url, state):
        engine = connect(url, tiny, adapters=tmp_path)
        for lm in (whole, half, whole):
            assert rollouts(engine, lm, problems_of(3)) == rollouts(engines.OWN_LOOP, lm, problems_of(3))
        assert len(state.loaded) == (0 if kind == "llama" else 2)
    with serving("llama", tiny, half) as (url, _), pytest.raises(CannotSampleError, match=r"of the edit they show"):
        rollouts(connect(url, tiny), whole, problems_of(3))


def test_conditions_of_different_weights_are_never_sampled_from_one_served_model(tiny, edited, problems_of):
    with serving("llama", edited) as (url, state), pytest.raises(CannotSampleError, match=r"different weights|does not serve"):
        evaluate.compare(
            {"base": tiny, "edited": edited}, problems_of(3), GREEDY, engine=connect(url, tiny, tolerance=10.0), progress=False
        )
    assert len(state.requests) <= 3 * PROBES, "nothing but probes was sampled"


def test_an_edited_model_without_its_base_is_warned_about(tiny, edited, problems_of, caplog):
    made = replace(edited, made_from=({"task": "arithmetic"},)) if not edited.made_from else edited
    with serving("llama", made) as (url, _):
        rollouts(connect(url, made), made, problems_of(2))
    assert "give its base model too" in caplog.text


@pytest.mark.parametrize("kind", ["llama", "ollama"])
def test_a_server_that_cannot_load_an_edit_says_how_to_serve_it(kind, tiny, edited, problems_of, tmp_path):
    with serving(kind, tiny) as (url, _), pytest.raises(EngineError, match="toolkit export --to"):
        rollouts(connect(address(kind, url), tiny, adapters=tmp_path), edited, problems_of(3))


def test_the_base_is_not_taken_for_an_edited_model_even_if_the_tolerance_would_allow_it(tiny, problems_of):
    slight = without(tiny, (2, 1), strength=0.02)
    with (
        serving("llama", tiny) as (url, _),
        pytest.raises(EngineError, match=r"does not serve .*It reads adapters only when it is started"),
    ):
        rollouts(connect(url, tiny, tolerance=1.0), slight, problems_of(3))


# --- what a server cannot do ---------------------------------------------------------------------------------


def test_interventions_rules_and_details_are_refused_before_any_request_with_the_remedy(tiny, problems_of):
    steered = Condition(tiny, (lambda lm: nullcontext(),), note="steered by 2")
    ruled = Condition(tiny, rules=(lambda lm, reader, token: None,), note="budget 10")
    with serving("vllm", tiny) as (url, state):
        engine = connect(url)
        for condition, sampling, message in (
            (steered, GREEDY, "steered by 2.*own loop"),
            (ruled, GREEDY, "budget 10.*own loop"),
            (Condition(tiny), replace(GREEDY, details=True), "with_entropies"),
        ):
            with pytest.raises(EngineError, match=message):
                rollouts(engine, condition, problems_of(2), sampling)
        assert not state.requests


def test_a_response_that_does_not_fit_the_servers_context_is_refused_before_any_request(tiny, problems_of):
    with serving("llama", tiny, context=32) as (url, state), pytest.raises(EngineError, match="context of 32 tokens"):
        rollouts(connect(url), tiny, problems_of(2))
    assert not state.requests


@pytest.mark.parametrize(
    "wrong", ["localhost:8000", "ftp://localhost", "tgi+http://localhost:1", "http://", "vLLM"], ids=lambda text: text
)
def test_an_address_of_another_form_is_refused(wrong):
    with pytest.raises(EngineError, match="expected ours, vllm, or the address of a server"):
        connect(wrong)


def test_no_server_at_an_address_is_one_sentence():
    with pytest.raises(EngineError, match=r"No server answers at http://127.0.0.1:9 .*Start it"):
        connect("http://127.0.0.1:9")


# --- servers that fail ---------------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch):
    """Servers are given up after a second of silence."""
    monkeypatch.setattr("toolkit.engines.client.PAUSES", (0.05, 0.1))
    monkeypatch.setattr(
        Client, "__init__", lambda self, *args, _init=Client.__init__, **kw: _init(self, *args, **{"patience": 3.0} | kw)
    )
    monkeypatch.setattr(server, "STORED", (2, 15.0))


def test_a_busy_server_is_asked_again(tiny, problems_of, hasty):
    def busy(number):
        return (503, "loading model") if number % 3 == 0 else None

    with serving("llama", tiny, disturb=busy) as (url, _):
        assert rollouts(connect(url), tiny, problems_of(4)) == rollouts(engines.OWN_LOOP, tiny, problems_of(4))


def test_a_server_that_is_gone_stops_the_run_with_a_sentence_and_what_it_sampled_is_kept(tiny, problems_of, hasty, tmp_path):
    def gone(number):
        return (503, "shutting down") if number > PROBES + 6 else None

    problems = problems_of(8)
    with serving("llama", tiny, disturb=gone) as (url, state):
        with pytest.raises(EngineError, match="Start it, then repeat the same command") as error:
            rollouts(connect(url, parallel=1), tiny, problems, out=tmp_path)
        assert "of 16 kept in" in error.value.__notes__[0]
        kept = len(store.load_rollouts(tmp_path))
        assert kept == 6
        state.disturb = lambda number: None
        before = len(state.requests)
        assert rollouts(connect(url), tiny, problems, out=tmp_path) == rollouts(engines.OWN_LOOP, tiny, problems)
        assert len(state.requests) - before == PROBES + 16 - kept, "nothing kept is sampled again"


def test_a_server_that_comes_back_with_another_model_is_not_sampled_further(tiny, edited, problems_of, hasty, tmp_path):
    with serving("llama", tiny) as (url, state):

        def swapped(number):
            if number == PROBES + 3:
                state.models = {"m0": own_copy(edited)}
                return 503, "restarting"
            return None

        state.disturb = swapped
        with pytest.raises(EngineError, match="restarted with another model"):
            rollouts(connect(url, parallel=1), tiny, problems_of(8), out=tmp_path)


def test_a_run_waits_for_a_server_that_is_started_again(tiny, problems_of, hasty):
    problems, port = problems_of(8), llama.free_port()
    with serving("llama", tiny, port=port) as (url, state):
        engine = connect(url, parallel=2)
        patient = replace(engine, client=replace(engine.client, patience=60.0))
        state.disturb = lambda number: state.dying.set() if number == PROBES + 3 else None
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(rollouts, patient, tiny, problems)
            assert state.dying.wait(60)
            state.stop()
            time.sleep(1.5)  # longer than the first pauses: several requests find nobody there
            with serving("llama", tiny, port=port):
                assert found.result(120) == rollouts(engines.OWN_LOOP, tiny, problems)


def test_a_finished_run_needs_no_server(tiny, problems_of, tmp_path):
    with serving("llama", tiny) as (url, _):
        engine = connect(url, tiny)
        found = rollouts(engine, tiny, problems_of(2), out=tmp_path)
    assert rollouts(engine, tiny, problems_of(2), out=tmp_path) == found


def test_a_response_that_was_broken_off_is_an_error_and_not_a_long_one(tiny, problems_of, hasty):
    answer = '{"tokens": [5, 6], "stop_type": "none", "truncated": false}'
    with serving("llama", tiny) as (url, state):
        state.disturb = lambda number: (200, answer) if number > PROBES else None
        with pytest.raises(EngineError, match="broke off a response after 2 of 60"):
            rollouts(connect(url), tiny, problems_of(2))


def test_a_server_that_was_busy_may_serve_further_whatever_changes_in_its_list_of_models(tiny, problems_of, hasty):
    with serving("vllm", tiny) as (url, state):
        state.disturb = lambda number: (503, "busy") if number == PROBES + 2 else None
        assert rollouts(connect(url), tiny, problems_of(3)) == rollouts(engines.OWN_LOOP, tiny, problems_of(3))


def test_a_server_that_does_not_answer_in_time_is_not_asked_again(tiny, problems_of, hasty):
    with serving("llama", tiny) as (url, state):
        engine = connect(url)
        slow = replace(engine, client=replace(engine.client, timeout=1.0))
        state.disturb = lambda number: state.closed.wait(20) and None if number > 1 else None
        with pytest.raises(EngineError, match=r"did not answer /completion within 1 s, .*--batch-size.*--max-new-tokens"):
            rollouts(slow, tiny, problems_of(1), Sampling(max_new_tokens=2))
        assert len(state.requests) <= PROBES + 1


def test_a_server_that_wants_a_key_is_told_so(tiny, problems_of):
    with serving("llama", tiny) as (url, state):
        state.disturb = lambda number: (401, "Invalid API key")
        with pytest.raises(EngineError, match="TOOLKIT_ENGINE_KEY"):
            rollouts(connect(url), tiny, problems_of(1))


def test_a_number_that_is_no_number_is_refused(tiny, problems_of):
    row = '{"tokens": [5], "stop_type": "limit", "truncated": false, "completion_probabilities": [{"id": 5, "logprob": NaN}]}'
    with serving("llama", tiny) as (url, state):
        state.disturb = lambda number: (200, row)
        with pytest.raises(EngineError, match="reports the log-probability nan"):
            rollouts(connect(url), tiny, problems_of(1))


@pytest.mark.parametrize(
    "garbage",
    ["", "<html>proxy error</html>", "[]", "{}", '{"choices": []}', '{"tokens": ["a"], "stop_type": "eos", "truncated": false}'],
)
def test_garbage_is_an_error_that_quotes_it(garbage, tiny, problems_of, hasty):
    with serving("llama", tiny) as (url, state):
        state.disturb = lambda number: (200, garbage) if number > PROBES else None
        with pytest.raises(EngineError, match=r"llama-server answered|is not JSON"):
            rollouts(connect(url), tiny, problems_of(4))


def test_a_dropped_beginning_of_the_context_is_an_error(tiny, problems_of, hasty):
    answer = '{"tokens": [5], "stop_type": "limit", "truncated": true}'
    with serving("llama", tiny) as (url, state):
        state.disturb = lambda number: (200, answer) if number > PROBES else None
        with pytest.raises(EngineError, match="dropped the beginning"):
            rollouts(connect(url), tiny, problems_of(2))


def test_requests_are_in_flight_together(tiny, problems_of):
    with serving("vllm", tiny) as (url, state):
        engine = connect(url, parallel=8)
        state.disturb = lambda number: time.sleep(0.3) if number > PROBES else None
        begun = time.monotonic()
        rollouts(engine, tiny, problems_of(8), Sampling(n=2, max_new_tokens=2))
        assert time.monotonic() - begun < 16 * 0.3


@pytest.mark.parametrize(("slots", "most"), [(2, 2), (None, 5), (100, 5)])
def test_llama_server_is_sent_no_more_requests_at_a_time_than_it_has_slots(slots, most, tiny, problems_of):
    now, seen = threading.Semaphore(100), []

    def busy(number):
        if number > PROBES:
            now.acquire()
            time.sleep(0.1)
            seen.append(100 - now._value)
            now.release()

    with serving("llama", tiny, slots=slots, disturb=busy) as (url, _):
        rollouts(connect(url, parallel=5), tiny, problems_of(5), Sampling(n=2, max_new_tokens=2))
    assert len(seen) == 10 and max(seen) <= most


def test_the_time_limit_of_a_request_grows_with_the_length_of_the_response(tiny, problems_of):
    requests = [Request(tiny.prompt_ids(problems_of(1)[0].messages), "a", 0)]
    with serving("llama", tiny, context=10**5) as (url, _):
        engine = connect(url)
        limits = [engine.session(Condition(tiny), requests, Sampling(max_new_tokens=n)).client.timeout for n in (100, 32768)]
    assert limits == [1800.0, 16384.0]


def test_ctrl_c_gives_up_the_requests_in_flight_and_keeps_what_is_finished(tiny, problems_of, tmp_path, monkeypatch, hasty):
    def interrupt(rollouts_, out, store_=store.append_rollouts):
        store_(rollouts_, out)
        raise KeyboardInterrupt

    with serving("vllm", tiny) as (url, state):
        state.disturb = lambda number: state.closed.wait(30) and None if number > PROBES + 4 else None
        monkeypatch.setattr(store, "append_rollouts", interrupt)
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            rollouts(connect(url), tiny, problems_of(8), out=tmp_path)
        assert time.monotonic() - begun < 10
    assert len(store.load_rollouts(tmp_path)) >= 2


def test_text_only_rollouts_are_marked_and_not_mixed_with_others(tiny, problems_of, tmp_path):
    with serving("ollama", tiny) as (url, _):
        rollouts(connect(f"{url}/m0"), tiny, problems_of(2), out=tmp_path)
    header = store.load_header(tmp_path)
    assert header["engine"] == "ollama (tokens from text)"
    with pytest.raises(store.WrongModelError, match="engine"):
        rollouts(engines.OWN_LOOP, tiny, problems_of(2), out=tmp_path)
