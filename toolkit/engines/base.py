"""What a sampling engine is: ``Engine``, and the values that go into it (``Request``) and come out of it (``Response``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from toolkit.lm import Condition
from toolkit.sampling import Sampling
from toolkit.types import Finish, Span


class EngineError(ValueError):
    """Raised if an engine cannot sample responses from a condition, or if a server's reply is missing or malformed.

    The message says what to do.
    """


class CannotSampleError(EngineError):
    """Raised before sampling begins if an engine cannot sample responses from a condition. The message says what to do.

    Another engine may be able to.
    """


@dataclass(frozen=True)
class Request:
    """One response to sample.

    Attributes:
        prompt: Token ids that the response continues.
        problem_id: Id of the problem that the response answers.
        sample: Index of the response among the samples of its problem. The random numbers that draw the response depend on this index, on
            ``problem_id`` and on ``Sampling.seed``.
    """

    prompt: list[int]
    problem_id: str
    sample: int


@dataclass(frozen=True)
class Response:
    """One sampled response, without spans and grade yet.

    Attributes:
        tokens: Token ids up to and including the first end-of-sequence token, if one was sampled.
        finish: ``"stop"`` if the response ended with an end-of-sequence token, ``"length"`` if it was cut off at the token limit.
        logprobs: Log-probability of each token in nats, at the sampling temperature and after top-k and top-p (see ``sampling.draw``); 0 for
            a token that a decoding rule or a tool placed. ``None`` unless ``Sampling(details=True)`` asked for it.
        entropies: Entropy at each token, in nats: that of the softmax at the sampling temperature, before top-k and top-p are applied.
            ``None`` in the same cases as ``logprobs``.
        results: Spans of ``tokens`` (not of the whole sequence) that are tool results; empty without tools.
    """

    tokens: list[int]
    finish: Finish
    logprobs: Sequence[float] | None = None
    entropies: Sequence[float] | None = None
    results: tuple[Span, ...] = ()


@runtime_checkable
class Session(Protocol):
    """An engine that is ready to sample responses from one condition."""

    @property
    def serves(self) -> str:
        """Name of the weights that the engine uses for the condition. ``evaluate.compare`` raises an error if other weights share it."""
        ...

    def sample(self, requests: Sequence[Request], tick: Callable[[int], Any]) -> Iterator[list[tuple[int, Response]]]:
        """Yield lists of pairs ``(index in requests, response)``, each list as soon as its responses are complete.

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
        """Name of the engine in messages and tables."""
        ...

    @property
    def header(self) -> Mapping[str, str]:
        """Facts about the engine for the headers of rollouts and the notes of reports.

        The keys are some of those in ``store.rollouts.ENGINE``, or none.
        """
        ...

    @property
    def takes_adapters(self) -> bool:
        """Whether the engine can sample from a model whose weights have changed by a low-rank adapter since the engine was started."""
        ...

    def check(self, condition: Condition, sampling: Sampling) -> None:
        """Check that the engine can sample responses from a condition with these settings. Sends nothing to a server.

        Raises:
            CannotSampleError: it cannot. The message names the obstacle (a part of the condition, or a setting) and says what to do.
        """
        ...

    def check_edits(self) -> None:
        """Check that the engine can sample from edited or trained models at all, before any model is edited. Sends nothing to a server.

        Raises:
            CannotSampleError: it can sample from no such model. The message names the obstacle and says what to do.
        """
        ...

    def session(self, condition: Condition, requests: Sequence[Request], sampling: Sampling) -> Session:
        """Check that the engine can sample the requested responses from the condition, and return a session whose ``sample`` does so.

        This call samples no responses. But a server may sample a few tokens, to check which weights it serves.

        Raises:
            CannotSampleError: as in ``check``; or the server does not serve the condition's model.
            EngineError: the server does not reply.
        """
        ...
