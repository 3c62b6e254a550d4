"""Task and sizes of a study (``Study``), and the rollouts that it starts from: newly sampled, or read from a directory."""

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
"""Function that is called with one line of progress at a time."""
T = TypeVar("T", Moments, States)


@dataclass(frozen=True)
class Study:
    """Task, sizes and seed of a study.

    Attributes:
        task: Name of a task, or path of a JSONL file of problems.
        problems: Number of problems per split.
        samples: Samples per problem.
        max_new_tokens: Token budget of a response.
        batch_size: Rows decoded together; does not change the samples.
        seed: Seed of the problems, of the samples and of the bootstrap.
        allow_overlap: True to evaluate also on problems that the edit or direction was made from; reports then say so.

    Raises:
        ValueError: an unknown task.
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
        """Sampling settings: temperature 1, with the study's number of samples, token budget, seed and batch size."""
        return Sampling(self.samples, max_new_tokens=self.max_new_tokens, seed=self.seed, batch_size=self.batch_size)

    def load(self, split: str, lm: LM | None = None) -> list[Problem]:
        """Load the study's problems of a split.

        Args:
            split: ``train``, ``dev`` or ``test``.
            lm: Model whose context the prompts must fit; needed by tasks such as ``needle``.
        """
        return tasks.load(self.task, split, self.problems, self.seed, lm=lm)

    def origin(self, split: str) -> dict[str, Any]:
        """Return a dict with ``task, split, seed`` of the study's problems of a split, as the header of rollouts records them."""
        return origin(self.task, split, self.seed)


def origin(task: str, split: str, seed: int) -> dict[str, Any]:
    """Return a dict with ``task, split, seed``, as the header of rollouts records them. A task that is a file gets its absolute path."""
    return {"task": str(Path(task).resolve()) if Path(task).is_file() else task, "split": split, "seed": seed}


def with_origin(value: T, about: Mapping[str, Any]) -> T:
    """Return a copy of moments or states, with the origin of their rollouts added to the provenance.

    If the task is a file, only the file's name is recorded, without its folder, since the measurement may be published.

    Args:
        value: Moments or states.
        about: Origin of the rollouts: ``task, split, seed``.
    """
    short = {**about, "task": Path(about["task"]).name} if "task" in about and not about["task"].startswith(tasks.GYM) else about
    return replace(value, provenance=replace(value.provenance, notes={**value.provenance.notes, **short}))


def extraction_rollouts(lm: LM, study: Study, *, out: Path | None = None, say: Say = lambda text: None) -> list[Rollout]:
    """Sample responses to the study's train problems, from which directions and heads are computed.

    Args:
        out: Directory to save the rollouts in, from which a repeated call resumes; ``None`` saves nothing.
        say: Function that is called with one line of progress at a time.
    """
    problems = study.load("train", lm)
    say(f"sampling {len(problems)} x {study.samples} rollouts to compute the direction from")
    return rollouts(lm, problems, study.sampling, out=out, about=study.origin("train"))


@dataclass(frozen=True)
class RolloutDirectory:
    """Rollouts that the command ``toolkit rollouts`` saved in a directory, as ``read_rollouts`` returns them.

    Attributes:
        directory: The directory they were read from.
        header: Content of ``header.json``: model, task, split, seed, number of rollouts, and sampling settings.
        rollouts: The rollouts in the directory.
    """

    directory: Path
    header: Mapping[str, Any]
    rollouts: list[Rollout]

    @property
    def temperature(self) -> float:
        """Temperature at which the rollouts were sampled."""
        return float(self.header["sampling"]["temperature"])

    @property
    def problems(self) -> int:
        """Number of problems of the complete run."""
        return self.expected // self.header["sampling"]["n"]

    @property
    def expected(self) -> int:
        """Number of rollouts of the complete run."""
        return self.header.get("rollouts") or len(self.rollouts)

    @property
    def origin(self) -> dict[str, Any]:
        """Dict with ``task, split, seed``, as far as the header records them.

        If the run is incomplete, it also has ``rollouts``, such as ``"120 of 400 rollouts"``.
        """
        recorded = {k: self.header[k] for k in ("task", "split", "seed") if self.header.get(k) is not None}
        incomplete = len(self.rollouts) < self.expected
        part = {"rollouts": f"{len(self.rollouts):,} of {self.expected:,} rollouts"} if incomplete else {}
        return {**recorded, **part}

    def task(self, name: str | None) -> str:
        """Return the task to evaluate on: ``name`` if given, else the task of the rollouts. If neither is known, raise ValueError."""
        task = name or self.header.get("task")
        if not task:
            raise ValueError(f"{self.directory} does not record the task of its rollouts: give it with --task.")
        return str(task)

    def check(self, lm: LM) -> None:
        """Check that the rollouts were sampled from ``lm``.

        Raises:
            WrongModelError: the rollouts come from other weights, or were sampled under an intervention.
            DamagedFileError: a token id is outside the vocabulary of ``lm``.
        """
        if self.header["fingerprint"] != lm.fingerprint or self.header["interventions"]:
            source = " under ".join([str(self.header.get("model")), *self.header["interventions"]])
            weights = self.header["fingerprint"][:12], lm.fingerprint[:12]
            raise store.WrongModelError(
                f"The rollouts in {self.directory} are of {source}, not of {lm.name} as loaded (weights {weights[0]}, not "
                f"{weights[1]}): sample them from this model, in this dtype."
            )
        wrong = next((r for r in self.rollouts if max(r.token_ids) >= lm.vocab_size), None)
        if wrong is not None:
            raise store.DamagedFileError(
                f"{self.directory}: sample {wrong.sample} of problem {wrong.problem_id[:60]!r} holds token id {max(wrong.token_ids)}, expected "
                f"0..{lm.vocab_size - 1}. Sample it again."
            )


def read_rollouts(directory: str | Path, *, partial: bool = False) -> RolloutDirectory:
    """Read the rollouts that ``toolkit rollouts`` saved in a directory, without loading a model.

    Args:
        partial: True to accept an incomplete run. Short prompts are sampled first, so the rollouts of an incomplete run are not a random
            sample of those of the complete run.

    Raises:
        FileNotFoundError: ``directory`` holds no rollouts.
        store.DamagedFileError: a file in it is damaged.
        ValueError: there are no rollouts yet, or the run is incomplete and ``partial`` is False.
    """
    header = store.load_header(directory)
    try:
        Sampling(**header["sampling"])
    except (TypeError, ValueError) as error:
        raise store.DamagedFileError(
            f"{directory}/header.json: its sampling settings are invalid: {error} Sample into another directory."
        ) from error
    sampled = store.load_rollouts(directory)
    expected = header.get("rollouts") or header["sampling"]["n"] * len({r.problem_id for r in sampled})
    if not sampled or (len(sampled) < expected and not partial):
        raise ValueError(
            f"{directory} holds {len(sampled):,} of {expected:,} rollouts: the run was stopped. Run the same `toolkit rollouts` command again "
            "to finish it" + (", or use the rollouts there with --partial (short prompts come first)." if sampled else ".")
        )
    return RolloutDirectory(Path(directory), header, sampled)
