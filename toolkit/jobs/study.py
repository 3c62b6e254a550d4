"""The settings of a study (``Study``), and the rollouts that it starts from: newly sampled, or read from a directory."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from toolkit import store, tasks
from toolkit.collect import States
from toolkit.engines import OWN_LOOP, Engine
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, check_thinking
from toolkit.methods import thinkedit
from toolkit.types import Moments, Problem, Rollout

Say = Callable[[str], None]
"""Function that is called with one line of progress at a time."""
T = TypeVar("T", Moments, States)


@dataclass(frozen=True)
class Study:
    """Settings of a study: its task, numbers of problems and samples, and seed.

    Attributes:
        task: Name of a task, or path of a JSONL file of problems.
        problems: Number of problems per split.
        samples: Samples per problem.
        max_new_tokens: Token budget of a response.
        batch_size: Number of responses that are decoded together; does not change the samples.
        seed: Seed of the problems, of the samples and of the bootstrap.
        allow_overlap: True to allow that an edit or direction is evaluated on problems from whose rollouts it was computed. Reports then
            give the number of these problems. False raises an error in this case.
        temperature: Sampling temperature.

    Raises:
        ValueError: the task is unknown.
    """

    task: str = "arithmetic"
    problems: int = 200
    samples: int = 8
    max_new_tokens: int = 400
    batch_size: int = 256
    seed: int = 0
    allow_overlap: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        tasks.check(self.task)

    @property
    def sampling(self) -> Sampling:
        """Sampling settings: the study's number of samples, temperature, token budget, seed and batch size."""
        return Sampling(
            self.samples, self.temperature, max_new_tokens=self.max_new_tokens, seed=self.seed, batch_size=self.batch_size
        )

    def load(self, split: str, lm: LM | None = None) -> list[Problem]:
        """Return the study's problems of a split. If a data set or file has fewer, all of them are returned.

        Args:
            split: ``train``, ``dev`` or ``test``.
            lm: Model that will answer the problems. Only the task ``needle`` requires it, to fit prompts and responses of ``max_new_tokens``
                tokens to the model's context.
        """
        return tasks.load(self.task, split, self.problems, self.seed, lm=lm, max_new_tokens=self.max_new_tokens)

    def origin(self, split: str) -> dict[str, Any]:
        """Return a dict with ``task, split, seed`` of the study's problems of a split, to be recorded with rollouts and directions."""
        return origin(self.task, split, self.seed)


def origin(task: str, split: str, seed: int) -> dict[str, Any]:
    """Return a dict with ``task, split, seed``, to be recorded with rollouts. If the task is a file, ``task`` is its absolute path."""
    return {"task": str(Path(task).resolve()) if Path(task).is_file() else task, "split": split, "seed": seed}


def with_origin(value: T, about: Mapping[str, Any]) -> T:
    """Return a copy of collected activations whose provenance also records the task, split and seed of their rollouts.

    If the task is a file, only the file's name is recorded, without its folder, since the result may be published.

    Args:
        value: Activations from ``collect``, as ``Moments`` (sums per class) or ``States`` (single rollouts or positions).
        about: ``task``, ``split`` and ``seed`` of the rollouts.
    """
    # ``Path.name`` leaves the name of a built-in task unchanged. A "gym:..." name is no path, so it is kept as it is.
    short = {**about, "task": Path(about["task"]).name} if "task" in about and not about["task"].startswith(tasks.GYM) else about
    return replace(value, provenance=replace(value.provenance, notes={**value.provenance.notes, **short}))


def extraction_rollouts(
    lm: LM, study: Study, *, engine: Engine = OWN_LOOP, out: Path | None = None, say: Say = lambda text: None
) -> list[Rollout]:
    """Sample the responses from which directions and heads are computed: responses to the study's train problems.

    Args:
        lm: Model to sample from.
        study: Task, numbers of problems and samples, and seed.
        engine: Program that samples the tokens.
        out: Directory to save the rollouts in, from which a repeated call resumes; ``None`` saves nothing.
        say: Function that is called with one line of progress at a time.

    Raises:
        thinkedit.ClassTooSmallError: so few rollouts cannot fill the classes of short and long thinking. Nothing is sampled then.
        ValueError: the model has no think tags. Nothing is sampled then.
        engines.CannotSampleError: the engine could not sample from a model that is edited afterwards. Nothing is sampled then.
    """
    check_thinking(lm)
    engine.check_edits()
    problems = study.load("train", lm)
    thinkedit.check_enough(len(problems) * study.samples)
    say(f"sampling {len(problems)} x {study.samples} rollouts to compute the direction from")
    return rollouts(lm, problems, study.sampling, engine=engine, out=out, about=study.origin("train"))


