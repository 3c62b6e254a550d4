"""Baselines of length control that change no weights or activations.

A direction or an edit is useful only if it is better than these. Each baseline is passed to one field of ``Condition``:

* ``Budget`` ends thinking after a number of tokens. It replaces sampled tokens: pass it in ``Condition.rules``.
* ``SecondLook`` makes the model think on when it wants to stop. It replaces sampled tokens: pass it in ``Condition.rules``.
* ``Suppress`` forbids words such as "wait" while the model thinks. It changes the logits: pass it in ``Condition.during``. (Its own field
  ``during`` is something else: the positions at which it acts.)
* ``Instruction`` tells the model to think briefly. It changes the prompt: pass it as ``Condition.ask``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit import hooks, phases
from toolkit.lm import LM, NoThinkTagsError
from toolkit.phases import THINKING, Scope
from toolkit.spans import TAIL, THINK, Reader
from toolkit.tags import ENDS_MESSAGE

NOWAIT = ("wait", "alternatively", "hmm", "but", "however", "check", "verify", "again", "maybe")
"""Default words of ``Suppress``: words with which models often begin to reconsider. Our choice, after NoWait (arXiv:2506.08343)."""


def _ids(lm: LM, text: str) -> tuple[int, ...]:
    """Return the token ids of a text."""
    return tuple(lm.tokenizer.encode(text, add_special_tokens=False))


def closing_tag(lm: LM) -> str:
    """Return the text of the model's closing think tag. Raise NoThinkTagsError if it has none."""
    if lm.tags is None or lm.tags.close is None:
        raise NoThinkTagsError(
            f"{lm.name} has no closing think tag, so its thinking cannot be ended: load it with tags=ThinkTags(...)."
        )
    return lm.tags.close


def closing(lm: LM, reader: Reader, before: str = "") -> tuple[int, ...]:
    """Return the token ids that close the thinking of a response.

    Args:
        lm: The model.
        reader: State of the response, which is in the think phase.
        before: Text that is placed directly before the closing tag. If the model has already written the first tokens of the tag, this
            text is left out, and only the rest of the tag is placed.

    Raises:
        NoThinkTagsError: The model has no closing think tag.
    """
    tag = closing_tag(lm)
    text = ENDS_MESSAGE.get(tag, "") + tag
    # The model may have begun to write the closing tag itself: then only the rest is placed.
    begun = lm.text(reader.tail) if lm.token_id(text) is None else ""
    # part: length of the longest beginning of the closing text with which the response ends.
    part = next((n for n in range(len(text) - 1, 0, -1) if begun.endswith(text[:n])), 0)
    return _ids(lm, text[part:] if part else before + text)


@dataclass(frozen=True)
class Budget:
    """Decoding rule that ends thinking after a number of tokens (budget forcing, arXiv:2501.19393).

    Pass it in ``Condition.rules``. Once a response has ``tokens`` think tokens, the next sampled token is replaced by the closing think
    tag. Then the model goes on to answer. If the model closes its thinking earlier, the rule changes nothing.

    Attributes:
        tokens: Largest number of think tokens per response; the tokens of ``before`` do not count.
        before: Text that is placed directly before the closing tag, such as a line break. If the model has already written the first tokens
            of the tag, this text is left out, and only the rest of the tag is placed.
    """

    tokens: int
    before: str = ""

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"tokens={self.tokens}: expected a budget of 0 or more think tokens.")

    def __str__(self) -> str:
        return f"budget of {self.tokens} think tokens, closed by {self.before!r} and the tag"

    def __call__(self, lm: LM, reader: Reader, drawn: int) -> Sequence[int] | None:
        """Return the token ids that replace the sampled token, or ``None`` to keep it.

        ``generate`` calls this once per sampled token, unless another rule has already replaced the token.

        Args:
            lm: The model.
            reader: State of the response before the sampled token: its phase and its number of think tokens.
            drawn: Id of the sampled token.

        Raises:
            NoThinkTagsError: The model has no closing think tag.
        """
        tag = closing_tag(lm)  # first: without tags there is no think phase, and the rule would never act
        if reader.phase != THINK or reader.written < self.tokens or reader.ends(drawn, tag):
            return None
        return closing(lm, reader, self.before)


