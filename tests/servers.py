"""A small HTTP server that speaks the request and answer formats of vLLM, SGLang, Ollama and llama-server, as documented.

It samples with the toolkit's own loop. Requests with fields that the documentation does not know are refused, and so are requests that leave
out a sampling parameter which the real server would fill with a default of its own.
"""

from __future__ import annotations

import copy
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from toolkit import sites
from toolkit.adapters import merge
from toolkit.engines import OWN_LOOP, Request
from toolkit.lm import LM, Condition, child
from toolkit.sampling import Sampling

VLLM_FIELDS = {
    "model", "prompt", "max_tokens", "n", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens",
    "include_stop_str_in_output", "skip_special_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "logprobs", "prompt_logprobs", "logprob_token_ids", "echo", "return_token_ids",
    "return_tokens_as_token_ids", "logit_bias", "allowed_token_ids", "bad_words", "thinking_token_budget", "stream",
    "add_special_tokens", "vllm_xargs",
}  # fmt: skip
SGLANG_FIELDS = {
    "text", "input_ids", "input_embeds", "sampling_params", "stream", "rid", "lora_path", "return_logprob", "logprob_start_len",
    "top_logprobs_num", "token_ids_logprob", "return_text_in_logprobs", "return_hidden_states", "custom_logit_processor",
}  # fmt: skip
SGLANG_SAMPLING = {
    "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "ignore_eos", "skip_special_tokens",
    "no_stop_trim", "n", "min_new_tokens", "custom_params", "sampling_seed", "repetition_penalty", "presence_penalty",
    "frequency_penalty",
}  # fmt: skip
LLAMA_FIELDS = {
    "prompt", "temperature", "top_k", "top_p", "min_p", "n_predict", "seed", "repeat_penalty", "presence_penalty",
    "frequency_penalty", "samplers", "return_tokens", "n_probs", "post_sampling_probs", "stop", "ignore_eos", "logit_bias",
    "min_keep", "grammar", "mirostat", "n_cmpl", "id_slot", "t_max_predict_ms", "response_fields", "lora", "cache_prompt", "stream",
}  # fmt: skip
OLLAMA_FIELDS = {
    "model", "prompt", "raw", "think", "options", "logprobs", "top_logprobs", "stream", "keep_alive", "images", "suffix", "format",
    "system", "template",
}  # fmt: skip
OLLAMA_OPTIONS = {
    "seed", "temperature", "top_k", "top_p", "min_p", "num_ctx", "num_predict", "repeat_penalty", "stop", "presence_penalty",
    "frequency_penalty", "typical_p", "mirostat",
}  # fmt: skip


class Refused(Exception):
    """The request is not as documented: the server answers with status 400."""


@dataclass
class State:
    """What a server serves and how it behaves; tests change it while the server runs.

    Attributes:
        models: Name -> model; the first is the base model.
        adapters: For vLLM: names that ``/v1/models`` shows as adapters of the base.
        disturb: Called before each sampling request with its number, counted from 1. It may sleep, or return ``(status, text)`` to answer.
        eos: True to return the end-of-sequence token among the tokens.
        context: Context length that the server reports.
        slots: Number of slots that llama-server reports; ``None`` to report none.
        adds_bos: True if Ollama's model file adds the tokenizer's BOS to a prompt.
        cached: Number of prompt tokens that Ollama leaves out of its count.
        requests: The sampling requests that arrived.
        loaded: Names of the adapters that were loaded while it ran.
        dying: For tests that stop the server at some request.
        stop: Shuts the server down at once, while the context is still open.
        closed: Set when the server is shut down, so that nothing waits longer.
    """

    models: dict[str, LM]
    disturb: Callable[[int], tuple[int, str] | None] = lambda number: None
    eos: bool = True
    context: int = 4096
    slots: int | None = 8
    adds_bos: bool = True
    cached: int = 0
    requests: list[Mapping[str, Any]] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)
    dying: threading.Event = field(default_factory=threading.Event)
    stop: Callable[[], None] = lambda: None

    @property
    def base(self) -> str:
        return next(iter(self.models))