@dataclass(frozen=True)
class RolloutDirectory:
    """Rollouts that the command ``toolkit rollouts`` saved in a directory, as ``read_rollouts`` returns them.

    The run that sampled them may have been stopped, so that some rollouts are missing.

    Attributes:
        directory: The directory.
        header: Content of its ``header.json``: model, task, split, seed, sampling settings, and number of rollouts in the complete run.
        rollouts: The saved rollouts.
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
        """Number of problems in the complete run."""
        return self.expected // self.header["sampling"]["n"]

    @property
    def expected(self) -> int:
        """Number of rollouts in the complete run. If the header does not record it, the number of saved rollouts."""
        return self.header.get("rollouts") or len(self.rollouts)

    @property
    def origin(self) -> dict[str, Any]:
        """Dict with ``task, split, seed``; a key is missing if the header does not record it.

        If the run is incomplete, the dict also has ``rollouts``, such as ``"120 of 400 rollouts"``.
        """
        recorded = {k: self.header[k] for k in ("task", "split", "seed") if self.header.get(k) is not None}
        incomplete = len(self.rollouts) < self.expected
        part = {"rollouts": f"{len(self.rollouts):,} of {self.expected:,} rollouts"} if incomplete else {}
        return {**recorded, **part}

    def task(self, name: str | None) -> str:
        """Return the task to evaluate on: ``name`` if it is given, else the task that the rollouts were sampled from.

        Raises:
            ValueError: ``name`` is ``None``, and the header does not record the task.
        """
        task = name or self.header.get("task")
        if not task:
            raise ValueError(f"{self.directory} does not record the task of its rollouts: give it with --task.")
        return str(task)

    def check(self, lm: LM) -> None:
        """Raise an error unless the rollouts were sampled from the unchanged model ``lm``, with its think tags.

        Raises:
            WrongModelError: the rollouts come from other weights, were sampled under an intervention, or were split into thinking and
                answer by other think tags.
            DamagedFileError: a token id is outside the vocabulary of ``lm``.
        """
        check_header(self.header, self.directory, lm)
        wrong = next((r for r in self.rollouts if max(r.token_ids) >= lm.vocab_size), None)
        if wrong is not None:
            raise store.DamagedFileError(
                f"{self.directory}: sample {wrong.sample} of problem {wrong.problem_id[:60]!r} holds token id {max(wrong.token_ids)}, expected "
                f"0..{lm.vocab_size - 1}. Sample it again."
            )


def check_header(header: Mapping[str, Any], directory: str | Path, lm: LM) -> None:
    """Raise an error unless stored rollouts were sampled from the unchanged model ``lm``, with its think tags.

    Args:
        header: Header of the rollouts, from ``store.load_header``.
        directory: Their directory, for the message.
        lm: The model.

    Raises:
        WrongModelError: the rollouts come from other weights, were sampled under an intervention, or were split into thinking and answer by
            other think tags.
    """
    if header["fingerprint"] != lm.fingerprint or header["interventions"]:
        source = " under ".join([str(header.get("model")), *header["interventions"]])
        raise store.WrongModelError(
            f"The rollouts in {directory} are of {source}, not of {lm.name} as loaded here, whose weights differ: sample them from this model, "
            "in this dtype."
        )
    recorded, here = header["tags"], None if lm.tags is None else asdict(lm.tags)
    if recorded != here:
        option = "without --think" if recorded is None else f"--think {shlex.quote(_option(recorded))}"
        raise store.WrongModelError(
            f"The rollouts in {directory} were sampled with {_marks(recorded)}, but {lm.name} is loaded with {_marks(here)}. Load it as they "
            f"were sampled ({option}), or sample them again."
        )


def _option(tags: Mapping[str, str | None]) -> str:
    """Return the value of the option ``--think`` that stands for recorded think tags."""
    return "response" if tags.get("close") is None else f"{tags.get('open') or ''},{tags['close']}"


def _marks(tags: Mapping[str, str | None] | None) -> str:
    """Return words for recorded think tags, for an error message."""
    if tags is None:
        return "no think tags"
    return "whole responses as thinking" if tags.get("close") is None else f"the think tags {_option(tags)}"


def read_rollouts(directory: str | Path, *, partial: bool = False) -> RolloutDirectory:
    """Read the rollouts that ``toolkit rollouts`` saved in a directory, without loading a model.

    Args:
        directory: Directory that was given to ``toolkit rollouts --out``.
        partial: True to accept an incomplete run. Its rollouts are not a random sample of the complete run: short prompts are sampled
            first, so they are overrepresented.

    Raises:
        FileNotFoundError: ``directory`` holds no rollouts.
        store.DamagedFileError: a file in it is damaged.
        ValueError: the run was stopped before it saved a rollout, or it is incomplete and ``partial`` is False.
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