@dataclass(frozen=True)
class SecondLook:
    """Decoding rule that prolongs thinking (arXiv:2501.19393): a text such as "Wait" replaces the first ``times`` closing tags.

    Pass it in ``Condition.rules``. If the closing tag has several tokens, only its last token is replaced; its other tokens remain part of
    the thinking.

    Attributes:
        text: Text that is placed instead of the closing tag.
        times: Number of closing tags that this rule replaces per response. The next closing tag ends thinking as usual. Each rule counts
            only the tags that it replaces itself. But two rules of a condition with the same ``text`` and ``times`` share one count.
    """

    text: str = "Wait"
    times: int = 1

    def __str__(self) -> str:
        return f"closing replaced by {self.text!r}, {self.times} times"

    def __call__(self, lm: LM, reader: Reader, drawn: int) -> Sequence[int] | None:
        """Return the token ids that replace the sampled token, or ``None`` to keep it.

        ``generate`` calls this once per sampled token, unless another rule has already replaced the token.

        Args:
            lm: The model.
            reader: State of the response before the sampled token: its phase, and the number of tokens that this rule has replaced. A call
                that replaces the token raises this number by 1.
            drawn: Id of the sampled token.

        Raises:
            NoThinkTagsError: The model has no closing think tag.
        """
        tag = closing_tag(lm)
        closing = reader.phase == THINK and reader.ends(drawn, tag)
        if not closing or reader.placed[self] >= self.times:
            return None
        reader.placed[self] += 1
        return _ids(lm, self.text)


@dataclass(frozen=True)
class Suppress:
    """Intervention that suppresses words (NoWait, arXiv:2506.08343): their tokens get logit -inf while the model thinks.

    Pass it in ``Condition.during``. A token is suppressed if its text, in lower case and without surrounding white space, is one of the
    words. A word that takes several tokens is not suppressed.

    Attributes:
        words: Words to suppress.
        during: Positions at which the logits are changed; the token after such a position cannot be one of the words. Default: all
            positions in the think phase. (This is not ``Condition.during``, which holds interventions.)
        after: Text after which the words are suppressed, such as a line break, besides the beginning of thinking; ``""`` for everywhere.
            So a word can be banned as the beginning of a step, and still be used inside steps. Thinking begins after the opening tag, or
            after the header of the assistant's turn if the model has no opening tag; white space may follow either of them.
    """

    words: tuple[str, ...] = NOWAIT
    during: Scope = THINKING
    after: str = ""

    @property
    def recordable(self) -> bool:
        """True if a pass may be captured and replayed (see ``lm.Intervention``): with ``after``, every pass looks at its token ids."""
        return not self.after

    def __str__(self) -> str:
        return f"suppressing {', '.join(self.words)}{f' after {self.after!r}' * bool(self.after)}: {self.during}"

    @contextmanager
    def __call__(self, lm: LM) -> Iterator[None]:
        """Return a context manager in which the words are suppressed.

        Entering it raises ValueError if none of the words is a single token of the tokenizer, or if the tokenizer cannot write ``after``;
        and NoThinkTagsError if the words are suppressed only during thinking, and the model has no think tags.
        """
        phases.check_tags(self.during, lm)
        words = {word.strip().lower() for word in self.words}
        # The tokenizer and the logits may differ in size: only ids that both have can be suppressed.
        banned = [i for i in range(min(lm.vocab_size, len(lm.tokenizer))) if lm.text([i]).strip().lower() in words]
        if not banned:
            raise ValueError(
                f"No token of {lm.name} is one of {', '.join(self.words)}: give words that are single tokens of its tokenizer "
                "(for a character-level model, first letters)."
            )

        mask, ids = torch.zeros(0, dtype=torch.bool), torch.zeros(0, 0, dtype=torch.long)
        begins = _step_beginnings(lm, self.after) if self.after else None

        def before(given: Tensor | None, cache: Any) -> None:
            nonlocal ids
            if given is None:
                raise ValueError("Beginnings of steps are read off token ids: pass input_ids, not inputs_embeds.")
            history = phases.history_of(cache)  # ``track`` adds the tokens of a pass after it
            earlier = given[:, :0] if history is None or history.keys is None else history.keys[:, 0, -TAIL:, 0]
            ids = torch.cat([earlier, given], dim=1)

        def fn(logits: Tensor) -> Tensor:
            nonlocal mask
            if not len(mask):  # in the first pass only: a copy to a GPU waits for it
                mask = torch.zeros(logits.shape[-1], dtype=torch.bool)
                mask[banned] = True
                mask = mask.to(logits.device)
            # Logits may be computed only for the last positions of a pass. [:, -n:] takes the same positions of the weights.
            acts = self.during.weight(tracker.now)[:, -logits.shape[1] :, None].bool().to(logits.device)
            if begins is not None:
                acts = begins(ids, acts[..., 0])[..., None]
            return logits.masked_fill(acts & mask, -torch.inf)

        with ExitStack() as stack:
            if self.after:
                stack.enter_context(hooks.around_passes(lm.body, before, lambda given, cache: None))
            tracker = stack.enter_context(phases.track(lm))
            stack.enter_context(hooks.rewrite_logits(lm.model, fn))
            yield