def sample(lm: LM, prompt: list[int], sampling: Sampling) -> tuple[list[int], bool, list[float]]:
    """One response of our own loop: its tokens, whether it stopped, and their log-probabilities."""
    session = OWN_LOOP.session(Condition(lm), [], sampling)
    ((_, response),) = next(iter(session.sample([Request(list(prompt), "served", 0)], lambda n: None)))
    return response.tokens, response.finish == "stop", list(response.logprobs or [])


def checked(body: Mapping[str, Any], known: set[str], required: str) -> None:
    if unknown := set(body) - known:
        raise Refused(f"unknown fields {sorted(unknown)}")
    if missing := set(required.split()) - set(body):
        raise Refused(f"left to the server's defaults: {sorted(missing)}")


def sampling_of(body: Mapping[str, Any], budget: str, seed: int) -> Sampling:
    k = body["top_k"]
    return Sampling(1, body["temperature"], body["top_p"], max(k, 0), body[budget], seed=seed, details=True)


def without_eos(state: State, lm: LM, tokens: list[int]) -> list[int]:
    return tokens if state.eos or not tokens or tokens[-1] not in lm.eos_ids else tokens[:-1]


def vllm(state: State, method: str, path: str, body: Any) -> Any:
    if path == "/v1/models":
        return {
            "data": [
                {
                    "id": name,
                    "owned_by": "vllm",
                    "root": lm.name,
                    "parent": None if name == state.base else state.base,
                    "max_model_len": state.context,
                    "created": time.time(),  # both are made anew for every answer
                    "permission": [{"id": f"modelperm-{uuid.uuid4()}"}],
                }
                for name, lm in state.models.items()
            ]
        }
    if path == "/v1/load_lora_adapter":
        state.models[body["lora_name"]] = adapted(state.models[state.base], body["lora_path"])
        state.loaded.append(body["lora_name"])
        return f"Success: LoRA adapter '{body['lora_name']}' added successfully."
    if path != "/v1/completions":
        return None
    checked(body, VLLM_FIELDS, "max_tokens temperature top_p top_k min_p repetition_penalty n")
    if body["model"] not in state.models:
        raise Refused(f"The model `{body['model']}` does not exist.")
    lm = state.models[body["model"]]
    tokens, stopped, logprobs = sample(lm, body["prompt"], sampling_of(body, "max_tokens", body["seed"]))
    tokens = without_eos(state, lm, tokens)
    choice = {"text": lm.text(tokens), "finish_reason": "stop" if stopped else "length", "index": 0}
    if body.get("return_token_ids"):
        choice |= {"token_ids": tokens, "prompt_token_ids": body["prompt"]}
    if body.get("logprobs") is not None:
        choice["logprobs"] = {"tokens": [lm.text([t]) for t in tokens], "token_logprobs": logprobs[: len(tokens)]}
    return {"choices": [choice], "usage": {"completion_tokens": len(tokens)}}


def sglang(state: State, method: str, path: str, body: Any) -> Any:
    if path == "/get_model_info":
        return {"model_path": state.models[state.base].name, "is_generation": True}
    if path == "/load_lora_adapter":
        if body["lora_name"] in state.models:
            raise Refused(f"LoRA with name {body['lora_name']} already exists")
        state.models[body["lora_name"]] = adapted(state.models[state.base], body["lora_path"])
        state.loaded.append(body["lora_name"])
        return {"success": True}
    if path != "/generate":
        return None
    checked(body, SGLANG_FIELDS, "input_ids sampling_params")
    settings = body["sampling_params"]
    checked(settings, SGLANG_SAMPLING, "max_new_tokens temperature top_p top_k min_p repetition_penalty")
    lm = state.models[body.get("lora_path") or state.base]
    tokens, stopped, logprobs = sample(lm, body["input_ids"], sampling_of(settings, "max_new_tokens", settings["sampling_seed"]))
    tokens = without_eos(state, lm, tokens)
    about: dict[str, Any] = {"finish_reason": {"type": "stop" if stopped else "length"}, "completion_tokens": len(tokens)}
    if body.get("return_logprob"):
        about["output_token_logprobs"] = [[value, token, None] for value, token in zip(logprobs, tokens, strict=False)]
    return {"text": lm.text(tokens), "output_ids": tokens, "meta_info": about}


