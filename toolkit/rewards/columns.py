"""Columns of a ``RewardBatch``: where each comes from, and those that are read from problems."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy import ndarray

from toolkit.types import Problem

UNITS = ("tokens", "words")

_ROLLOUTS = "RewardBatch.from_rollouts(rollouts) fills it"
_ENTROPIES = (
    f"{_ROLLOUTS} if the rollouts carry entropies: sample with Sampling(details=True), or use "
    "entropies.with_entropies(lm, rollouts); in training, engine='toolkit' records them and engine='trl' does not"
)
_PROBLEMS = "RewardBatch.from_rollouts(rollouts, problems) fills it"
_GRPO = "the trainer of toolkit.grpo fills it"


def _length_source(name: str, unit: str) -> str:
    """Return the entry of ``COLUMN_SOURCES`` for the column ``{name}_{unit}``, for example ``target_words``: how to get the column.

    Args:
        name: ``"target"``: a target length; ``"low"`` or ``"high"``: the lower or upper end of the range of lengths that match a target.
        unit: ``"tokens"`` or ``"words"``.
    """
    other = UNITS[unit == UNITS[0]]  # the unit that is not ``unit``
    return (
        f"RewardBatch.from_rollouts(rollouts, problems) fills it if every problem has meta['{name}_{unit}'] (the tasks "
        f"target_length and writing set it in words); or set it in the reward; or count {other} (unit='{other}')"
    )


LABEL_COLUMNS: Mapping[str, str] = {
    "answerable": "whether the question has an answer that can be found",
    "gold_queries": "a tuple of the queries that find the needed documents",
    "gold_documents": "a tuple of the needed documents, as they stand in results",
    "gold_calls": "a tuple of the right calls, each a dict with the keys name and parameters",
    "nuggets": "a tuple of the facts that a good answer states",
    "relevance": "a tuple of the relevance of each passage, 0 or more",
    "schema": "the SQL script that makes the tables",
    "gold_sql": "a right query",
    "headings": "a tuple of the headings that the text should have, in order",
    "keywords": "a tuple of the words that the text should mention",
}
"""Names of the columns that ``RewardBatch.from_rollouts`` reads from ``Problem.meta`` as they are, and a description of each."""
COLUMN_SOURCES: Mapping[str, str] = {
    "problem_id": f"{_ROLLOUTS}; in a TRL dataset, add a column of ids",
    "correct": f"{_ROLLOUTS}; in as_trl, pass columns={{'correct': your grader}} or add a dataset column",
    "tokens": f"{_ROLLOUTS} with the number of completion tokens, end-of-sequence and tool results included",
    "calls": f"{_ROLLOUTS} with the number of tool calls that were answered",
    "result_tokens": f"{_ROLLOUTS} with the number of tokens of tool results, which the model did not write",
    "written_tokens": f"{_ROLLOUTS} with the number of completion tokens that the model wrote: tokens minus result_tokens",
    "think_tokens": f"{_ROLLOUTS}; in as_trl, pass a column that counts them",
    "closed": f"{_ROLLOUTS} (false if thinking was opened and never closed); in as_trl, pass a column of your own",
    "think_closed": f"{_ROLLOUTS} (true if a think span was closed); in as_trl, pass a column that looks for the closing tag",
    "finish": f"{_ROLLOUTS}; in as_trl, pass stop_ids",
    "text": _ROLLOUTS,
    "answer_text": f'{_ROLLOUTS} with the text after the closing think tag, "" if thinking was never closed',
    "token_ids": _ROLLOUTS,
    "formatted": f"{_ROLLOUTS} (true if an answer that is not empty follows a closed think span); or add a format check of your own",
    "logprob": f"{_ROLLOUTS} if they were sampled with Sampling(details=True)",
    "logprob_without": f"{_GRPO} when the reward needs it; offline, score the same responses after an empty question "
    "(entropies.with_entropies) and take the mean log-probability of each",
    "think_entropy": _ENTROPIES,
    "answer_entropy": _ENTROPIES,
    "difficulty": "RewardBatch.from_rollouts(rollouts, problems) fills it if every problem has meta['difficulty']",
    "budget": f"{_GRPO} if the recipe has a curriculum: the token budget stated in the prompt; or set one "
    "in the reward (budget=N, --set reward.budget=N)",
    "mode": f"{_GRPO} if the recipe has modes: 'long' or 'short', as requested in the prompt",
    **{f"{name}_{unit}": _length_source(name, unit) for unit in UNITS for name in ("target", "low", "high")},
    "question": f"{_PROBLEMS}: the text of the last user message",
    "gold_answer": f"{_PROBLEMS}: Problem.answer",
    **{
        name: f"{_PROBLEMS} if every problem has meta['{name}']: {what}; in a TRL dataset, add a column"
        for name, what in LABEL_COLUMNS.items()
    },
    "rule_confidence": "pass it yourself, from 0 to 1: how sure the rule that graded the answer is (in training Extras.columns)",
    "model_score": "pass it yourself: the score of a reward model, such as a head of toolkit.judging (in training Extras.columns)",
    "conciseness": f"{_GRPO} (it trains a conciseness head first); offline, use rewards.conciseness: train a head on pooled states, "
    "then score the responses with it",
}
"""Column name -> how to get this column, as a text. ``MissingColumnError`` prints the text. Rewards of your own may read other columns."""
META_COLUMNS = ("difficulty", *(f"{name}_{unit}" for unit in UNITS for name in ("target", "low", "high")))
"""Names of the columns that ``RewardBatch.from_rollouts`` reads from the problems: column ``name`` holds ``Problem.meta[name]``.

