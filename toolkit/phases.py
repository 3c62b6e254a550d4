"""Where a response is thinking: think and answer spans of finished sequences, and the phase of every position while a model runs.

Everything goes by token ids. A tag that is one token of the vocabulary is found by its id, any other by the tokens' own pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from toolkit import hooks
from toolkit.lm import LM
from toolkit.types import Span

TAIL = 32  # tokens at the end of a prompt in which a tag that the template put there is looked for
PHASES = ("prompt", "think", "answer")
PROMPT, THINK, ANSWER = range(3)


def spans(lm: LM, ids: Sequence[int], prompt_len: int, *, ended: bool) -> tuple[Span | None, Span | None]:
    """Think span and answer span of a sequence, by token ids (tags that are several tokens: by the tokens' own pieces).

    Thinking may be opened by the model or by the prompt (its template, or a message of the assistant that is continued), or be
    closed or switched off there (the think span is then empty). The first closing tag counts. Never closed: an open think span to the end and no answer. A response that never
    opens one answers directly: no think span, all answer.

    Args:
        ended: Whether the last token is an end-of-sequence token, which belongs to no span.
    """
    stop = len(ids) - ended
    tags = lm.tags
    if tags is None or (tags.open is None and tags.close is None):
        whole = Span(prompt_len, stop)
        return (whole if tags else None), (whole if ended or tags is None else None)
    begun = _last_of_prompt(lm, ids[:prompt_len])
    if begun == ANSWER:
        return Span(prompt_len, prompt_len), Span(prompt_len, stop)
    start = prompt_len
    if begun == PROMPT:
        tag = _first(lm, ids, tags.open, prompt_len, stop)
        closing = _first(lm, ids, tags.close, prompt_len, stop)
        if tag is None and closing is None:
            return None, Span(prompt_len, stop)
        start = tag.stop if tag and (closing is None or tag.start < closing.start) else prompt_len
    closing = _first(lm, ids, tags.close, start, stop)
    if closing is None:
        return Span(start, stop), None
    return Span(start, closing.start), Span(closing.stop, stop)


def answer_start(lm: LM, ids: Sequence[int], prompt_len: int, answer: Span) -> int:
    """Where an answer begins: inside the prompt, if that continues a message of the assistant and the answer goes on there."""
    said = _said(lm, ids[:prompt_len]) if answer.start == prompt_len else ()
    closed = find(lm, said, lm.tags.close if lm.tags else None)
    return answer.start - len(said) + (closed[-1].stop if closed else 0)


def ends_with(lm: LM, prompt: Sequence[int], tag: str | None) -> bool:
    """Whether a prompt ends with a tag, white space aside: what a user says of tags, or an earlier turn, does not count."""
    found = find(lm, prompt[-TAIL:], tag)
    return bool(found) and not lm.text(prompt[-TAIL:][found[-1].stop :]).strip()


def _first(lm: LM, ids: Sequence[int], tag: str | None, start: int, stop: int) -> Span | None:
    found = find(lm, ids[start:stop], tag)
    return Span(start + found[0].start, start + found[0].stop) if found else None


def find(lm: LM, ids: Sequence[int], tag: str | None) -> list[Span]:
    """Token spans of every occurrence of a tag."""
    if tag is None:
        return []
    single = lm.token_id(tag)
    if single is not None:
        return [Span(i, i + 1) for i, token in enumerate(ids) if token == single]
    # A tag of several tokens may share its last token with what follows ('>\n\n'); that token counts as tag. A token is read
    # beside the one before it, since many tokenizers drop the blank in front of a text's first token.
    pieces = [lm.text(ids[max(i - 1, 0) : i + 1])[len(lm.text(ids[i - 1 : i])) if i else 0 :] for i in range(len(ids))]
    ends = np.cumsum([len(piece) for piece in pieces])
    text, found, at = "".join(pieces), [], 0
    while (at := text.find(tag, at)) >= 0:
        first = int(np.searchsorted(ends, at, side="right"))
        last = int(np.searchsorted(ends, at + len(tag), side="left"))
        found.append(Span(first, last + 1))
        at += len(tag)
    return found


# --- while a model runs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scope:
    """Where in a response something acts. A position belongs to a phase by the tokens up to and including itself.

    *prompt* until thinking is opened, *think* from the opening tag on, *answer* from the closing tag on. So the position that
    predicts ``</think>`` is still thinking, and the tag itself predicts the answer.

    Attributes:
        phases: Phases in which it acts.
        first: Think tokens already written before it begins to act; positions outside thinking do not count.
        until: ... and from which on it no longer acts, or ``None``.
        ramp: ``"up"`` or ``"down"``: rises from 0 to full, or falls from full to 0, over ``budget`` think tokens (thinking only).
        budget: Length of the ramp in think tokens.
        newest: Act at the newest position only: the prompt's last one and every later one (arXiv 2506.15647).
    """

    phases: tuple[str, ...] = PHASES
    first: int = 0
    until: int | None = None
    ramp: Literal["up", "down"] | None = None
    budget: int | None = None
    newest: bool = False

    def __post_init__(self) -> None:
        if unknown := sorted({*self.phases} - {*PHASES}):
            raise ValueError(f"Unknown phase {unknown[0]!r}: choose from {', '.join(PHASES)}.")
        if self.first < 0 or (self.until is not None and self.until <= self.first):
            raise ValueError(f"first={self.first}, until={self.until}: need 0 <= first < until, in think tokens.")
        if (self.ramp is None) != (self.budget is None) or (self.budget is not None and self.budget < 1):
            raise ValueError(f"ramp={self.ramp!r}, budget={self.budget}: a ramp needs a budget of at least 1 think token.")

    @staticmethod
    def of(during: str | Scope) -> Scope:
        """``"all"``, ``"newest"``, or phases joined by ``+`` such as ``"think"`` or ``"think+answer"``."""
        if isinstance(during, Scope):
            return during
        match during:
            case "all":
                return Scope()
            case "newest":
                return Scope(newest=True)
        return Scope(tuple(during.split("+")))

    @property
    def everywhere(self) -> bool:
        """Whether it acts alike at every position, so that no phase has to be known."""
        return self == EVERYWHERE

    def __str__(self) -> str:
        parts = ["+".join(self.phases)]
        parts += [f"from think token {self.first}"] if self.first else []
        parts += [f"until {self.until}"] if self.until is not None else []
        parts += [f"ramp {self.ramp} over {self.budget}"] if self.ramp else []
        return "everywhere" if self.everywhere else ("newest position, " if self.newest else "") + ", ".join(parts)

    def weight(self, now: Now) -> Float[Tensor, "batch seq"]:
        """How strongly it acts at each position of a pass: 0 where it does not, 1 where it does, in between on a ramp."""
        chosen = [now.phase == PHASES.index(name) for name in self.phases]
        weight = (chosen[0] if len(chosen) == 1 else torch.stack(chosen).any(dim=0)).float()
        if self.newest and now.newest is not None:
            weight = weight * now.newest
        if self.first or self.until is not None:
            early = now.written < self.first
            outside = early if self.until is None else early | (now.written >= self.until)
            weight = weight.masked_fill((now.phase == THINK) & outside, 0.0)
        if self.budget is not None:
            share = (now.written / self.budget).clamp(max=1.0)
            weight = torch.where(now.phase == THINK, weight * (share if self.ramp == "up" else 1 - share), weight)
        return weight


EVERYWHERE, THINKING = Scope(), Scope(("think",))


@dataclass(frozen=True)
class Now:
    """The positions of one pass.

    Attributes:
        phase: PROMPT, THINK or ANSWER.
        before: The phases of the positions that precede them in the cache, or ``None``.
        newest: Which are the newest of their sequence at the time a response is generated; ``None`` for all.
    """

    phase: Int[Tensor, "batch seq"]
    before: Int[Tensor, "batch past"] | None
    newest: Bool[Tensor, "batch seq"] | None

    @cached_property
    def written(self) -> Int[Tensor, "batch seq"]:
        """Think positions that precede each one."""
        thinking = (self.phase == THINK).long()
        earlier = 0 if self.before is None else (self.before == THINK).sum(dim=1, keepdim=True)
        return earlier + thinking.cumsum(dim=1) - thinking


class Tracker:
    """Knows the phase of every position of the pass that runs now: ``tracker.now``."""

    def __init__(self) -> None:
        self._now: Now | None = None
        self._weights: dict[Scope, Tensor | None] = {}

    @property
    def now(self) -> Now:
        assert self._now is not None, "no pass has begun"
        return self._now

    @now.setter
    def now(self, now: Now) -> None:
        self._now, self._weights = now, {}

    def weight(self, scope: Scope, device: torch.device) -> Float[Tensor, "batch seq"] | None:
        """``scope.weight`` of this pass on a device, computed once for all layers. On a CPU ``None`` where it is 0 everywhere; a GPU is
        not asked, since that would stop it."""
        if scope not in self._weights:
            weight = scope.weight(self.now).to(device)
            self._weights[scope] = weight if device.type != "cpu" or bool(weight.any()) else None
        return self._weights[scope]


class History(DynamicLayer):
    """The tokens of each row and their phases, kept as one more layer of the KV cache.

    Whatever is done to the rows of a cache (beams reordered, finished rows dropped, rows repeated, tokens cropped) is done to
    this layer too, so a row never loses its phase. ``keys`` holds token ids, ``values`` phases, both ``[rows, 1, seq, 1]``.
    """


@contextmanager
def track(lm: LM) -> Iterator[Tracker]:
    """Follow the phases of every pass run inside the context, whichever way its rows are batched.

    A pass that fills an empty cache is a prompt: what it says of tags does not count, only how it ends and what it says in the assistant's
    name. A pass without a cache
    is read as a whole sequence, in which everything before the last opening tag is prompt.

    Raises (when the model runs):
        ValueError: the phase cannot be known: a cache that was begun elsewhere, embeddings instead of token ids, or a whole
            sequence of a model whose thinking no tag opens.
    """
    tracker, reached = Tracker(), _reacher(lm)

    def before(ids: Tensor | None, cache: Cache | None) -> None:
        if ids is None:
            raise ValueError("Phases are read off token ids: pass input_ids, not inputs_embeds.")
        seen = _history(cache)
        if seen is None and cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "This KV cache was begun outside the intervention, so the phase of its rows is unknown: "
                "run the prompt inside the same context, or act everywhere (during='all')."
            )
        if seen is not None:
            tracker.now = _further(ids, seen, reached)
        elif cache is not None:
            tracker.now = _prompt(lm, ids)
        else:
            tracker.now = _whole(lm, ids)

    def after(ids: Tensor, cache: Cache | None) -> None:
        if cache is None:
            return
        if (seen := _history(cache)) is None:
            cache.layers.append(seen := History())
        if seen.get_seq_length() < cache.get_seq_length():  # another tracker of the same pass may have been here
            seen.update(ids[:, None, :, None], tracker.now.phase[:, None, :, None])

    with hooks.around_passes(lm.model.base_model, before, after):
        yield tracker


def _history(cache: Cache | None) -> History | None:
    return next((layer for layer in reversed(cache.layers) if isinstance(layer, History)), None) if cache is not None else None


def _prompt(lm: LM, ids: Int[Tensor, "batch seq"]) -> Now:
    """A prompt is prompt; its last position thinks if thinking is open there, and answers if it was closed there."""
    phase = torch.zeros_like(ids)
    phase[:, -1] = torch.tensor([_last_of_prompt(lm, row) for row in ids.tolist()], device=ids.device)
    newest = torch.zeros_like(ids, dtype=torch.bool)
    newest[:, -1] = True
    return Now(phase, None, newest)


def _last_of_prompt(lm: LM, prompt: Sequence[int]) -> int:
    """The phase at the end of a prompt: by a tag that ends it, or by the last tag in the message of the assistant that it continues."""
    tags = lm.tags
    if tags is None or ends_with(lm, prompt, tags.close):
        return ANSWER
    if tags.open is None or ends_with(lm, prompt, tags.open):
        return ANSWER if tags.open is None and find(lm, _said(lm, prompt), tags.close) else THINK
    said = _said(lm, prompt)
    opened, closed = (max((span.start for span in find(lm, said, tag)), default=-1) for tag in (tags.open, tags.close))
    return PROMPT if opened == closed == -1 else THINK if opened > closed else ANSWER


def _said(lm: LM, prompt: Sequence[int]) -> Sequence[int]:
    """What a prompt already says in the assistant's name: the tokens after those that open its last turn."""
    turn, ids = lm.turn, tuple(prompt)
    size = len(turn)
    if not size:
        return ()
    start = next((at for at in range(len(ids) - size, -1, -1) if ids[at] == turn[0] and ids[at : at + size] == turn), None)
    return () if start is None else ids[start + size :]


Reached = Callable[[Tensor, Tensor], Tensor]
"""``(ids before, new ids) -> the phase each new token opens``: PROMPT for all but tags."""


def _reacher(lm: LM) -> Reached:
    """By a table of the vocabulary where each tag is one token: a token decoded costs one look."""
    tags = [(lm.tags.open, THINK), (lm.tags.close, ANSWER)] if lm.tags else []
    single = {phase: lm.token_id(tag) for tag, phase in tags if tag is not None}
    if None in single.values():
        return lambda before, ids: torch.stack([_ends(lm, before, ids, tag) * phase for tag, phase in tags]).amax(dim=0)
    table = torch.zeros(lm.vocab_size, dtype=torch.long)
    for phase, token in single.items():
        table[token] = phase

    def look_up(before: Tensor, ids: Tensor) -> Tensor:
        nonlocal table
        if table.device != ids.device:  # once
            table = table.to(ids.device)
        return table[ids]

    return look_up


def _further(ids: Int[Tensor, "batch seq"], seen: History, reached: Reached) -> Now:
    """Tokens after others: the first opening tag begins thinking, the first closing tag ends it for good."""
    assert seen.keys is not None and seen.values is not None
    before = seen.values[:, 0, :, 0]
    opened = reached(seen.keys[:, 0, -TAIL:, 0], ids)
    if ids.shape[1] > 1:
        opened = opened.cummax(dim=1).values
    return Now(torch.maximum(before[:, -1:], opened), before, None)  # a phase is never left for an earlier one


def _whole(lm: LM, ids: Int[Tensor, "batch seq"]) -> Now:
    """A whole sequence: prompt before its last opening tag."""
    if lm.tags is None or lm.tags.open is None:
        raise ValueError(
            f"No tag opens the thinking of {lm.name}, so in a whole sequence it is unknown where the prompt ends: "
            "use collect.logits (it knows), generate with a cache, or act everywhere (during='all')."
        )
    nothing = ids[:, :0]
    opening = _ends(lm, nothing, ids, lm.tags.open)
    last = opening & (opening.flip(1).cumsum(dim=1).flip(1) == 1)
    opened = last.cummax(dim=1).values
    after = opened | ~opening.any(dim=1, keepdim=True)
    closed = (_ends(lm, nothing, ids, lm.tags.close) & after).cummax(dim=1).values
    phases = torch.where(closed, ANSWER, torch.where(opened, THINK, PROMPT))
    return Now(phases, None, phases > PROMPT)


def _ends(lm: LM, before: Int[Tensor, "batch past"], ids: Int[Tensor, "batch seq"], tag: str | None) -> Bool[Tensor, "batch seq"]:
    """Which of the new tokens end an occurrence of a tag."""
    if tag is None:
        return torch.zeros_like(ids, dtype=torch.bool)
    single = lm.token_id(tag)
    if single is not None:
        return ids == single
    found, past = torch.zeros_like(ids, dtype=torch.bool), before.shape[1]
    for i, row in enumerate(torch.cat([before, ids], dim=1).tolist()):
        for span in find(lm, row, tag):
            if span.stop > past:
                found[i, span.stop - 1 - past] = True
    return found


class Reader:
    """One response, token by token: its phase, the think tokens written so far, and how often a rule has replaced a token."""

    def __init__(self, lm: LM, prompt: Sequence[int]) -> None:
        self.lm, self.tail = lm, list(prompt[-TAIL:])
        self.phase, self.written, self.forced = _last_of_prompt(lm, prompt), 0, 0

    def ends(self, token: int, tag: str | None) -> bool:
        """Whether ``token``, placed next, would end an occurrence of ``tag``."""
        if tag is None:
            return False
        single = self.lm.token_id(tag)
        if single is not None:
            return token == single
        row = [*self.tail, token]
        return any(span.stop == len(row) for span in find(self.lm, row, tag))

    def push(self, token: int) -> None:
        """Place a token."""
        tags = self.lm.tags
        if self.phase != ANSWER and tags is not None and self.ends(token, tags.close):
            self.phase = ANSWER
        elif self.phase == PROMPT and tags is not None and self.ends(token, tags.open):
            self.phase = THINK
        elif self.phase == THINK:
            self.written += 1
        self.tail = [*self.tail[1 - TAIL :], token]