def llama(state: State, method: str, path: str, body: Any) -> Any:
    names = list(state.models)
    if path == "/props":
        about = {"default_generation_settings": {"n_ctx": state.context}, "model_path": state.models[state.base].name}
        return about | ({} if state.slots is None else {"total_slots": state.slots})
    if path == "/lora-adapters":
        return [{"id": i, "path": name, "scale": 0.0} for i, name in enumerate(names[1:])]
    if path != "/completion":
        return None
    checked(body, LLAMA_FIELDS, "n_predict temperature top_p top_k min_p repeat_penalty samplers cache_prompt")
    on = [entry["id"] for entry in body.get("lora", ()) if entry["scale"]]
    lm = state.models[names[1 + on[0]] if on else state.base]
    tokens, stopped, logprobs = sample(lm, body["prompt"], sampling_of(body, "n_predict", body["seed"]))
    tokens = without_eos(state, lm, tokens)
    answer: dict[str, Any] = {"content": lm.text(tokens), "stop_type": "eos" if stopped else "limit", "truncated": False}
    if body.get("return_tokens"):
        answer["tokens"] = tokens
    if body.get("n_probs"):
        answer["completion_probabilities"] = [{"id": t, "logprob": v} for t, v in zip(tokens, logprobs, strict=False)]
    return answer


def ollama(state: State, method: str, path: str, body: Any) -> Any:
    if path == "/api/tags":
        return {"models": [{"name": f"{name}:latest"} for name in state.models]}
    if path != "/api/generate":
        return None
    checked(body, OLLAMA_FIELDS, "model prompt raw options stream")
    options = body["options"]
    checked(
        options,
        OLLAMA_OPTIONS,
        "num_predict num_ctx temperature top_p top_k min_p repeat_penalty presence_penalty frequency_penalty typical_p mirostat stop seed",
    )
    lm = state.models[body["model"]]
    # As Ollama does: the BOS of the model file is added, whether or not the text begins with it.
    bos = [lm.tokenizer.bos_token_id] if state.adds_bos and lm.tokenizer.bos_token_id is not None else []
    prompt = bos + lm.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
    tokens, stopped, logprobs = sample(lm, prompt, sampling_of(options, "num_predict", options["seed"]))
    text = tokens[:-1] if stopped else tokens
    answer = {"response": lm.text(text), "done_reason": "stop" if stopped else "length", "eval_count": len(tokens)}
    answer["prompt_eval_count"] = len(prompt) - min(state.cached, len(prompt) - 1)
    if body.get("logprobs"):
        answer["logprobs"] = [{"token": lm.text([t]), "logprob": v} for t, v in zip(tokens, logprobs, strict=False)]
    return answer


KINDS = {"vllm": vllm, "sglang": sglang, "llama": llama, "ollama": ollama}
SAMPLES = {"/v1/completions", "/generate", "/completion", "/api/generate"}


def own_copy(lm: LM) -> LM:
    """The model with modules of its own: the server decodes in another thread, with hooks that the tests' model must not see."""
    model = copy.deepcopy(lm.model)
    return replace(lm, model=model, layout=sites.find(model))


def adapted(base: LM, folder: str) -> LM:
    """The base model with a PEFT adapter, read and merged by peft."""
    return child(base, merge(copy.deepcopy(base.model), folder, torch.float32), f"{base.name} + {folder}")


@contextmanager
def serving(kind: str, *models: LM, port: int = 0, **settings: Any) -> Iterator[tuple[str, State]]:
    """Run a server of a kind in a thread. Yield its address, and its state."""
    state = State({f"m{i}": own_copy(lm) for i, lm in enumerate(models)}, **settings)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer("GET", None)

        def do_POST(self) -> None:
            self.answer("POST", json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, method: str, body: Any) -> None:
            if self.path in SAMPLES:
                with lock:
                    state.requests.append(body)
                    number = len(state.requests)
                if (instead := state.disturb(number)) is not None:
                    return self.send(*instead)
            try:
                with lock:
                    found = KINDS[kind](state, method, self.path, body)
            except Refused as refusal:
                return self.send(400, str(refusal))
            if found is None:
                return self.send(404, "not found")
            self.send(200, found if isinstance(found, str) else json.dumps(found))

        def send(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            with suppress(ConnectionError):  # the client may have given up
                self.wfile.write(text.encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.socket.close()

    state.stop = stop
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", state
    finally:
        state.closed.set()
        server.shutdown()
        server.server_close()
