"""The input of a reward (``RewardBatch``, columns of a batch of rollouts) and its output (``RewardValues``, one number per rollout).

A *group* is the set of rows with the same ``problem_id``. Two problems with the same text but different ids are two groups. The rows of
a group may be anywhere in the batch. Lengths are in tokens. Entropies and log-probabilities are in nats per token.

A reward is a callable object, ``reward(batch) -> RewardValues``. It has a ``name``, and ``needs``, the set of names of the columns that it
reads. Its parameters are dataclass fields.

Most rewards are immutable. A stateful reward changes only after it has scored a batch of training rollouts, that is, a batch whose
``split`` is ``"train"``. ``state_dict`` returns its state as a dict that can be written as JSON, and ``load_state_dict`` restores the
state. If a state is stored by problem id, a problem must keep its id throughout training. The toolkit assumes that every state is stored
by problem id, unless the reward has the class attribute ``state_by_problem = False``.

In a run of several processes, give every process the rollouts of all processes in the same order. All copies of a stateful reward then
compute the same state, and no state has to be exchanged.

Some rewards measure the policy on a *monitoring set*: training problems, the same throughout a run, whose sampled responses are not
trained on. Such a reward has two more methods. Before each batch of training rollouts the trainer calls ``monitoring()``. It returns
``(number of problems, responses per problem)`` if new responses are due, else ``None``. ``monitor(batch)`` receives the responses.
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
from toolkit.rewards.columns import COLUMN_SOURCES, column, object_array, problem_columns
from toolkit.rewards.written import mean, own, own_text, phase_entropies
from toolkit.types import Problem, Rollout

SPLITS = ("train", "eval")


class MissingColumnError(ValueError):
    """A batch lacks a column that a reward, or your code, tries to read. The message says how to get the column."""

    def __init__(self, column: str, available: Iterable[str], reward: str = "") -> None:
        problem = (
            f"The reward {reward!r} needs the column {column!r}, but the batch" if reward else f"No column {column!r}: the batch"
        )
        source = COLUMN_SOURCES.get(column, "the toolkit does not compute it: add it with batch.with_columns(name=values)")
        super().__init__(f"{problem} has {', '.join(sorted(available))}. How to get it: {source}.")
        self.column, self.reward = column, reward


class RewardValues(NamedTuple):
    """The reward of each row of a batch, and its components. A reward is the sum of its components.

    Attributes:
        values: Reward of each row, ``[n]``.
        components: Component name, such as "correctness" or "length" -> its value in each row, ``[n]``. They add up to ``values``.
    """

    values: Float[ndarray, " n"]
    components: dict[str, Float[ndarray, " n"]]

    @classmethod
    def sum(cls, **components: ndarray) -> RewardValues:
        """Return a ``RewardValues`` with these components, arrays ``[n]`` passed by name; ``values`` is their sum.

        >>> RewardValues.sum(correctness=np.array([1, 0]), length=np.array([-0.25, -0.5])).values.tolist()
        [0.75, -0.5]
        """
        parts = {name: np.asarray(values, np.float64) for name, values in components.items()}
        return cls(np.sum(list(parts.values()), axis=0), parts)


@runtime_checkable
class Reward(Protocol):
    """Interface of a reward: a callable from ``RewardBatch`` to ``RewardValues``, with a name and the names of the columns it needs."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, batch: RewardBatch) -> RewardValues: ...


