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

    If ``tags`` is ``None``, the whole response is the answer. If both tags in ``tags`` are ``None``, the whole response is both thinking
    and answer. Otherwise thinking ends at the first closing tag. It starts after the first opening tag before that, or at the start of the
    response if there is none.

    A response without a closing tag has no answer, even if it has no opening tag either. ``spans.spans`` is less strict. Here the text may
    have lost its tags, because many tools remove special tokens, and thinking must not be graded as an answer.

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
    """Return ``correct`` and ``closed`` (0 or 1) and ``think_characters`` of a response. Unclosed thinking counts as wrong.

    Args:
        problem: The problem that the response answers.
        response: Text of the response.
        tags: Think tags in the text.
        reasoning: Thinking that the tool has already separated from the response. ``response`` is then the answer, and thinking counts as
            unclosed if it is empty. ``None`` if the tool has separated nothing: ``tags`` are used.
    """
    thinking, answer = (reasoning, response.strip() or None) if reasoning else split_response(response, tags)
    correct = answer is not None and grading.grade(problem, answer)
    return {"correct": float(correct), "closed": float(answer is not None), "think_characters": float(len(thinking))}
