"""What a reward sees and what it gives back: columns of a batch of rollouts, and one number a rollout with its named parts.

A *group* is the rollouts of one problem. It follows ``problem_id`` and nothing else: two problems with the same text are two
groups, and rows of a group may lie anywhere in the batch. Lengths are tokens, entropies and log-probabilities nats a token.

A reward is a callable object, ``reward(batch) -> RewardValues``, with ``name``, ``needs`` (columns it reads) and its parameters as
dataclass fields. Most are frozen values. A stateful one has ``state_dict`` and ``load_state_dict`` (JSON) and changes only in the
``"train"`` split, after the batch is scored. It learns from the batch it is given: in a run of several processes give each
process the rollouts of all of them, in the same order; then the same arithmetic keeps their states equal and nothing has to be
sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray

from toolkit.rewards.answers import CLOSE, answer_text
from toolkit.types import Problem, Rollout

SPLITS = ("train", "eval")

_ROLLOUTS = "RewardBatch.from_rollouts(rollouts) has it"
_ENTROPIES = (
    f"{_ROLLOUTS} if they carry entropies: sample with Sampling(details=True), or phase_entropy.measured(lm, rollouts); in training, "
    "engine='toolkit' keeps them and engine='trl' does not"
)
_GRPO = "the trainer of toolkit.grpo has it"
UNITS = ("tokens", "words")


def _lengths(what: str, unit: str) -> str:
    """Who supplies a target length, or an end of its range, in a unit."""
    other = UNITS[unit == UNITS[0]]
    return (
        f"RewardBatch.from_rollouts(rollouts, problems) has it where every problem has meta['{what}_{unit}'], as the task target_length has in words; "
        f"or set it in the reward; or count {other} (unit='{other}')"
    )


SUPPLIERS: Mapping[str, str] = {
    "problem_id": f"{_ROLLOUTS}; in a TRL dataset, add a column of ids",
    "correct": f"{_ROLLOUTS}; in as_trl, pass columns={{'correct': your grader}} or add a dataset column",
    "tokens": f"{_ROLLOUTS}; it counts completion tokens, end-of-sequence included",
    "think_tokens": f"{_ROLLOUTS}; in as_trl, pass a column that counts them",
    "closed": f"{_ROLLOUTS}; in as_trl, pass a column that looks for the closing tag",
    "finish": f"{_ROLLOUTS}; in as_trl, pass stop_ids",
    "text": _ROLLOUTS,
    "answer_text": f'{_ROLLOUTS} (what follows the closing think tag, "" if thinking was never closed)',
    "token_ids": _ROLLOUTS,
    "formatted": f"{_ROLLOUTS} (something follows a closed think span); or a format check of your own",
    "logprob": f"{_ROLLOUTS} if they were sampled with Sampling(details=True)",
    "logprob_without": f"{_GRPO} when the reward needs it; offline, read the responses again after an empty question "
    "(phase_entropy.measured) and take the mean log-probability of each",
    "think_entropy": _ENTROPIES,
    "answer_entropy": _ENTROPIES,
    "difficulty": "RewardBatch.from_rollouts(rollouts, problems) has it where every problem has meta['difficulty']",
    "budget": f"{_GRPO} where the recipe has a curriculum; it is the budget that was in the prompt, tokens; or set one "
    "in the reward (budget=N, --set reward.budget=N)",
    "mode": f"{_GRPO} where the recipe has modes; it is 'long' or 'short', as the prompt asked",
    **{f"{what}_{unit}": _lengths(what, unit) for unit in UNITS for what in ("target", "low", "high")},
    "conciseness": f"{_GRPO} (it trains a head first); offline, rewards.conciseness: train a head on pooled states, then score the "
    "responses with it",
}
FROM_META = ("difficulty", *(f"{what}_{unit}" for unit in UNITS for what in ("target", "low", "high")))


class MissingColumnError(ValueError):
    """A reward needs a column that the batch does not have."""

    def __init__(self, column: str, held: Iterable[str], reward: str = "") -> None:
        whose = (
            f"The reward {reward!r} needs the column {column!r}, but the batch" if reward else f"No column {column!r}: the batch"
        )
        supplier = SUPPLIERS.get(column, "no part of the toolkit has it: add it with batch.with_columns(name=values)")
        super().__init__(f"{whose} has {', '.join(sorted(held))}. Who can supply it: {supplier}.")
        self.column, self.reward = column, reward


class RewardValues(NamedTuple):
    """What a batch is paid.

    Attributes:
        values: The reward of each row.
        components: Its named parts, one value a row each; they add up to ``values``.
    """

    values: Float[ndarray, " n"]
    components: dict[str, Float[ndarray, " n"]]

    @classmethod
    def sum(cls, **components: ndarray) -> RewardValues:
        """The sum of named parts."""
        parts = {name: np.asarray(values, np.float64) for name, values in components.items()}
        return cls(np.sum(list(parts.values()), axis=0), parts)


@runtime_checkable
class Reward(Protocol):
    """Anything that pays a batch."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, batch: RewardBatch) -> RewardValues: ...


