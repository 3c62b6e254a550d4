"""The language of one kind of server (``Wire``), and what its answers are read into.

A ``Wire`` writes the request for one response and reads the answer. It sends every sampling parameter explicitly, since servers have
defaults of their own (top-k 40, a repetition penalty, the model's generation config).
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
        fields: Entries of a request that choose it.
        source: Path or id that the server gives for it, or "".
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Sampled:
    """What a server answered for one request.

    Attributes:
        tokens: Token ids that it sampled.
        stopped: True if the response ended by itself, False if it was cut off at the token limit.
        logprobs: Log-probability of each token at temperature 1, in nats; empty if not asked for.
    """

    tokens: list[int]
    stopped: bool
    logprobs: list[float] = field(default_factory=list)


@runtime_checkable
class Wire(Protocol):
    """The language of one kind of server.

    Attributes:
        name: Kind of server, for messages and file headers.
        path: Path to which requests are sent.
        tolerance: Largest mean absolute difference of log-probabilities from our model, in nats per token (our choice).
        loads: True if it can load adapters while it runs.
        exact: True if tokens travel as ids, False if as text.
        parallel: Requests in flight that make sense at most (our choice). A request that waits for its turn counts against the time limit
            of its answer.
        advice: Sentence that says how to serve edited weights.
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
        """Return the largest number of tokens of prompt and response together, or ``None`` if the server does not say."""
        ...

    def load(self, client: Client, name: str, folder: str) -> Served:
        """Make the server load a PEFT adapter from a folder on its disk, and return it. Only if ``loads`` is True."""
        ...

    def body(self, lm: LM, request: Request, sampling: Sampling, *, logprobs: bool) -> dict[str, Any]:
        """Return the JSON of the request for one response, without the fields of ``Served``."""
        ...

    def read(self, lm: LM, answer: Any) -> Sampled:
        """Return the response in a server's answer. Raise EngineError if the answer has another form."""
        ...


def plain(sampling: Sampling) -> dict[str, Any]:
    """Return the sampling parameters that all servers call by one name. Those that the toolkit does not have are set to no effect."""
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
    """Return an entry of a JSON object. Raise EngineError if the value is no object, or if the entry is missing or of another type."""
    found = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
        raise EngineError(
            f"{server} answered without a valid {name!r}, but with {str(value)[:200]}: is the address that of {server}?"
        )
    return found


def ids_of(values: Sequence[Any], server: str) -> list[int]:
    """Return values as token ids. Raise EngineError if one of them is no integer."""
    if wrong := [v for v in values if not isinstance(v, int) or isinstance(v, bool)]:
        raise EngineError(f"{server} answered with {wrong[0]!r} among the token ids.")
    return list(values)
