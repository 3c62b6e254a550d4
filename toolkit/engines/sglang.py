"""SGLang: requests to its own ``/generate`` (not the OpenAI-compatible path) and the replies. Untested with the real server.

Source: SGLang's documentation of the native API, and ``srt/sampling/sampling_params.py`` (commit 00c17ca). The tests use a small server
that speaks this format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.engines.base import Request
from toolkit.engines.client import Client, RefusedError
from toolkit.engines.wire import Sampled, Served, entry, ids_of, plain, seed_of
from toolkit.lm import LM
from toolkit.sampling import Sampling


class SGLangServer:
    """Writes requests for SGLang's own ``/generate`` and reads its replies. Untested with the real server.

    The server uses the seeds of requests only if it is started with ``--enable-deterministic-inference``.
    """

    name, path, tolerance, loads, exact, parallel = "sglang", "/generate", 0.05, True, True, 256
    advice = "Start it with the saved directory of these weights, or with --enable-lora, so that edits can be loaded while it runs."

    def served(self, client: Client) -> list[Served]:
        """Return the base model, alone in a list: the server does not list its adapters. ``load`` returns the adapter that it loads."""
        return [Served("base", source=str(entry(client.get("/get_model_info"), "model_path", str, self.name)))]

    def context(self, client: Client) -> int | None:
        """Return ``None``: the server does not report its context length."""
        return None

    def slots(self, client: Client) -> int | None:
        """Return ``None``: SGLang does not report the number of requests that it computes at the same time."""
        return None

    def load(self, client: Client, name: str, folder: str) -> Served:
        """Let the running server load an adapter, and return the model with it. The server must have been started with ``--enable-lora``.

        Args:
            client: Connection to the server.
            name: Name for the adapter.
            folder: Directory of the adapter on the server's disk.
        """
        try:
            client.tell("/load_lora_adapter", {"lora_name": name, "lora_path": folder})
        except RefusedError as error:
            if "already" not in str(error):  # SGLang lists no adapters, and refuses to load one twice
                raise
        return Served(name, {"lora_path": name}, folder)

    def body(self, lm: LM, request: Request, sampling: Sampling, *, logprobs: bool) -> dict[str, Any]:
        """Return the JSON of a request."""
        return {
            "input_ids": request.prompt,
            "sampling_params": {
                "max_new_tokens": sampling.max_new_tokens,
                "sampling_seed": seed_of(request, sampling),
                **plain(sampling),
                "top_k": sampling.top_k or -1,
                "repetition_penalty": 1.0,
                "stop_token_ids": sorted(lm.eos_ids),
                "skip_special_tokens": False,
            },
            "return_logprob": logprobs,
            "logprob_start_len": -1,
            "stream": False,
        }

    def read(self, lm: LM, request: Request, reply: Any) -> Sampled:
        """Return the response in ``reply``, the server's reply. Raise EngineError if the reply is malformed."""
        about = entry(reply, "meta_info", Mapping, self.name)
        reason = entry(about, "finish_reason", Mapping, self.name)
        rows = about.get("output_token_logprobs") or []
        return Sampled(
            ids_of(entry(reply, "output_ids", list, self.name), self.name),
            reason.get("type") == "stop",
            [float(row[0]) for row in rows],
        )
