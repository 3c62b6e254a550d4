"""What a sampling engine is: ``Engine``, and the values that go into it (``Request``) and come out of it (``Response``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from toolkit.lm import Condition
from toolkit.sampling import Sampling
from toolkit.types import Finish


class EngineError(ValueError):
    """Raised if an engine cannot sample a condition, or if a server does not answer as it should. The message says what to do."""


class CannotSampleError(EngineError):
    """Raised before any work if an engine cannot sample a condition: another engine may. The message names the remedy."""


@dataclass(frozen=True)
class Request:
    """One response to sample.

    Attributes:
        prompt: Token ids that the response continues.
        problem_id: Id of the problem that the response answers.
        sample: Index among the samples of the problem. The random numbers depend on it, on ``problem_id`` and on the seed.
    """

    prompt: list[int]
    problem_id: str
    sample: int


@dataclass(frozen=True)
class Response:
    """One sampled response, without spans and grade yet.

    Attributes:
        tokens: Token ids up to and including the first end-of-sequence token, if one was sampled.
        finish: ``"stop"`` if the response ended by itself, ``"length"`` if it was cut off at the token limit.
        logprobs: Log-probability of each token at temperature 1, in nats; ``None`` if not recorded.
        entropies: Entropy of the full softmax at each token, in nats; ``None`` if not recorded.
    """

    tokens: list[int]
    finish: Finish
    logprobs: Sequence[float] | None = None
    entropies: Sequence[float] | None = None


@runtime_checkable
class Session(Protocol):
    """An engine that is ready to sample one condition."""

    @property
    def serves(self) -> str:
        """Name of the weights that the engine uses. Two conditions with different weights must not have the same."""
        ...

    def sample(self, requests: Sequence[Request], tick: Callable[[int], Any]) -> Iterator[list[tuple[int, Response]]]:
        """Yield the responses in batches, as soon as a batch is complete, as pairs of the index of the request and its response.

        Args:
            requests: The responses to sample.
            tick: Function that is called with the number of newly finished responses, for a progress bar.
        """
        ...


@runtime_checkable
class Engine(Protocol):
    """A program that samples responses from a condition: the toolkit's own loop, or a server."""

    @property
    def name(self) -> str:
        """Name in messages and tables."""
        ...

    @property
    def header(self) -> Mapping[str, str]:
        """Entries for the headers of rollouts and the notes of reports, among those of ``store.rollouts.ENGINE``."""
        ...

    @property
    def takes_adapters(self) -> bool:
        """Whether the engine can sample a model whose weights have changed by a low-rank adapter since the engine was started."""
        ...

    def check(self, condition: Condition, sampling: Sampling) -> None:
        """Check that the engine can sample a condition with these settings, without asking a server.

        Raises:
            CannotSampleError: it cannot; the message names the part of the condition, or the setting, and the remedy.
        """
        ...

    def session(self, condition: Condition, requests: Sequence[Request], sampling: Sampling) -> Session:
        """Return a session that samples such requests from the condition, after all checks that need no sampling of the requests.

        Raises:
            CannotSampleError: as in ``check``, or a server does not serve the condition's model.
            EngineError: the server does not answer.
        """
        ...
