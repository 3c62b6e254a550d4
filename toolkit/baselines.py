"""What length control costs without touching the network: budgets, a forced second look, suppressed words, an instruction.

Baselines that every direction and edit has to beat. Each is part of a :class:`~toolkit.lm.Condition`: a *rule* changes which
token is placed, an *intervention* changes the logits, an *ask* changes the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit import hooks, phases
from toolkit.lm import LM, NoThinkTagsError
from toolkit.phases import THINKING, Scope
from toolkit.spans import THINK, Reader

NOWAIT = ("wait", "alternatively", "hmm", "but", "however", "check", "verify", "again", "maybe")
"""Words that NoWait-style suppression forbids while thinking: ours, after arXiv 2506.08343."""


def _ids(lm: LM, text: str) -> tuple[int, ...]:
    return tuple(lm.tokenizer.encode(text, add_special_tokens=False))


def _closing_tag(lm: LM) -> str:
    if lm.tags is None or lm.tags.close is None:
        raise NoThinkTagsError(
            f"{lm.name} has no closing think tag, so its thinking cannot be closed: load it with tags=ThinkTags(...)."
        )
    return lm.tags.close


@dataclass(frozen=True)
class Budget:
    """Budget forcing (arXiv 2501.19393): thinking is closed once it holds ``tokens`` tokens, whatever the model would write. A rule.

    Attributes:
        before: Text written before the closing tag, such as a line's end.
    """

    tokens: int
    before: str = ""

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"tokens={self.tokens}: a budget is at least 0 think tokens.")

    def __str__(self) -> str:
        return f"budget of {self.tokens} think tokens, closed by {self.before!r} and the tag"

    def __call__(self, lm: LM, reader: Reader, drawn: int) -> Sequence[int] | None:
        """The tokens placed instead of the one that was drawn, or ``None`` to keep it."""
        tag = _closing_tag(lm)
        over = reader.phase == THINK and reader.written >= self.tokens and not reader.ends(drawn, tag)
        return _ids(lm, self.before + tag) if over else None


@dataclass(frozen=True)
class SecondLook:
    """The other half of budget forcing (arXiv 2501.19393): the first ``times`` attempts to close thinking become a text. A rule.

    Of a closing tag that is several tokens only the last is replaced: its beginning stays in the thought.
    """

    text: str = "Wait"
    times: int = 1

    def __str__(self) -> str:
        return f"closing replaced by {self.text!r}, {self.times} times"

    def __call__(self, lm: LM, reader: Reader, drawn: int) -> Sequence[int] | None:
        """The tokens placed instead of the one that was drawn, or ``None`` to keep it."""
        closing = reader.phase == THINK and reader.ends(drawn, _closing_tag(lm))
        return _ids(lm, self.text) if closing and reader.forced < self.times else None


@dataclass(frozen=True)
class Suppress:
    """Words that cannot be begun while thinking (NoWait, arXiv 2506.08343): their tokens get logit -inf.

    A token counts if its text, blanks and case aside, is one of the words.
    """

    words: tuple[str, ...] = NOWAIT
    during: Scope = THINKING

    def __str__(self) -> str:
        return f"suppressing {', '.join(self.words)}: {self.during}"

    @contextmanager
    def __call__(self, lm: LM) -> Iterator[None]:
        words = {word.strip().lower() for word in self.words}
        banned = [i for i in range(min(lm.vocab_size, len(lm.tokenizer))) if lm.text([i]).strip().lower() in words]
        if not banned:
            raise ValueError(
                f"No token of {lm.name} is one of {', '.join(self.words)}: give words that its tokenizer knows as one token "
                "(a character-level model: the first letter)."
            )

        def fn(logits: Tensor) -> Tensor:
            acts = self.during.weight(tracker.now)[:, -logits.shape[1] :, None].bool()
            mask = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            mask[banned] = True
            return logits.masked_fill(acts & mask, -torch.inf)

        with phases.track(lm) as tracker, hooks.rewrite_logits(lm.model, fn):
            yield


@dataclass(frozen=True)
class Instruction:
    """A sentence added to the last user message: the prompt baseline."""

    text: str = "Think briefly."

    def __str__(self) -> str:
        return f"asked: {self.text!r}"

    def __call__(self, messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
        """The same messages, the last user's one extended. Raises ValueError if there is none."""
        users = [i for i, m in enumerate(messages) if m["role"] == "user"]
        if not users:
            raise ValueError("There is no user message to add an instruction to.")
        last = users[-1]
        return [{**m, "content": f"{m['content']} {self.text}"} if i == last else m for i, m in enumerate(messages)]
