"""Ollama: requests to ``/api/generate`` and the replies, both with text instead of token ids. Untested with the real server.

Source: Ollama's API documentation. The tests use a small server that speaks this format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toolkit.engines.base import EngineError, Request
from toolkit.engines.client import Client
from toolkit.engines.wire import Sampled, Served, entry, plain, seed_of, tokenized
from toolkit.lm import LM
from toolkit.sampling import Sampling

CONTEXT_STEP = 4096  # contexts are a multiple of this number of tokens: Ollama loads the model again for another context


@dataclass(frozen=True)
class OllamaServer:
    """Writes requests for Ollama's ``/api/generate`` and reads its replies. Untested with the real server.

    Requests and replies hold text instead of token ids.

    Attributes:
        model: Name of the model in Ollama.
    """

    model: str
    name, path, tolerance, loads, exact, parallel = "ollama", "/api/generate", 0.1, False, False, 8
    advice = (
        "It reads adapters only from a Modelfile: write the edit with `toolkit export --to ollama`, run `ollama create`, and give that model's "
        "name in the address."
    )

    def served(self, client: Client) -> list[Served]:
        """Return the model named ``model``, alone in a list. Raise EngineError if Ollama does not have it."""
        names = [entry(m, "name", str, self.name) for m in entry(client.get("/api/tags"), "models", list, self.name)]
        if self.model not in names and f"{self.model}:latest" not in names:
            raise EngineError(
                f"Ollama at {client.url} has no model {self.model!r}, only {', '.join(names) or 'none'}: ollama create {self.model}"
            )
        return [Served(self.model, {"model": self.model})]

    def context(self, client: Client) -> int | None:
        """Return ``None``, for no limit: each request sets the context length that it needs."""
        return None

    def slots(self, client: Client) -> int | None:
        """Return ``None``: Ollama does not report the number of requests that it computes at the same time."""
        return None

    def load(self, client: Client, name: str, folder: str) -> Served:
        """Raise EngineError: Ollama reads adapters only from a Modelfile."""
        raise EngineError(self.advice)

    def body(self, lm: LM, request: Request, sampling: Sampling, *, logprobs: bool) -> dict[str, Any]:
        """Return the JSON of a request, with the prompt as text.

        A leading beginning-of-sequence token (BOS) is left out of the text, because Ollama adds it even if the text begins with it.
        ``read`` checks by the number of tokens that Ollama did add it.

        Raises:
            EngineError: the text of the prompt does not tokenize back to the prompt's token ids.
        """
        bos = _leading_bos(lm, request)
        text = lm.text(request.prompt).removeprefix(bos)
        if tokenized(lm, text) != (request.prompt[1:] if bos else request.prompt):
            raise EngineError(
                f"Ollama receives text only, but the prompt of problem {request.problem_id[:60]!r} is not what its text is tokenized to. Use "
                "llama-server on the same GGUF file, which takes token ids."
            )
        return {
            "prompt": text,
            "raw": True,
            "stream": False,
            "options": {
                "num_predict": sampling.max_new_tokens,
                "num_ctx": -(-(len(request.prompt) + sampling.max_new_tokens) // CONTEXT_STEP) * CONTEXT_STEP,
                "seed": seed_of(request, sampling),
                **plain(sampling),
                "top_k": sampling.top_k,
                "repeat_penalty": 1.0,
                "typical_p": 1.0,
                "mirostat": 0,
                "stop": [],
            },
        } | ({"logprobs": True} if logprobs else {})

    def read(self, lm: LM, request: Request, reply: Any) -> Sampled:
        """Return the response in ``reply``, the server's reply. The token ids are computed from the response's text.

        Raises:
            EngineError: the reply is malformed; the server read another number of prompt tokens than the request has; or the number of tokens
                of the response's text differs from the number that the server sampled.
        """
        tokens = tokenized(lm, entry(reply, "response", str, self.name))
        stopped = entry(reply, "done_reason", str, self.name) == "stop"
        sampled = entry(reply, "eval_count", int, self.name)
        _check_prompt(lm, request, reply)
        if sampled - len(tokens) not in (0, int(stopped)):  # the end-of-sequence token is not in the text
            raise EngineError(
                f"Ollama sampled {sampled} tokens, but their text is tokenized to {len(tokens)}, so lengths would be wrong. Use llama-server "
                "on the same GGUF file, which returns token ids."
            )
        return Sampled(
            tokens, stopped, [float(entry(row, "logprob", (int, float), self.name)) for row in reply.get("logprobs") or []]
        )


def _leading_bos(lm: LM, request: Request) -> str:
    """Return the text of the beginning-of-sequence token if a prompt begins with this token, else ``""``."""
    bos = lm.tokenizer.bos_token_id
    return str(lm.tokenizer.bos_token) if bos is not None and request.prompt[:1] == [bos] else ""


def _check_prompt(lm: LM, request: Request, reply: Any) -> None:
    """Raise EngineError if Ollama read more tokens than a prompt has, or read the prompt without its beginning-of-sequence token.

    Other smaller numbers pass: a version of Ollama may count only the tokens that its cache did not hold. A reply without the number passes
    too.
    """
    if reply.get("prompt_eval_count") is None:
        return
    read, sent = entry(reply, "prompt_eval_count", int, "ollama"), len(request.prompt)
    if read > sent or (read == sent - 1 and _leading_bos(lm, request)):
        raise EngineError(
            f"Ollama read {read} tokens of a prompt of {sent}: its model file adds a beginning-of-sequence token that the prompt does not have, "
            "leaves out the one that the prompt has, or tokenizes the text in another way. Use llama-server on the same GGUF file, which takes "
            "token ids."
        )