@dataclass(frozen=True, eq=False)
class RewardBatch:
    """Columns of a batch of rollouts, one value a row.

    Attributes:
        columns: Name -> ``[n]``; ``SUPPLIERS`` lists the known names. ``problem_id`` is always there.
        step: Optimizer steps done so far; what schedules follow.
        split: ``"train"`` or ``"eval"``; stateful rewards change only in ``"train"``.
    """

    columns: Mapping[str, ndarray]
    step: int = 0
    split: str = "train"

    def __post_init__(self) -> None:
        if "problem_id" not in self.columns:
            raise MissingColumnError("problem_id", self.columns)
        wrong = {name: np.shape(values) for name, values in self.columns.items() if np.shape(values) != (len(self),)}
        if wrong:
            raise ValueError(f"Every column needs one value a row, shape ({len(self)},), but got {wrong}.")
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r}: choose one of {', '.join(SPLITS)}.")

    @classmethod
    def of(
        cls,
        rollouts: Sequence[Rollout],
        problems: Sequence[Problem] | None = None,
        *,
        step: int = 0,
        split: str = "train",
        close: str | None = CLOSE,
    ) -> RewardBatch:
        """The columns that rollouts carry, and those of ``FROM_META`` that every problem has in its ``meta``.

        Log-probabilities and entropies only if every rollout carries them.

        Args:
            close: Closing think tag of the model that wrote the rollouts, after which its answer begins.

        Raises:
            ValueError: no rollouts, or one of a problem that is not among ``problems``.
        """
        if not rollouts:
            raise ValueError("No rollouts to make a batch of.")
        columns = {
            "problem_id": object_array(r.problem_id for r in rollouts),
            "correct": np.array([r.correct for r in rollouts], bool),
            "tokens": np.array([r.response_tokens for r in rollouts], np.int64),
            "think_tokens": np.array([r.think_tokens for r in rollouts], np.int64),
            "closed": np.array([r.closed for r in rollouts], bool),
            "formatted": np.array([bool(r.answer) for r in rollouts], bool),
            "finish": object_array(r.finish for r in rollouts),
            "text": object_array(r.text for r in rollouts),
            "answer_text": object_array(answer_text(r.text, close) if r.closed else "" for r in rollouts),
            "token_ids": object_array(r.token_ids[r.prompt_len :] for r in rollouts),
        }
        if all(r.logprobs is not None for r in rollouts):
            columns["logprob"] = np.array([_mean(r.logprobs or ()) for r in rollouts])
        if all(r.entropies is not None for r in rollouts):
            columns["think_entropy"], columns["answer_entropy"] = np.array([_phase_entropies(r) for r in rollouts]).T
        return cls(columns | _of_problems(columns["problem_id"], problems or ()), step, split)

    def __getitem__(self, column: str) -> ndarray:
        if column not in self.columns:
            raise MissingColumnError(column, self.columns)
        return self.columns[column]

    def __contains__(self, column: str) -> bool:
        return column in self.columns

    def __len__(self) -> int:
        return len(self.columns["problem_id"])

    @cached_property
    def groups(self) -> Int[ndarray, " n"]:
        """Index of each row's group: problems are numbered in the order they first appear."""
        codes, _ = pd.factorize(np.asarray(self.columns["problem_id"]))
        if len(codes) and codes.min() < 0:
            raise ValueError(f"Row {int(codes.argmin())} has no problem_id ({self.columns['problem_id'][codes.argmin()]!r}).")
        return codes.astype(np.int64)

    @cached_property
    def group_ids(self) -> ndarray:
        """Problem id of each group, ``[groups]``."""
        found = np.empty(int(self.groups.max(initial=-1)) + 1, self.columns["problem_id"].dtype)
        found[self.groups] = self.columns["problem_id"]
        return found

    def check(self, reward: Reward) -> None:
        """Raise MissingColumnError, naming the reward, if a column that it needs is not there."""
        for column in sorted(reward.needs - set(self.columns)):
            raise MissingColumnError(column, self.columns, reward.name)

    def take(self, rows: Sequence[int] | ndarray) -> RewardBatch:
        """Some of the rows, in the order given (indices, or a mask)."""
        index = np.asarray(rows)
        index = index if index.dtype == bool else index.astype(np.int64)
        return replace(self, columns={name: values[index] for name, values in self.columns.items()})

    def having(self, **columns: Any) -> RewardBatch:
        """The same batch with columns added or replaced; one value a row, or one for all."""
        return replace(self, columns={**self.columns, **{k: _column(v, len(self)) for k, v in columns.items()}})


