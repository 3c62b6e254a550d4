"""Prompts and random seeds of a training run: the order of problems, texts added to prompts, and the settings of dynamic sampling.

Dynamic sampling replaces groups of rollouts whose rewards are all equal, since they add nothing to the gradient.

All random choices depend only on the seed of the run and on the step. So a resumed run, or a run on more processes, samples the same
responses to the same prompts.
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

from toolkit.rewards.train_long_think_short import PUBLISHED_EVERY, PUBLISHED_GAMMA, PUBLISHED_START, budget_at, stated_budget
from toolkit.types import Ask, Problem, Rollout

Mode = Literal["long", "short"]  # the kind of thinking that a prompt requests
MODES: tuple[Mode, Mode] = ("long", "short")


@dataclass(frozen=True)
class Drawn:
    """A rollout of the policy in training, and the prompt that it answers.

    Attributes:
        rollout: The rollout.
        prompt: Messages of the prompt, including text that the recipe added.
        budget: Token budget stated in the prompt, or ``None``.
        mode: ``"long"`` or ``"short"`` if the prompt requests long or short thinking, else ``None``.
        logprob_without: Mean log-probability of the response's tokens that the model wrote, in nats per token, given the prompt without
            the question: the user messages are made empty. ``None`` unless the reward needs it.
    """

    rollout: Rollout
    prompt: tuple[Mapping[str, str], ...]
    budget: int | None = None
    mode: Mode | None = None
    logprob_without: float | None = None


@dataclass(frozen=True)
class AppendedText:
    """Callable object that changes a prompt: it appends ``text`` to the last user message.

    Attributes:
        text: Text to append. No space is inserted before it, so begin it with one if needed.
    """

    text: str

    def __call__(self, messages: Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
        """Return the messages with the text appended to the last user message. Raise ValueError if there is no user message."""
        users = [i for i, m in enumerate(messages) if m["role"] == "user"]
        if not users:
            raise ValueError(f"No user message to add {self.text!r} to: the roles are {[m['role'] for m in messages]}.")
        last = users[-1]
        return [{**m, "content": m["content"] + self.text} if i == last else m for i, m in enumerate(messages)]


@dataclass(frozen=True)
class Curriculum:
    """A token budget that is stated in the prompt and falls during training (Train Long, Think Short, arXiv 2508.08940).

    At step t the budget in tokens is ``B(t) = max(1, B0 * decay^floor(t / every))``, rounded to a whole number. The defaults give the
    paper's budgets: 256 tokens, times 0.698 every 150 steps.

    >>> [Curriculum().at(step) for step in (0, 150, 300, 450)]
    [256, 179, 125, 87]

    Attributes:
        start: B0, the budget of the first steps, in tokens.
        decay: Factor in (0, 1] by which the budget is multiplied every ``every`` steps.
        every: Number of optimizer steps with the same budget.
        text: Text appended to the question; ``{budget}`` is replaced by the number of tokens.
    """

    start: int = PUBLISHED_START
    decay: float = PUBLISHED_GAMMA
    every: int = PUBLISHED_EVERY
    text: str = " Use exactly {budget} tokens."

    def __post_init__(self) -> None:
        if self.start < 1 or not 0 < self.decay <= 1 or self.every < 1 or "{budget}" not in self.text:
            raise ValueError(f"{self}: start and every must be at least 1, 0 < decay <= 1, and the text must contain {{budget}}.")

    def at(self, step: int) -> int:
        """Return the token budget that prompts state after ``step`` optimizer steps; ``at(0)`` is the budget of the first step."""
        return stated_budget(budget_at(step, start=self.start, gamma=self.decay, every=self.every))

    def ask(self, step: int) -> Ask:
        """Return a function that changes a prompt: it appends the text with the token budget after ``step`` optimizer steps."""
        return AppendedText(self.text.format(budget=self.at(step)))


def budget_prompt(curriculum: Curriculum | None, step: int) -> tuple[Ask | None, int | None]:
    """Return ``(function, budget)``: a function that appends the token budget to a prompt, and the budget in tokens.

    Both are ``None`` if ``curriculum`` is ``None``.

    Args:
        curriculum: Rule by which the budget falls during training, or ``None``.
        step: Number of optimizer steps done so far.
    """
    return (curriculum.ask(step), curriculum.at(step)) if curriculum else (None, None)


def prompted_messages(problem: Problem, ask: Ask | None) -> tuple[Mapping[str, str], ...]:
    """Return the prompt of a problem: its messages, changed by the function ``ask`` unless that is ``None``."""
    return tuple(ask(problem.messages) if ask else problem.messages)


@dataclass(frozen=True)
class Modes:
    """Texts for prompts that request long or short thinking.

    Half of the responses to each problem are sampled with the long request, half with the short one, as in Adaptive Deep Reasoning
    (arXiv 2505.20101). The *mode* of a prompt is ``"long"`` or ``"short"``.

    Attributes:
        long: Text appended to the question to request long thinking.
        short: Text appended to the question to request short thinking.
    """

    long: str = "[Please answer with Long CoT]"
    short: str = "[Please answer with Short CoT]"

    def ask(self, mode: Mode) -> Ask:
        """Return the function that appends the request for long or for short thinking to a prompt."""
        return AppendedText(self.long if mode == "long" else self.short)


@dataclass(frozen=True)
class Dynamic:
    """Settings of dynamic sampling (DAPO, arXiv 2503.14476; DLER, arXiv 2510.15110).

    A group is the set of rollouts of one problem. If all of them get the same reward, the group adds nothing to the gradient. Such groups
    are dropped, and groups of other problems are sampled until the batch is full. If a limit (``rounds`` or ``most``) is reached first,
    dropped groups fill the rest of the batch. Both limits are ours. DAPO stops the run instead if it reaches a limit of its own.

    DLER's paper and its released script differ. In DLER a correct but truncated rollout gets reward 0. So if all rollouts of a group are
    correct and half of them are truncated, their rewards differ. The paper, like this class, keeps such a group. The script compares the
    rewards before truncation is penalised. They are then all equal, so it drops the group.

    Attributes:
        rounds: Maximum number of rounds of sampling per batch, the first included.
        most: Maximum number of groups sampled per batch, as a multiple of the batch's number of groups.
    """

    rounds: int = 4
    most: int = 4

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.most < 1:
            raise ValueError(f"{self}: rounds and most must be at least 1.")

    @staticmethod
    def keeps(rewards: Float[ndarray, " samples"]) -> bool:
        """Return True if the rewards of a group differ, so that the group is kept.

        NaN counts as different, so that it reaches the trainer, which raises an error.
        """
        return bool((rewards != rewards[0]).any())

    def next_round(self, kept: int, sampled: int, wanted: int) -> int:
        """Return the number of problems to sample in the next round, so that about ``wanted`` groups are kept in all.

        A group is kept if its rewards differ. The estimate assumes that the share of groups that are kept stays as it is so far, or is 1/8
        if it is lower so far. The number is 0 if the limit ``most`` is reached. The caller enforces the limit ``rounds``.

        Args:
            kept: Number of groups kept so far.
            sampled: Number of groups sampled so far, at least 1.
            wanted: Number of groups that the batch needs.
        """
        # Assumed share of groups that will be kept: the share so far, but at least 1/8, so that the number of problems stays finite.
        needed = math.ceil((wanted - kept) / max(kept / sampled, 1 / 8))
        return min(needed, self.most * wanted - sampled)


def seed_of(seed: int, step: int, stream: int = 0) -> int:
    """Return the random seed for what is sampled after ``step`` optimizer steps. It is a hash of the three arguments.

    Args:
        seed: Seed of the run.
        step: Number of optimizer steps done so far.
        stream: Number that gives unrelated seeds to several samplings at one step. For example, prompts that request long thinking have
            ``stream`` 0, and prompts that request short thinking have ``stream`` 1.
    """
    # 48 bits of a hash, so that neighbouring steps have unrelated seeds.
    return int.from_bytes(hashlib.sha256(f"{seed}|{step}|{stream}".encode()).digest()[:6], "big")


def schedule(problems: Sequence[Problem], per_step: int, steps: int, seed: int) -> list[str]:
    """Return the problem ids of a run in training order: a list of length ``per_step * steps``.

    A generation is a batch of responses sampled at once; it may serve several optimizer steps. Problems are shuffled anew in each epoch,
    and no problem occurs twice in a generation. If the problems left at the end of an epoch do not fill a generation, that epoch skips
    them, as in TRL.

    Args:
        problems: Training problems.
        per_step: Number of problems per generation (not per optimizer step).
        steps: Number of generations (not of optimizer steps).
        seed: Seed of the order.

    Raises:
        ValueError: there are fewer problems than one generation needs, or two share an id.
    """
    ids = [p.id for p in problems]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{len(ids) - len(set(ids))} training problems share an id with another: ids must be unique.")
    if len(ids) < per_step:
        raise ValueError(f"{len(ids)} training problems, but one step uses {per_step}: give more problems, or use fewer per step.")
    order: list[str] = []
    epoch = 0
    while len(order) < per_step * steps:
        shuffled = random.Random(f"{seed}|{epoch}").sample(ids, len(ids))
        # Whole generations only.
        order += shuffled[: len(ids) // per_step * per_step]
        epoch += 1
    return order[: per_step * steps]


def more_problems(problems: Sequence[Problem], used: set[str], n: int, seed: int) -> list[Problem]:
    """Return up to ``n`` random problems whose ids are not in ``used``; the same seed gives the same problems."""
    left = [p for p in problems if p.id not in used]
    return random.Random(seed).sample(left, min(n, len(left)))


def renumbered(rollouts: Sequence[Rollout], first_sample: int) -> list[Rollout]:
    """Return the rollouts with ``first_sample`` added to their sample indices (``Rollout.sample``).

    Purpose: if a recipe requests long and short thinking, the long and the short rollouts of a problem are sampled separately. In both sets
    the indices start at 0. Adding the number of long rollouts to the indices of the short ones makes the indices of a problem distinct.
    """
    return [replace(r, sample=r.sample + first_sample) for r in rollouts]
