"""The size of a study, and the rollouts it starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from toolkit import tasks
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM
from toolkit.types import Problem, Rollout

Say = Callable[[str], None]
"""Told in a line what happens next."""


@dataclass(frozen=True)
class Study:
    """Size of a study: problems a split, samples a problem, and the budget of a response. An unknown task is a ValueError."""

    task: str = "arithmetic"
    problems: int = 200
    samples: int = 8
    max_new_tokens: int = 400
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        tasks.check(self.task)

    @property
    def sampling(self) -> Sampling:
        """Temperature 1, the study's budget and seed."""
        return Sampling(self.samples, max_new_tokens=self.max_new_tokens, seed=self.seed, batch_size=self.batch_size)

    def load(self, split: str, lm: LM | None = None) -> list[Problem]:
        """The study's problems of a split, sized for ``lm`` where the task needs it (``needle``); a file of problems is one split, cut
        in halves: train, then test."""
        if self.task in tasks.NAMES:
            return tasks.load(self.task, split, self.problems, self.seed, lm=lm)
        everything = tasks.load(self.task, split, 2 * self.problems, self.seed)
        half = len(everything) // 2
        return everything[:half] if split == "train" else everything[half:]


def extraction_rollouts(lm: LM, study: Study, *, out: Path | None = None, say: Say = lambda text: None) -> list[Rollout]:
    """Rollouts of the train split, to find directions and heads on."""
    problems = study.load("train", lm)
    say(f"sampling {len(problems)} x {study.samples} rollouts to find the direction on")
    return rollouts(lm, problems, study.sampling, out=out)