def state_by_name(parts: Iterable[Reward]) -> dict[str, Any]:
    """States of the stateful ones among some rewards, by name."""
    return {r.name: state for r in parts if hasattr(r, "state_dict") and (state := r.state_dict())}


def load_state_by_name(parts: Iterable[Reward], saved: Mapping[str, Any]) -> None:
    """Give rewards their states back. Raises KeyError if the states are of other rewards."""
    stateful = {r.name: r for r in parts if hasattr(r, "load_state_dict")}
    if missing := set(saved) - set(stateful):
        raise KeyError(f"States of {', '.join(sorted(missing))}, but the rewards with a state are {', '.join(sorted(stateful))}.")
    for name, state in saved.items():
        stateful[name].load_state_dict(state)


def monitoring_size(parts: Iterable[Reward]) -> tuple[int, int] | None:
    """Problems and samples of the monitoring set that some rewards want to see now: enough for each. ``None`` if none does."""
    wanted = [size for r in parts if hasattr(r, "monitoring") and (size := r.monitoring())]
    return (max(n for n, _ in wanted), max(n for _, n in wanted)) if wanted else None


def monitor_parts(parts: Iterable[Reward], batch: RewardBatch) -> None:
    """Show a monitoring set to those of some rewards that want one now."""
    for r in parts:
        if hasattr(r, "monitoring") and r.monitoring():
            r.monitor(batch)  # type: ignore[attr-defined]


def object_array(values: Iterable[Any]) -> ndarray:
    """A one-dimensional array of Python objects: texts, or tuples of any length."""
    return np.fromiter(values, dtype=object)


def _column(values: Any, n: int) -> ndarray:
    return (
        values if isinstance(values, ndarray) and values.ndim else np.full(n, values) if np.isscalar(values) else np.asarray(values)
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else np.nan


def _phase_entropies(r: Rollout) -> tuple[float, float]:
    """Mean entropy before (an opening tag included) and after the closing tag, NaN for an empty phase."""
    h = r.entropies or ()
    if r.think is None:
        return np.nan, _mean(h)
    if r.answer is None or r.answer.start < r.think.stop:
        return _mean(h), np.nan
    return _mean(h[: r.think.stop - r.prompt_len]), _mean(h[r.answer.start - r.prompt_len :])


def _of_problems(ids: ndarray, problems: Sequence[Problem]) -> dict[str, ndarray]:
    if not problems:
        return {}
    by_id = {p.id: p.meta for p in problems}
    if missing := sorted(set(ids) - set(by_id)):
        raise ValueError(f"{len(missing)} problems of the rollouts are not among the problems given, e.g. {missing[0]!r}.")
    asked = [by_id[i] for i in ids]
    found = {name: [_number(name, m) for m in asked] for name in FROM_META}
    return {name: np.array(values, float) for name, values in found.items() if None not in values}


def _number(name: str, meta: Mapping[str, Any]) -> float | None:
    """A number of a problem's meta, ``None`` where it has none. A range that says it has no upper end goes on for ever."""
    if name.startswith("high_") and name in meta and meta[name] is None:
        return np.inf
    return float(meta[name]) if isinstance(meta.get(name), int | float) else None
