"""A reward as a plain TRL ``reward_funcs`` entry, for anyone's ``GRPOTrainer`` script: ``reward_funcs=[as_trl(HAPO(), ...)]``.

TRL calls ``f(prompts, completions, completion_ids, **dataset columns, trainer_state, log_metric)``. That gives tokens, token ids
and texts; the rest comes from dataset columns of the same name, or from functions given in ``columns``. Groups follow the
dataset's id column where there is one, otherwise contiguous chunks of ``generations``: two problems with one text are never
merged.

In several processes TRL hands each its own slice, which may cut a group: pass ``gather=accelerate.utils.gather_object`` and every
process scores all rows and keeps its own, so that statistics are of whole groups and states stay equal. A reward that remembers wants
``callbacks=[toolkit.grpo.kept.Kept(entry)]``, so that its memory is in the checkpoints. TRL is not imported here.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from toolkit.rewards.answers import CLOSE, answer_text
from toolkit.rewards.batch import Reward, RewardBatch, object_array

Column = Callable[..., Sequence[Any]]
"""Supplies a column: called with TRL's own keyword arguments, returns one value a completion."""


def as_trl(
    reward: Reward,
    *,
    columns: Mapping[str, Column] | None = None,
    group: str = "problem_id",
    generations: int | tuple[int, int] | None = None,
    stop_ids: Sequence[int] = (),
    gather: Callable[[list], list] | None = None,
    close: str | None = CLOSE,
) -> TRLReward:
    """A reward as TRL's ``reward_funcs`` takes them.

    Args:
        columns: What TRL does not have, by name: ``{"correct": lambda completions, answer, **_: [...]}``.
        group: The dataset column of problem ids.
        generations: ``num_generations`` (or it and ``num_generations_eval``), for datasets without ids.
        stop_ids: Ids that end a response, for rewards that need ``finish``.
        gather: ``accelerate.utils.gather_object`` in a run of several processes.
        close: The model's closing think tag, for rewards that need ``answer_text``.
    """
    both = generations if isinstance(generations, tuple) or generations is None else (generations, generations)
    return TRLReward(reward, dict(columns or {}), group, both, frozenset(stop_ids), gather, close)


@dataclass(frozen=True)
class TRLReward:
    """Made by :func:`as_trl`; holds no state beside the reward's, and can be pickled if the reward and the columns can."""

    reward: Reward
    columns: Mapping[str, Column]
    group: str
    generations: tuple[int, int] | None
    stop_ids: frozenset[int]
    gather: Callable[[list], list] | None
    close: str | None

    @property
    def __name__(self) -> str:
        """What TRL calls it in its logs."""
        return self.reward.name

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **given: Any
    ) -> list[float]:
        """The reward of each completion.

        Raises:
            MissingColumnError: a column that the reward needs is neither in the dataset nor among ``columns``.
            ValueError: groups that cannot be told, or a reward that is not finite.
        """
        asked = dict(prompts=prompts, completions=completions, completion_ids=completion_ids, **given)
        split, step = batch_split(given), getattr(given.get("trainer_state"), "global_step", 0)
        found = self._columns(asked, split)
        mine = slice(0, len(completion_ids))
        if self.gather is not None:
            found, mine = gather_columns(found, self.gather)
        scored = self.reward(RewardBatch(found, step, split))
        if not np.isfinite(scored.values).all():
            at = int(np.flatnonzero(~np.isfinite(scored.values))[0])
            raise ValueError(
                f"The reward {self.reward.name!r} is {scored.values[at]} at step {step} for problem {found['problem_id'][at]!r}."
            )
        if (log := given.get("log_metric")) is not None:
            for name, values in scored.components.items():
                log(f"{self.reward.name}/{name}", float(values[mine].mean()))
        return scored.values[mine].tolist()

    def _columns(self, asked: Mapping[str, Any], split: str) -> dict[str, ndarray]:
        """The columns the reward needs, from functions, else the dataset, else what TRL gives."""
        ids = asked["completion_ids"]
        own: dict[str, Callable[[], ndarray]] = {
            "tokens": lambda: np.array([len(i) for i in ids], np.int64),
            "token_ids": lambda: object_array(tuple(i) for i in ids),
            "text": lambda: object_array(map(completion_text, asked["completions"])),
            "answer_text": lambda: object_array(answer_text(completion_text(c), self.close) for c in asked["completions"]),
        }
        if self.stop_ids:
            own["finish"] = lambda: object_array("stop" if len(i) and i[-1] in self.stop_ids else "length" for i in ids)
        found = {"problem_id": self._groups(asked, split)}
        for name in self.reward.needs - {"problem_id"}:
            if name in self.columns:
                found[name] = np.asarray(self.columns[name](**asked))
            elif name in asked:
                found[name] = np.asarray(asked[name])
            elif name in own:
                found[name] = own[name]()
        return found

    def _groups(self, asked: Mapping[str, Any], split: str) -> ndarray:
        if self.group in asked:
            return object_array(asked[self.group])
        n = len(asked["completion_ids"])
        size = self.generations[split == "eval"] if self.generations else 0
        if not size or n % size:
            raise ValueError(
                f"No column {self.group!r} in the dataset, and {n} completions do not split into groups of generations={size or None}: "
                "add a column of problem ids, or pass generations=num_generations."
            )
        if getattr(self.reward, "state_dict", dict)():
            raise ValueError(
                f"The reward {self.reward.name!r} remembers problems between steps: add a column {self.group!r} of problem ids to the dataset."
            )
        marker = uuid.uuid4().hex  # chunks of two processes are different groups
        return object_array(f"{marker}-{i // size}" for i in range(n))


def gather_columns(columns: Mapping[str, ndarray], gather: Callable[[list], list]) -> tuple[dict[str, ndarray], slice]:
    """The columns of all processes in order, and where this process's rows are among them."""
    marker = uuid.uuid4().hex
    parts = gather([(marker, dict(columns))])
    sizes = [len(part["problem_id"]) for _, part in parts]
    here = [m for m, _ in parts].index(marker)
    start = sum(sizes[:here])
    return {name: np.concatenate([part[name] for _, part in parts]) for name in columns}, slice(start, start + sizes[here])


def completion_text(completion: Any) -> str:
    """A completion as text: itself, or the contents of its messages."""
    return completion if isinstance(completion, str) else "".join(str(m["content"]) for m in completion)


def batch_split(given: Mapping[str, Any]) -> str:
    """Whether TRL trains or evaluates: a dataset column ``split`` says so, else the mode of the trainer's model.

    Raises ValueError for a batch that mixes splits.
    """
    if "split" in given:
        found = set(given["split"])
        if len(found) > 1:
            raise ValueError(f"A batch of the splits {', '.join(sorted(map(str, found)))}: train and evaluate on one at a time.")
        return "train" if found == {"train"} else "eval"
    trainer = getattr(given.get("log_metric"), "__self__", None)  # TRL hands over a bound method of the trainer
    training = getattr(getattr(trainer, "model", None), "training", True)
    return "train" if training else "eval"
