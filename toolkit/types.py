"""Frozen values that travel between rooms. None of them runs a model or touches a file.

Units: lengths are tokens, entropies are nats. Sign convention everywhere: **+ is longer thinking**.
Residual tensors are indexed ``[layers, d_model]`` with layer 0 the first block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Problem:
    """One question with a checkable answer.

    Attributes:
        id: Unique and stable; group statistics and paired comparisons follow it.
        messages: Chat messages, ``({"role": ..., "content": ...}, ...)``.
        answer: The gold answer as text.
        meta: Task facts (``task``, ``difficulty``, ``split``, ...); never read by a method.
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """Half-open range of token positions ``[start, stop)`` in a full sequence (prompt + response)."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"Span needs 0 <= start <= stop, got start={self.start}, stop={self.stop}.")

    def __len__(self) -> int:
        return self.stop - self.start

    def predictors(self) -> Span:
        """Positions whose states *predict* the span's tokens: ``[start-1, stop-1)``.

        The state at position t predicts token t+1, so this is what "over the span" means in every method.
        """
        if self.start == 0:
            raise ValueError("Span starts at position 0: no position predicts its first token.")
        return Span(self.start - 1, self.stop - 1)


@dataclass(frozen=True)
class Rollout:
    """One sampled response with its spans, decided once in ``generate``.

    Attributes:
        problem_id: The problem it answers.
        sample: Index of the sample within the problem.
        token_ids: Prompt and response tokens (no padding).
        prompt_len: Number of prompt tokens.
        think: Tokens *between* the think tags, tags excluded. Open (to the end) if never closed;
            ``None`` if the response never opened a think span.
        answer: Tokens after the closing tag, end-of-sequence token excluded; ``None`` if never closed.
        finish: ``"stop"`` if an end-of-sequence token was sampled, ``"length"`` if the budget ran out.
        text: Decoded response, special tokens kept.
        correct: Graded answer; an unfinished or unclosed response is judged on whatever answer it has.
        logprobs: Log-probability of each response token under the sampling distribution, or ``None``.
        entropies: Full-softmax entropy (nats, at the sampling temperature) before each response token.
    """

    problem_id: str
    sample: int
    token_ids: tuple[int, ...]
    prompt_len: int
    think: Span | None
    answer: Span | None
    finish: Finish
    text: str
    correct: bool
    logprobs: tuple[float, ...] | None = None
    entropies: tuple[float, ...] | None = None

    @property
    def think_tokens(self) -> int:
        """Length of the think span in tokens, tags excluded; 0 if thinking never started."""
        return len(self.think) if self.think else 0

    @property
    def closed(self) -> bool:
        """Whether the think span was closed by its tag."""
        return self.answer is not None

    @property
    def response_tokens(self) -> int:
        """Tokens sampled after the prompt, tags and end-of-sequence included."""
        return len(self.token_ids) - self.prompt_len