@dataclass(frozen=True, eq=False)
class RewardBatch:
    """Columns of a batch of rollouts, one value per rollout. Make a batch with ``from_rollouts``, or from lists with ``from_columns``.

    Attributes:
        columns: Column name -> values, ``[n]``. ``problem_id`` is required. Other columns are required only if a reward has them in
            ``needs``. ``columns.COLUMN_SOURCES`` lists the known names.
        step: Number of optimizer steps done so far. Rewards that change during training by a schedule depend on it.
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
            raise ValueError(f"Every column needs one value per row, shape ({len(self)},), but got {wrong}.")
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r}: choose one of {', '.join(SPLITS)}.")

    @classmethod
    def from_rollouts(
        cls,
        rollouts: Sequence[Rollout],
        problems: Sequence[Problem] | None = None,
        *,
        step: int = 0,
        split: str = "train",
        close: str | None = CLOSE,
    ) -> RewardBatch:
        """Make a batch from rollouts, with one row per rollout.

        The batch always has these columns:

        - ``problem_id``, ``correct``, ``think_tokens``, ``finish`` and ``text``, copied from the rollout.
        - ``tokens`` and ``token_ids``: number and ids of the response's tokens, without the prompt.
        - ``calls``: number of answered tool calls. ``result_tokens``: number of tokens of their results. ``written_tokens``: number of
          tokens that the model wrote, ``tokens - result_tokens``.
        - ``closed``: True if the rollout has an answer span, because thinking was closed or was never opened.
        - ``think_closed``: True if a think span was closed, by the response or by its prompt. For a model without a closing tag
          (``close=None``), it equals ``closed``.
        - ``formatted``: True if ``think_closed`` is True and the answer is not empty.
        - ``answer_text``: text of the answer; "" if ``closed`` is False. If the answer follows tool results, the text after the last of
          them (``Rollout.after_results``).

        Other columns depend on the data:

        - ``logprob``, if every rollout has log-probabilities: their mean over the response's tokens.
        - ``think_entropy`` and ``answer_entropy``, if every rollout has entropies: their mean over the thinking
          and their mean over the answer.
        - ``question`` and ``gold_answer``, if problems are given.
        - Each column of ``columns.META_COLUMNS``, if every problem has a number of this name in its ``meta``. For ``high_tokens`` and
          ``high_words``, ``None`` also counts, as infinity. Each column of ``columns.LABEL_COLUMNS``, if every problem has this label.

        Args:
            rollouts: The rollouts.
            problems: The problems of the rollouts; needed only for the columns that are read from problems.
            step: Optimizer steps done so far.
            split: ``"train"`` or ``"eval"``.
            close: Closing think tag of the model that wrote the rollouts; ``answer_text`` begins after it. ``None`` if the model has none:
                ``think_closed`` and ``formatted`` then require no think span.

        Raises:
            ValueError: There are no rollouts, or a rollout's problem is not among ``problems``.
        """
        if not rollouts:
            raise ValueError("No rollouts: a batch needs at least one.")
        think_closed = np.array([r.closed and (close is None or r.think is not None) for r in rollouts], bool)
        columns = {
            "problem_id": object_array(r.problem_id for r in rollouts),
            "correct": np.array([r.correct for r in rollouts], bool),
            "tokens": np.array([r.response_tokens for r in rollouts], np.int64),
            "calls": np.array([len(r.results) for r in rollouts], np.int64),
            "result_tokens": np.array([r.result_tokens for r in rollouts], np.int64),
            "written_tokens": np.array([r.written_tokens for r in rollouts], np.int64),
            "think_tokens": np.array([r.think_tokens for r in rollouts], np.int64),
            "closed": np.array([r.closed for r in rollouts], bool),
            "think_closed": think_closed,
            "formatted": think_closed & np.array([bool(r.answer) for r in rollouts], bool),
            "finish": object_array(r.finish for r in rollouts),
            "text": object_array(r.text for r in rollouts),
            "answer_text": object_array(answer_text(own_text(r), close) if r.closed else "" for r in rollouts),
            "token_ids": object_array(r.token_ids[r.prompt_len :] for r in rollouts),
        }
        if all(r.logprobs is not None for r in rollouts):
            columns["logprob"] = np.array([mean(own(r, r.logprobs or ())) for r in rollouts])
        if all(r.entropies is not None for r in rollouts):
            columns["think_entropy"], columns["answer_entropy"] = np.array([phase_entropies(r) for r in rollouts]).T
        return cls(columns | problem_columns(columns["problem_id"], problems or ()), step, split)

    @classmethod
    def from_columns(cls, *, problem_id: Any = "problem", step: int = 0, split: str = "train", **columns: Any) -> RewardBatch:
        """Make a batch from columns: a list or array holds one value per row, and a single value applies to all rows.

        By default all rows belong to one problem; for several problems, pass a list as ``problem_id``.

        >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[100, 200, 50], finish="stop")
        >>> batch["finish"].tolist(), batch.groups.tolist()
        (['stop', 'stop', 'stop'], [0, 0, 0])
        """
        # Numbers and texts are single values; the number of rows is the length of the longest list.
        n = max((len(values) for values in (problem_id, *columns.values()) if not np.isscalar(values)), default=1)
        return cls({"problem_id": column(problem_id, n)}, step, split).with_columns(**columns)

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
        """Group index of each row, ``[n]``. Rows with the same problem id form a group. Indices follow the order of first appearance."""
        # factorize gives a missing value, such as None or NaN, the code -1.
        codes, _ = pd.factorize(np.asarray(self.columns["problem_id"]))
        if len(codes) and codes.min() < 0:
            raise ValueError(f"Row {int(codes.argmin())} has no problem_id ({self.columns['problem_id'][codes.argmin()]!r}).")
        return codes.astype(np.int64)

    @cached_property
    def group_ids(self) -> ndarray:
        """Problem id of each group, ``[groups]``, in the order of the group indices."""
        ids = np.empty(int(self.groups.max(initial=-1)) + 1, self.columns["problem_id"].dtype)
        ids[self.groups] = self.columns["problem_id"]
        return ids

    def check(self, reward: Reward) -> None:
        """Raise MissingColumnError if the batch lacks a column that the reward needs."""
        for name in sorted(reward.needs - set(self.columns)):
            raise MissingColumnError(name, self.columns, reward.name)

    def take(self, rows: Sequence[int] | ndarray) -> RewardBatch:
        """Return a batch of some of the rows.

        Args:
            rows: The rows to take: their indices, in the order that the result should have; or a boolean mask ``[n]``, True at these rows.
        """
        index = np.asarray(rows)
        index = index if index.dtype == bool else index.astype(np.int64)
        return replace(self, columns={name: values[index] for name, values in self.columns.items()})

    def with_columns(self, **columns: Any) -> RewardBatch:
        """Return a batch with columns added or replaced. Each argument is one column: one value per row, or a single value for all rows."""
        return replace(self, columns={**self.columns, **{k: column(v, len(self)) for k, v in columns.items()}})


def state_by_name(rewards: Iterable[Reward]) -> dict[str, Any]:
    """Return the states of those rewards that have one: reward name -> state. The dict can be written as JSON."""
    return {r.name: state for r in rewards if hasattr(r, "state_dict") and (state := r.state_dict())}


def has_state_by_problem(rewards: Iterable[Reward]) -> bool:
    """Return True if at least one of the rewards stores its state by problem id. Problems must then keep their ids throughout training.

    An example is HAPO, which stores a length for each problem. A reward that has a state but no attribute ``state_by_problem`` is assumed
    to store it by problem id.
    """
    stateful = [r for r in rewards if hasattr(r, "state_dict") and r.state_dict()]
    return any(getattr(r, "state_by_problem", True) for r in stateful)


def load_state_by_name(rewards: Iterable[Reward], saved: Mapping[str, Any]) -> None:
    """Restore the states of rewards.

    Args:
        rewards: Rewards to restore; a reward without an entry in ``saved`` keeps its state.
        saved: Reward name -> state, the result of ``state_by_name``.

    Raises:
        KeyError: ``saved`` holds the state of a reward that is not among ``rewards``, or that has no state.
    """
    stateful = {r.name: r for r in rewards if hasattr(r, "load_state_dict")}
    if missing := set(saved) - set(stateful):
        raise KeyError(f"Saved states of {', '.join(sorted(missing))}, but the stateful rewards are {', '.join(sorted(stateful))}.")
    for name, state in saved.items():
        stateful[name].load_state_dict(state)


def monitoring_size(rewards: Iterable[Reward]) -> tuple[int, int] | None:
    """Return the size of a monitoring set that is large enough for all rewards, or ``None`` if no reward needs new responses now.

    A monitoring set consists of training problems whose sampled responses measure the policy and are not trained on. The size is
    ``(number of problems, responses per problem)``, each the largest that a reward requests now.
    """
    sizes = [size for r in rewards if hasattr(r, "monitoring") and (size := r.monitoring())]
    return (max(n for n, _ in sizes), max(n for _, n in sizes)) if sizes else None


def monitor_parts(rewards: Iterable[Reward], batch: RewardBatch) -> None:
    """Call ``monitor(batch)`` of every reward that now needs new responses from the monitoring set.

    A monitoring set consists of training problems whose sampled responses measure the policy and are not trained on. All rewards get the
    same responses.

    Args:
        rewards: Rewards; those that use no monitoring set, or need no new responses now, are skipped.
        batch: Responses of the policy to the problems of the monitoring set.
    """
    for r in rewards:
        if hasattr(r, "monitoring") and r.monitoring():
            r.monitor(batch)  # type: ignore[attr-defined]
