"""What is asked and drawn at a step: the order of problems, what is added to a prompt, which groups are kept.

Everything here follows from (seed, step) alone, so a resumed run, or one spread over more processes, asks and draws the same.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float
from numpy import ndarray

from toolkit.lm import Ask
from toolkit.rewards.train_long_think_short import PUBLISHED_EVERY, PUBLISHED_GAMMA, PUBLISHED_START, budget_at, stated
from toolkit.types import Problem, Rollout

Mode = Literal["long", "short"]
MODES: tuple[Mode, Mode] = ("long", "short")


@dataclass(frozen=True)
class Drawn:
    """A rollout of the current policy, and how it was asked for.

    Attributes:
        prompt: The messages as asked, additions included.
        budget: Tokens the prompt allowed, or ``None``.
        mode: ``"long"`` or ``"short"`` if the prompt asked for one, else ``None``.
        logprob_without: Mean log-probability (nats a token) of the response after an empty question, or ``None``.
    """

    rollout: Rollout
    prompt: tuple[Mapping[str, str], ...]
    budget: int | None = None
    mode: Mode | None = None
    logprob_without: float | None = None


@dataclass(frozen=True)
class AppendedText:
    """A change of the prompt: a text after the last user message."""

    text: str

    def __call__(self, messages: Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
        """The messages with the text added. Raises ValueError where no user speaks."""
        speaking = [i for i, m in enumerate(messages) if m["role"] == "user"]
        if not speaking:
            raise ValueError(f"No user message to add {self.text!r} to: the roles are {[m['role'] for m in messages]}.")
        at = speaking[-1]
        return [{**m, "content": m["content"] + self.text} if i == at else m for i, m in enumerate(messages)]


@dataclass(frozen=True)
class Curriculum:
    """A token budget that falls as training goes on and is stated in the prompt (Train Long, Think Short, arXiv 2508.08940).

    ``B(t) = max(1, B0 * decay^floor(t / every))`` tokens at step t, rounded to the nearest whole number.

    Attributes:
        start: B0, tokens.
        decay: Factor a drop.
        every: Steps between drops.
        text: Added to the question; ``{budget}`` is the number.
    """

    start: int = PUBLISHED_START
    decay: float = PUBLISHED_GAMMA
    every: int = PUBLISHED_EVERY
    text: str = " Use exactly {budget} tokens."

    def __post_init__(self) -> None:
        if self.start < 1 or not 0 < self.decay <= 1 or self.every < 1 or "{budget}" not in self.text:
            raise ValueError(f"{self}: need start and every of at least 1, 0 < decay <= 1, and {{budget}} in the text.")

    def at(self, step: int) -> int:
        """The budget at a step, in tokens."""
        return stated(budget_at(step, start=self.start, gamma=self.decay, every=self.every))

    def ask(self, step: int) -> Ask:
        """The change of the prompt at a step."""
        return AppendedText(self.text.format(budget=self.at(step)))


def budget_prompt(curriculum: Curriculum | None, step: int) -> tuple[Ask | None, int | None]:
    """The change of the prompt and the budget it states at a step."""
    return (curriculum.ask(step), curriculum.at(step)) if curriculum else (None, None)


def prompted_messages(problem: Problem, ask: Ask | None) -> tuple[Mapping[str, str], ...]:
    """A problem's messages as asked."""
    return tuple(ask(problem.messages) if ask else problem.messages)


@dataclass(frozen=True)
class Modes:
    """Half of each group is asked for long thinking, half for short (Adaptive Deep Reasoning, arXiv 2505.20101)."""

    long: str = "[Please answer with Long CoT]"
    short: str = "[Please answer with Short CoT]"

    def ask(self, mode: Mode) -> Ask:
        """The change of the prompt that asks for a mode."""
        return AppendedText(self.long if mode == "long" else self.short)


@dataclass(frozen=True)
class Dynamic:
    """Dynamic sampling (DAPO, arXiv 2503.14476; DLER, arXiv 2510.15110): groups whose rollouts are all paid the same are dropped,
    and sampling goes on until the batch is full.

    What counts is the reward that is trained on, truncation included, as in DLER's paper. Its released script looks at the score
    before the truncation's penalty, and so drops a group that is all right but half cut; not copied.

    Attributes:
        rounds: Most rounds of sampling a step ...
        most: ... and most groups, as a multiple of the batch; groups without variance then fill it (they push nothing). Both are ours:
            DAPO stops the run.
    """

    rounds: int = 4
    most: int = 4

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.most < 1:
            raise ValueError(f"{self}: need at least 1 round, and room for at least 1 batch.")

    @staticmethod
    def keeps(paid: Float[ndarray, " samples"]) -> bool:
        """Whether the rewards of a group differ. A reward that is NaN differs, so that the trainer sees and names it."""
        return bool((paid != paid[0]).any())

    def next_round(self, kept: int, asked: int, wanted: int) -> int:
        """How many more problems to ask so that ``wanted`` groups are likely to be kept; 0 if no more may be."""
        likely = math.ceil((wanted - kept) / max(kept / asked, 1 / 8))
        return min(likely, self.most * wanted - asked)


def seed_of(seed: int, step: int, stream: int = 0) -> int:
    """Seed of the rollouts of a step; ``stream`` tells several draws of one problem apart."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{step}|{stream}".encode()).digest()[:6], "big")


def schedule(problems: Sequence[Problem], per_step: int, steps: int, seed: int) -> list[str]:
    """Ids of the problems of all steps in order: epoch after epoch, each shuffled anew, no problem twice in a step.

    What is left over at the end of an epoch is left out, as in TRL.

    Raises:
        ValueError: fewer problems than a step asks, or two with one id.
    """
    ids = [p.id for p in problems]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{len(ids) - len(set(ids))} training problems share an id with another: ids must be unique.")
    if len(ids) < per_step:
        raise ValueError(f"{len(ids)} training problems, but a step asks {per_step}: give more problems or ask fewer a step.")
    order: list[str] = []
    epoch = 0
    while len(order) < per_step * steps:
        shuffled = random.Random(f"{seed}|{epoch}").sample(ids, len(ids))
        order += shuffled[: len(ids) // per_step * per_step]
        epoch += 1
    return order[: per_step * steps]


def more_problems(problems: Sequence[Problem], asked: set[str], n: int, seed: int) -> list[Problem]:
    """Up to ``n`` problems not asked yet, the same ones for the same seed."""
    left = [p for p in problems if p.id not in asked]
    return random.Random(seed).sample(left, min(n, len(left)))


def renumbered(found: Sequence[Rollout], first_sample: int) -> list[Rollout]:
    """Rollouts renumbered, so that the samples of two modes of one problem differ."""
    return [replace(r, sample=r.sample + first_sample) for r in found]