def _step_beginnings(lm: LM, after: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function ``(ids, where) -> mask`` that finds the positions after which a step, or thinking, begins.

    ``ids`` holds the token ids of the rows; the mask ``where`` is about their last positions, and says which of them to look at. The text
    of the last ``TAIL`` tokens decides, since several tokens may write ``after`` or a tag.

    Raises:
        ValueError: the tokenizer cannot write ``after``.
    """
    size = min(lm.vocab_size, len(lm.tokenizer))
    texts = [lm.token_text(i) for i in range(size)]
    if not lm.text(_ids(lm, after)).endswith(after) and not any(text.endswith(after) for text in texts):
        raise ValueError(
            f"after={after!r}: the tokenizer of {lm.name} cannot write this text, so no step would begin after it. Give another text, or "
            "'' to suppress the words everywhere."
        )
    opening = (lm.tags.open or lm.text(lm.turn)).strip() if lm.tags else ""

    def may_end(text: str, end: str) -> bool:
        # Decoded alone, a token may lose a blank, or be a part of a character.
        return end[-1] in text or "\ufffd" in text or not text

    # Most tokens are ruled out by their own text, without decoding those before them.
    may = [may_end(text, after) or (bool(opening) and (may_end(text, opening) or not text.strip())) for text in texts]
    table = torch.tensor(may + [False] * (lm.vocab_size - size))

    def begins(ids: Tensor, where: Tensor) -> Tensor:
        looked_at = where & table.to(where.device)[ids[:, -where.shape[1] :].to(where.device)]
        found, rows, earlier = torch.zeros_like(where), ids.tolist(), ids.shape[1] - where.shape[1]
        for row, at in looked_at.nonzero().tolist():
            text = lm.text(rows[row][: earlier + at + 1][-TAIL:])
            found[row, at] = text.endswith(after) or (bool(opening) and text.rstrip().endswith(opening))
        return found

    return begins


@dataclass(frozen=True)
class Instruction:
    """Change of the prompt that adds the sentence ``text`` at the end of the last user message. Pass it as ``Condition.ask``.

    >>> Instruction()([{"role": "user", "content": "What is 2+2?"}])
    [{'role': 'user', 'content': 'What is 2+2? Think briefly.'}]
    """

    text: str = "Think briefly."

    def __str__(self) -> str:
        return f"asked: {self.text!r}"

    def __call__(self, messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
        """Return the messages with the sentence added to the last user message. Raise ValueError if there is no user message."""
        users = [i for i, m in enumerate(messages) if m["role"] == "user"]
        if not users:
            raise ValueError("There is no user message to add an instruction to.")
        last = users[-1]
        return [{**m, "content": f"{m['content']} {self.text}"} if i == last else m for i, m in enumerate(messages)]