They are the difficulty and, in tokens and in words, the target length and the two ends of the range of lengths that match it.
"""


def object_array(values: Iterable[Any]) -> ndarray:
    """Return a one-dimensional array with one Python object per element; ``np.array`` would turn tuples of equal length into a matrix."""
    return np.fromiter(values, dtype=object)


def column(values: Any, n: int) -> ndarray:
    """Return a column as an array. An array or a sequence keeps its values; a single value is repeated for each of the ``n`` rows."""
    if isinstance(values, ndarray) and values.ndim:
        return values
    if np.isscalar(values):
        return np.full(n, values)
    # Sequences of sequences, such as token ids, stay one object per row.
    return object_array(values) if isinstance(next(iter(values), None), tuple | list | Mapping) else np.asarray(values)


def problem_columns(ids: ndarray, problems: Sequence[Problem]) -> dict[str, ndarray]:
    """Return column name -> array of one value per row: question, gold answer, and the labels and numbers that the problem of every row has.

    Args:
        ids: Problem id of each row.
        problems: The problems. If there are none, the result is empty. ``META_COLUMNS`` and ``LABEL_COLUMNS`` name what is read from their
            ``meta``.

    Raises:
        ValueError: The problem of a row is not among ``problems``.
    """
    if not problems:
        return {}
    by_id = {p.id: p for p in problems}
    if missing := sorted(set(ids) - set(by_id)):
        raise ValueError(
            f"{len(missing)} problems of the rollouts are not among the problems given, e.g. {missing[0]!r}: pass the problems that "
            "were sampled from."
        )
    rows = [by_id[i] for i in ids]
    numbers = {name: [_number(name, p.meta) for p in rows] for name in META_COLUMNS}
    labels = [name for name in LABEL_COLUMNS if all(name in p.meta for p in by_id.values())]
    return {
        "question": object_array(next((m["content"] for m in reversed(p.messages) if m["role"] == "user"), "") for p in rows),
        "gold_answer": object_array(p.answer for p in rows),
        **{name: np.array(values, float) for name, values in numbers.items() if None not in values},
        **{name: object_array(p.meta[name] for p in rows) for name in labels},
    }


def _number(name: str, meta: Mapping[str, Any]) -> float | None:
    """Return ``meta[name]`` as a float; ``None`` if it is missing or not a number.

    For ``high_tokens`` and ``high_words``, the upper end of a range of lengths, a stored ``None`` means that the range has no upper end,
    and the result is infinity. (Problems are stored as JSON, which has no infinity.)
    """
    if name.startswith("high_") and name in meta and meta[name] is None:
        return np.inf
    return float(meta[name]) if isinstance(meta.get(name), int | float) else None
