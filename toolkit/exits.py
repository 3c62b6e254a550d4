"""Early exits: a decoding rule that ends thinking at the end of a step, where a check says so.

A *candidate* is the end of a step of thinking, such as a line break. At each candidate of a response, ``EarlyExit`` calls its check. If the
check returns True, the closing think tag is placed, and the model goes on to answer. ``methods.code_stop`` and ``methods.exit_probe`` have
checks from papers.

The random control is ``RandomExit``. Its probability to stop at candidate j is the share of the responses reaching candidate j that the
check stopped there. So about as many responses stop at each candidate as with the check, but chance chooses which::

    rule = EarlyExit(CodeStop())
    control = EarlyExit(RandomExit(rates(lm, rule, responses), seed=0))
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit import identity
from toolkit.baselines import closing, closing_tag
from toolkit.lm import LM
from toolkit.spans import THINK, Reader
from toolkit.types import Rollout

Check = Callable[[LM, Reader, list[Any]], bool]
"""Function ``(lm, reader, earlier) -> True to stop thinking``, called at each candidate of a response.

``reader.ids`` holds the prompt and the response so far. ``earlier`` is a list that belongs to this response: the check may append what it
measured. ``EarlyExit`` appends nothing."""


@dataclass(frozen=True)
class EarlyExit:
    """Decoding rule that closes thinking at the first candidate at which a check returns True. Pass it in ``Condition.rules``.

    Attributes:
        check: The check, see ``Check``. It needs equality and a ``str()`` that holds all its settings: use a frozen dataclass.
        ends: Text with which a step ends. Papers split at a blank line; the tiny reasoner writes one step per line.
        cues: Words with which the next step must begin, in lower case. The end of a step is a candidate only if the next sampled token is
            one of them. Empty: every end of a step is a candidate.
        before: Text that is placed directly before the closing tag.
    """

    check: Check
    ends: str = "\n\n"
    cues: tuple[str, ...] = ()
    before: str = ""

    def __post_init__(self) -> None:
        if not self.ends:
            raise ValueError("ends='': give the text with which a step ends, such as a line break.")

    def __str__(self) -> str:
        cues = f" before {', '.join(self.cues)}" if self.cues else ""
        return f"exit at {self.ends!r}{cues} by {self.check}, closed by {self.before!r} and the tag"

    def after_step(self, lm: LM, reader: Reader) -> bool:
        """Return True if the response so far ends a step of thinking."""
        if reader.phase != THINK or not reader.written or self.ends[-1] not in lm.token_text(reader.ids[-1]):
            return False
        return lm.text(reader.ids[-min(reader.written, len(self.ends)) :]).endswith(self.ends)

    def at_candidate(self, lm: LM, reader: Reader, drawn: int) -> bool:
        """Return True if the response so far ends a step of thinking, and the token ``drawn``, sampled next, may begin another step."""
        if not self.after_step(lm, reader):
            return False
        if lm.tags is None or drawn in lm.eos_ids or _closes(lm, reader, drawn):
            return False  # the model stops by itself
        return not self.cues or lm.token_text(drawn).strip().lower() in self.cues

    def __call__(self, lm: LM, reader: Reader, drawn: int) -> Sequence[int] | None:
        """Return the token ids that close thinking, or ``None`` to keep the sampled token.

        Args:
            lm: The model.
            reader: State of the response before the sampled token. The check's measurements are in ``reader.kept``.
            drawn: Id of the sampled token.

        Raises:
            NoThinkTagsError: the model has no closing think tag.
        """
        closing_tag(lm)  # without tags there is no think phase, and the rule would never act
        if not self.at_candidate(lm, reader, drawn):
            return None
        if not self.check(lm, reader, reader.kept.setdefault(self, [])):
            return None
        return closing(lm, reader, self.before)


def _closes(lm: LM, reader: Reader, drawn: int) -> bool:
    """Return True if the drawn token is the closing think tag, or the first token of a tag of several tokens."""
    if lm.tags is None or lm.tags.close is None:
        return False
    return reader.ends(drawn, lm.tags.close) or drawn == closing(lm, reader)[0]


def candidates(lm: LM, rule: EarlyExit, rollout: Rollout, *, closed: bool = False) -> Iterator[tuple[int, Reader]]:
    """Yield each candidate of a finished response as a pair ``(index, reader)``, in order.

    ``index`` is the position in ``rollout.token_ids`` of the token after the step. ``reader`` holds the response before that token. It is
    one object that moves on: read it before you ask for the next pair.

    Args:
        lm: The model.
        rule: The rule; its check is not called.
        rollout: The response.
        closed: True to yield also the end of the last step, if the text with which the rule closes thinking follows it. Without a text before
            the tag, the tokens do not tell whether the model stopped there by itself or the rule stopped it.
    """
    reader = Reader(lm, rollout.token_ids[: rollout.prompt_len])
    for at in range(rollout.prompt_len, len(rollout.token_ids)):
        token = rollout.token_ids[at]
        if (closed and rule.after_step(lm, reader) and is_close(lm, rule, rollout, reader)) or rule.at_candidate(lm, reader, token):
            yield at, reader
        reader.push(token)


def is_close(lm: LM, rule: EarlyExit, rollout: Rollout, reader: Reader) -> bool:
    """Return True if the text with which the rule closes thinking follows what the reader has read of a response."""
    if rollout.answer is None or reader.phase != THINK or lm.tags is None or lm.tags.close is None:
        return False
    at, placed = len(reader.ids), closing(lm, reader, rule.before)
    return list(rollout.token_ids[at : at + len(placed)]) == list(placed)


def rates(lm: LM, rule: EarlyExit, rollouts: Sequence[Rollout]) -> tuple[float, ...]:
    """Return the share of exits at each candidate, 0 to 1. Entry j: of the responses that reach candidate j, the share that the check stops.

    Args:
        lm: The model.
        rule: The rule.
        rollouts: Responses of the model without the rule: the check is replayed on them.

    Raises:
        ValueError: no response has a candidate.
    """
    stopped: list[list[bool]] = []
    for r in rollouts:
        earlier: list[Any] = []
        for j, (_, reader) in enumerate(candidates(lm, rule, r)):
            if j == len(stopped):
                stopped.append([])
            stopped[j].append(rule.check(lm, reader, earlier))
            if stopped[j][-1]:
                break
    if not stopped:
        raise ValueError(
            f"None of {len(rollouts)} responses has a step of thinking that ends with {rule.ends!r} before another one: sample more "
            "responses, or choose another end of steps."
        )
    return tuple(sum(each) / len(each) for each in stopped)


@dataclass(frozen=True)
class RandomExit:
    """Check that stops at random: the control of another check.

    Attributes:
        rates: Probability of an exit at each candidate, from ``rates``. The last entry also holds for all later candidates.
        seed: Random seed. The random numbers depend on it and on the tokens of the response so far, not on the batch.
    """

    rates: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        if not self.rates or not all(0 <= rate <= 1 for rate in self.rates):
            raise ValueError(f"rates={self.rates}: expected one probability per candidate, each from 0 to 1.")

    def __str__(self) -> str:
        return f"chance (seed {self.seed}; {', '.join(map(identity.format_exact, self.rates))})"

    def __call__(self, lm: LM, reader: Reader, earlier: list[Any]) -> bool:
        """Return True with the probability of this candidate."""
        earlier.append(None)
        rate = self.rates[min(len(earlier), len(self.rates)) - 1]
        return random.Random(f"{self.seed}-{reader.ids}").random() < rate
