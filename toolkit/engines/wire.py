"""``Wire``: the class that writes requests for one kind of server and reads its replies. ``Served``, ``Sampled``: the content of replies.

Each request is for one response. It holds every sampling parameter explicitly, because servers have their own defaults (top-k 40, a
repetition penalty, the model's generation config).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from toolkit.engines.base import EngineError, Request
from toolkit.engines.client import Client
from toolkit.lm import LM
from toolkit.sampling import Sampling


@dataclass(frozen=True)
class Served:
    """One of the models that a server offers: its base model, or the base model with an adapter.

    Attributes:
        name: Name for messages, such as ``"base"`` or the adapter's name.
        fields: Entries of a request that make this model sample the response.
        source: Path or hub id from which the server says it loaded the model; "" if it does not say.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Sampled:
    """A server's response to one request.

    Attributes:
        tokens: Token ids that the server sampled.
        stopped: True if the server reports that the response ended with an end-of-sequence token, False if it was cut off.
        logprobs: Log-probability of each token at temperature 1, in nats; empty if not requested.
    """

    tokens: list[int]
    stopped: bool
    logprobs: list[float] = field(default_factory=list)


@runtime_checkable
class Wire(Protocol):
    """Writes requests for one kind of server and reads its replies.

    Attributes:
        name: Kind of server, for messages and file headers.
        path: URL path to which requests for responses are sent.
        tolerance: Largest allowed mean absolute difference between the log-probabilities of the server and of the condition's model, in
            nats per token. This default is our choice.
        loads: True if the server can load adapters while it runs.
        exact: True if the server takes and returns token ids, False if text.
        parallel: Largest number of requests that wait for a reply at the same time (our choice), if the server does not report its number
            of slots. With more, requests wait in the server's queue for so long that their time limit (``Client.timeout``) may pass.
        advice: Sentence for error messages that says how to serve edited weights.
    """

    name: str
    path: str
    tolerance: float
    loads: bool
    exact: bool
    parallel: int
    advice: str

    def served(self, client: Client) -> list[Served]:
        """Return the models that the server offers, the base model first."""
        ...

    def context(self, client: Client) -> int | None:
        """Return the largest number of tokens of prompt and response together, or ``None`` if the server does not report it."""
        ...

    def slots(self, client: Client) -> int | None:
        """Return the number of requests that the server computes at the same time, or ``None`` if the server does not report it."""
        ...

    def load(self, client: Client, name: str, folder: str) -> Served:
        """Let the server load a PEFT adapter, and return the model with this adapter.

        Args:
            client: Connection to the server.
            name: Name for the adapter.
            folder: Directory of the adapter on the server's disk.

        Raises:
            EngineError: this kind of server cannot load adapters while it runs (``loads`` is False).
        """
        ...

    def body(self, lm: LM, request: Request, sampling: Sampling, *, logprobs: bool) -> dict[str, Any]:
        """Return the JSON of the request for one response, without the entries that choose a model (``Served.fields``).

        Args:
            lm: The model of the condition.
            request: The response to sample.
            sampling: Sampling settings.
            logprobs: True to request log-probabilities of the tokens too.
        """
        ...

    def read(self, lm: LM, request: Request, reply: Any) -> Sampled:
        """Return the response in a server's reply.

        Args:
            lm: The model of the condition.
            request: The request that the server replied to.
            reply: JSON of the reply.

        Raises:
            EngineError: the reply is malformed, or the server did not sample what was requested.
        """
        ...


def plain(sampling: Sampling) -> dict[str, Any]:
    """Return the sampling parameters that have the same name on all servers, as entries of a request.

    Parameters that the toolkit does not use, such as ``min_p``, get values without effect.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def seed_of(request: Request, sampling: Sampling) -> int:
    """Return the seed of one response, in [0, 2^31). It depends on the sampling seed, the problem id and the sample index."""
    text = f"{sampling.seed}|{request.problem_id}|{request.sample}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def tokenized(lm: LM, text: str) -> list[int]:
    """Return the token ids of a text, without added special tokens."""
    return list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]  # of one text


def entry(value: Any, name: str, kind: Any, server: str) -> Any:
    """Return one entry of a server's reply: ``value[name]``.

    Args:
        value: JSON of the reply, or a part of it.
        name: Name of the entry.
        kind: Expected type of the entry, or a tuple of types.
        server: Kind of server, for the message.

    Raises:
        EngineError: ``value`` is not a JSON object, or the entry is missing or not of type ``kind``.
    """
    field = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(field, kind) or (isinstance(field, bool) and kind is not bool):
        raise EngineError(
            f"{server} answered without a valid {name!r}, but with {str(value)[:200]}: is the address that of {server}?"
        )
    return field


def ids_of(values: Sequence[Any], server: str) -> list[int]:
    """Return ``values``, token ids from a server's reply, as a list. Raise EngineError if one of them is not an integer.

    Args:
        values: The token ids.
        server: Kind of server, for the message.
    """
    if wrong := [v for v in values if not isinstance(v, int) or isinstance(v, bool)]:
        raise EngineError(f"{server} answered with {wrong[0]!r} among the token ids.")
    return list(values)
