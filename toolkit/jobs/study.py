"""The size of a study, and the rollouts it starts from: sampled, or given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from toolkit import store, tasks
from toolkit.collect import States
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM
from toolkit.types import Moments, Problem, Rollout

Say = Callable[[str], None]
"""Told in a line what happens next."""
T = TypeVar("T", Moments, States)


@dataclass(frozen=True)
class Study:
    """Size of a study: problems per split, samples per problem, and the budget of a response. An unknown task is a ValueError.

    Attributes:
        allow_overlap: Judge things also on problems that they were made from (said wherever it is).
    """

    task: str = "arithmetic"
    problems: int = 200
    samples: int = 8
    max_new_tokens: int = 400
    batch_size: int = 256
    seed: int = 0
    allow_overlap: bool = False

    def __post_init__(self) -> None:
        tasks.check(self.task)

    @property
    def sampling(self) -> Sampling:
        """Temperature 1, the study's budget and seed."""
        return Sampling(self.samples, max_new_tokens=self.max_new_tokens, seed=self.seed, batch_size=self.batch_size)

    def load(self, split: str, lm: LM | None = None) -> list[Problem]:
        """The study's problems of a split, sized for ``lm`` where the task needs it (``needle``)."""
        return tasks.load(self.task, split, self.problems, self.seed, lm=lm)

    def origin(self, split: str) -> dict[str, Any]:
        """Task, split and seed, as rollouts and what is made from them record it."""
        return origin(self.task, split, self.seed)


def origin(task: str, split: str, seed: int) -> dict[str, Any]:
    """What rollouts and things made from them record of their problems; a file by its whole path, so that it is found again."""
    return {"task": str(Path(task).resolve()) if Path(task).is_file() else task, "split": split, "seed": seed}


def with_origin(value: T, about: Mapping[str, Any]) -> T:
    """A measurement whose provenance also tells the origin of its rollouts; of a file only the name, as it may be published."""
    short = {**about, "task": Path(about["task"]).name} if "task" in about and not about["task"].startswith(tasks.GYM) else about
    return replace(value, provenance=replace(value.provenance, notes={**value.provenance.notes, **short}))


def extraction_rollouts(lm: LM, study: Study, *, out: Path | None = None, say: Say = lambda text: None) -> list[Rollout]:
    """Rollouts of the train split, to find directions and heads on."""
    problems = study.load("train", lm)
    say(f"sampling {len(problems)} x {study.samples} rollouts to find the direction on")
    return rollouts(lm, problems, study.sampling, out=out, about=study.origin("train"))


@dataclass(frozen=True)
class RolloutDirectory:
    """A directory of ``toolkit rollouts``, read and found whole; made by :func:`read_rollouts`.

    Attributes:
        header: Who sampled them, on which problems, and how.
    """

    directory: Path
    header: Mapping[str, Any]
    rollouts: list[Rollout]

    @property
    def temperature(self) -> float:
        """Temperature they were sampled at."""
        return float(self.header["sampling"]["temperature"])

    @property
    def problems(self) -> int:
        """How many problems were asked for."""
        return self.asked // self.header["sampling"]["n"]

    @property
    def asked(self) -> int:
        """How many rollouts were asked for."""
        return self.header.get("rollouts") or len(self.rollouts)

    @property
    def origin(self) -> dict[str, Any]:
        """Task, split and seed as far as the header tells, and how many rollouts there are if it is a part of a run."""
        told = {k: self.header[k] for k in ("task", "split", "seed") if self.header.get(k) is not None}
        part = {"rollouts": f"{len(self.rollouts):,} of {self.asked:,} rollouts"} if len(self.rollouts) < self.asked else {}
        return {**told, **part}

    def task(self, wanted: str | None) -> str:
        """The task to judge on: the one wanted, else the one of the rollouts. Raises ValueError if neither is known."""
        task = wanted or self.header.get("task")
        if not task:
            raise ValueError(f"{self.directory} does not tell which task its rollouts are of: say it with --task.")
        return str(task)

    def check(self, lm: LM) -> None:
        """Raise WrongModelError unless the rollouts are of this model as it is, DamagedFileError if their tokens cannot be."""
        if self.header["fingerprint"] != lm.fingerprint or self.header["interventions"]:
            made = " under ".join([str(self.header.get("model")), *self.header["interventions"]])
            weights = self.header["fingerprint"][:12], lm.fingerprint[:12]
            raise store.WrongModelError(
                f"The rollouts in {self.directory} are of {made}, not of {lm.name} as it is (weights {weights[0]}, not {weights[1]}): sample "
                "them from this model, in this dtype."
            )
        wrong = next((r for r in self.rollouts if max(r.token_ids) >= lm.vocab_size), None)
        if wrong is not None:
            raise store.DamagedFileError(
                f"{self.directory}: sample {wrong.sample} of problem {wrong.problem_id[:60]!r} holds token id {max(wrong.token_ids)}, expected "
                f"0..{lm.vocab_size - 1}. Sample it again."
            )


def read_rollouts(directory: str | Path, *, partial: bool = False) -> RolloutDirectory:
    """Rollouts from ``toolkit rollouts``, before any model is loaded.

    Args:
        partial: Whether a part of a run will do. Short prompts are sampled first, so a part is not a random one.

    Raises:
        FileNotFoundError: not a directory of rollouts.
        store.DamagedFileError: a file there cannot be what it should be.
        ValueError: only a part of the run is there, and ``partial`` is not set.
    """
    header = store.load_header(directory)
    try:
        Sampling(**header["sampling"])
    except (TypeError, ValueError) as error:
        raise store.DamagedFileError(
            f"{directory}/header.json: sampling cannot be: {error} Sample into another directory."
        ) from error
    there = store.load_rollouts(directory)
    asked = header.get("rollouts") or header["sampling"]["n"] * len({r.problem_id for r in there})
    if not there or (len(there) < asked and not partial):
        raise ValueError(
            f"{directory} holds {len(there):,} of the {asked:,} rollouts asked for: the run was stopped. Give its `toolkit rollouts` command "
            "again to finish it" + (", or use the part there is with --partial (short prompts come first)." if there else ".")
        )
    return RolloutDirectory(Path(directory), header, there)
