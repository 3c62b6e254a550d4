"""Grade the text of a response in another evaluation tool. The task files of the formats inspect and lm-eval import this module."""

from __future__ import annotations

from typing import Any

from toolkit.tags import ThinkTags
from toolkit.tasks import grading
from toolkit.types import Problem


def read(path: Any) -> dict[str, Problem]:
    """Return the problems of a JSONL file by id. For errors see ``tasks.grading.problems_of``."""
    return {problem.id: problem for problem in grading.problems_of(path)}


def split_response(response: str, tags: ThinkTags | None) -> tuple[str, str | None]:
    """Return ``(thinking, answer)`` of a response; the answer is ``None`` if thinking was never closed.

    The split depends on ``tags``:

    - ``None``: the whole response is the answer, and thinking is "".
    - ``ThinkTags(None, None)``, for a model that thinks without tags: the whole response is both thinking and answer.
    - Otherwise thinking ends at the first closing tag, and the answer is the text after this tag. Thinking starts after the first opening
      tag, or at the start of the response if there is no opening tag before the closing tag.

    A response without a closing tag has no answer, even if it has no opening tag either. (``spans.spans`` would count a response without
    any tag as an answer.) The reason: many tools remove special tokens, so the tags may be lost, and thinking must not be graded as an
    answer.

    >>> split_response("<think>7+8=15</think> 15", ThinkTags())
    ('7+8=15', ' 15')
    >>> split_response("<think>7+8", ThinkTags())
    ('7+8', None)
    """
    if tags is None:
        return "", response
    if tags.close is None:
        return response, response
    before, closed, after = response.partition(tags.close)
    thinking = before.partition(tags.open)[2] if tags.open and tags.open in before else before
    return thinking, after if closed else None


def score(problem: Problem, response: str, tags: ThinkTags | None, reasoning: str | None = None) -> dict[str, float]:
    """Return the scores of a response: ``correct``, ``closed`` and ``think_characters``. A response with unclosed thinking counts as wrong.

    ``correct`` and ``closed`` (thinking was closed) are 0 or 1. ``think_characters`` is the number of characters of thinking.

    Args:
        problem: The problem that the response answers.
        response: Text of the response.
        tags: Think tags in the text; see ``split_response``.
        reasoning: Thinking that the tool has already separated from the response. ``response`` is then only the answer; if it is empty,
            thinking counts as unclosed. ``None`` or "" if the tool has separated nothing: ``tags`` are used.
    """
    thinking, answer = (reasoning, response.strip() or None) if reasoning else split_response(response, tags)
    correct = answer is not None and grading.grade(problem, answer)
    return {"correct": float(correct), "closed": float(answer is not None), "think_characters": float(len(thinking))}
