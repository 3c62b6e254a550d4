"""The parts of a rollout that the model wrote: values and text without those of tool results."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import numpy as np

from toolkit.types import Rollout


def mean(values: Sequence[float]) -> float:
    """Return the mean of some values, or NaN if there are none."""
    return float(np.mean(values)) if len(values) else np.nan


def own(r: Rollout, values: Sequence[float], start: int = 0, stop: int | None = None) -> Sequence[float]:
    """Return the values of the response tokens ``start`` to ``stop`` (exclusive), without those of tool results.

    Args:
        r: The rollout.
        values: One value per token of the response.
    """
    part = values[start:stop]
    return list(compress(part, r.written[start:stop])) if r.results else part


def own_text(r: Rollout) -> str:
    """Return the text of a response; if the answer follows a tool result, only the text after the last result.

    The text is cut by tokens, not at the mark of a result: a toolbox may have other marks, and an answer may contain them.
    """
    # A result inside thinking ends before the closing tag, so before the answer. Without tags, thinking and answer share their tokens.
    late = r.results and r.answer is not None and r.results[-1].stop >= r.answer.start
    return r.after_results if late else r.text


def phase_entropies(r: Rollout) -> tuple[float, float]:
    """Return ``(mean entropy of thinking, mean entropy of the answer)`` of a rollout, in nats per token; NaN for a part without tokens.

    Thinking is everything before the closing tag, including an opening tag. The closing tag counts in neither mean. If the response has no
    think span, all of it is the answer. If thinking was never closed, or if the model has no think tags and its think span is the whole
    response, all of it is thinking. If the think span begins in the prompt, only its tokens in the response count. Tool results never count.
    """
    h = r.entropies or ()  # one entropy per response token: index 0 is position prompt_len of the sequence
    if r.think is None:
        return np.nan, mean(own(r, h))
    # All of the response is thinking if thinking was never closed (no answer span), or if no tag separates thinking from the
    # answer (``ThinkTags(None, None)``). In the second case both spans are the whole response, so the answer starts before thinking stops.
    if r.answer is None or r.answer.start < r.think.stop:
        return mean(own(r, h)), np.nan
    # 0 at least: a negative index would count from the end of the response.
    closed, answered = (max(0, at - r.prompt_len) for at in (r.think.stop, r.answer.start))
    return mean(own(r, h, 0, closed)), mean(own(r, h, answered))
