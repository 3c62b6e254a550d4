"""llama-server of llama.cpp: requests to ``/completion`` and the replies.

Source: ``tools/server/README.md`` of llama.cpp; tried with build b11434.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.engines.base import EngineError, Request
from toolkit.engines.client import Client
from toolkit.engines.wire import Sampled, Served, entry, ids_of, plain, seed_of
from toolkit.lm import LM
from toolkit.sampling import Sampling


class LlamaServer:
    """Writes requests for llama-server of llama.cpp and reads its replies.

    The server takes adapters (``--lora``) and control vectors (``--control-vector``) only when it is started.
    """

    name, path, tolerance, loads, exact, parallel = "llama-server", "/completion", 0.1, False, True, 32
    advice = (
        "It reads adapters only when it is started: write the edit with `toolkit export --to gguf-lora`, start `llama-server --lora FILE "
        "--lora-init-without-apply`, and run the same command again."
    )

    def served(self, client: Client) -> list[Served]:
        """Return the base model, then one model per adapter that the server has: the base model with this adapter alone, at scale 1."""
        adapters = client.find("/lora-adapters") or []
        ids = [entry(adapter, "id", int, self.name) for adapter in adapters]
        off = [{"id": i, "scale": 0.0} for i in ids]
        return [
            Served("base", {"lora": off} if off else {}),
            *(
                Served(str(a.get("path", i)), {"lora": [{"id": j, "scale": float(j == i)} for j in ids]}, str(a.get("path", "")))
                for i, a in zip(ids, adapters, strict=True)
            ),
        ]

    def context(self, client: Client) -> int | None:
        """Return the context length of one slot (a place for one request in the server), in tokens of prompt and response together."""
        settings = entry(client.get("/props"), "default_generation_settings", Mapping, self.name)
        return settings.get("n_ctx")

    def slots(self, client: Client) -> int | None:
        """Return the number of slots (places for one request each) that the server was started with (``--parallel``)."""
        count = client.get("/props").get("total_slots")
        return count if isinstance(count, int) and count > 0 else None

    def load(self, client: Client, name: str, folder: str) -> Served:
        """Raise EngineError: llama-server reads adapters only when it is started."""
        raise EngineError(self.advice)

    def body(self, lm: LM, request: Request, sampling: Sampling, *, logprobs: bool) -> dict[str, Any]:
        """Return the JSON of a request. It sets the order temperature, top-k, top-p, which is that of the toolkit's own loop."""
        return {
            "prompt": request.prompt,
            "n_predict": sampling.max_new_tokens,
            "seed": seed_of(request, sampling),
            **plain(sampling),
            "top_k": sampling.top_k,
            "repeat_penalty": 1.0,
            "samplers": ["temperature", "top_k", "top_p"],
            "stop": [],
            "mirostat": 0,
            "ignore_eos": False,
            "return_tokens": True,
            "n_probs": 1 if logprobs else 0,
            "post_sampling_probs": False,
            "cache_prompt": not logprobs,
            "stream": False,
        }

    def read(self, lm: LM, request: Request, reply: Any) -> Sampled:
        """Return the response in ``reply``, the server's reply.

        Raises:
            EngineError: the reply is malformed, or the server dropped the start of the context because it was too long.
        """
        if entry(reply, "truncated", bool, self.name):
            raise EngineError(
                "llama-server dropped the beginning of a context that was too long: start it with a larger --ctx-size."
            )
        rows = reply.get("completion_probabilities") or []
        return Sampled(
            ids_of(entry(reply, "tokens", list, self.name), self.name),
            entry(reply, "stop_type", str, self.name) in ("eos", "word"),
            [float(entry(row, "logprob", (int, float), self.name)) for row in rows],
        )
