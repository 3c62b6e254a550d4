"""vLLM's OpenAI-compatible server: requests to ``/v1/completions`` and the replies. Untested with the real server.

Source: ``vllm/entrypoints/openai/completion/protocol.py`` (commit 002032e, November 2026) and vLLM's documentation of LoRA adapters. The
tests use a small server that speaks this format.
"""

from __future__ import annotations

from typing import Any

from toolkit.engines.base import Request
from toolkit.engines.client import Client
from toolkit.engines.wire import Sampled, Served, entry, ids_of, plain, seed_of
from toolkit.lm import LM
from toolkit.sampling import Sampling


class VLLMServer:
    """Writes requests for ``/v1/completions`` of vLLM's OpenAI-compatible server and reads its replies. Untested with the real server."""

    name, path, tolerance, loads, exact, parallel = "vllm", "/v1/completions", 0.05, True, True, 256
    advice = (
        "Start it with the saved directory of these weights, or with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, so that edits can be "
        "loaded while it runs."
    )

    def served(self, client: Client) -> list[Served]:
        """Return the models that ``/v1/models`` lists: the base models first, then the adapters."""
        models = entry(client.get("/v1/models"), "data", list, self.name)
        models = sorted(models, key=lambda model: model.get("parent") is not None)
        return [
            Served(name, {"model": name}, str(model.get("root") or ""))
            for model in models
            for name in [entry(model, "id", str, self.name)]
        ]

    def context(self, client: Client) -> int | None:
        """Return the context length of the first model in tokens, or ``None`` if the server does not report it."""
        first, *_ = entry(client.get("/v1/models"), "data", list, self.name)
        return first.get("max_model_len")

    def slots(self, client: Client) -> int | None:
        """Return ``None``: vLLM does not report the number of requests that it computes at the same time."""
        return None

    def load(self, client: Client, name: str, folder: str) -> Served:
        """Let the running server load an adapter, and return the model with it.

        The server must have been started with ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`` and ``--enable-lora``.

        Args:
            client: Connection to the server.
            name: Name for the adapter.
            folder: Directory of the adapter on the server's disk.
        """
        client.tell("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})
        return Served(name, {"model": name}, folder)

    def body(self, lm: LM, request: Request, sampling: Sampling, *, logprobs: bool) -> dict[str, Any]:
        """Return the JSON of a request."""
        return {
            "prompt": request.prompt,
            "max_tokens": sampling.max_new_tokens,
            "n": 1,
            "seed": seed_of(request, sampling),
            **plain(sampling),
            "top_k": sampling.top_k or -1,
            "repetition_penalty": 1.0,
            "stop_token_ids": sorted(lm.eos_ids),
            "return_token_ids": True,
            "stream": False,
        } | ({"logprobs": 0} if logprobs else {})

    def read(self, lm: LM, request: Request, reply: Any) -> Sampled:
        """Return the response in ``reply``, the server's reply. Raise EngineError if the reply is malformed."""
        (choice,) = entry(reply, "choices", list, self.name)
        scores = choice.get("logprobs") or {}
        return Sampled(
            ids_of(entry(choice, "token_ids", list, self.name), self.name),
            entry(choice, "finish_reason", str, self.name) == "stop",
            [float(value) for value in scores.get("token_logprobs") or []],
        )
