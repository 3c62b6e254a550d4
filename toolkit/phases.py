"""``Scope``, the positions at which an intervention acts, and ``track``, which computes the phase of every position while a model runs.

The phase of a position is prompt, think or answer. It is computed from token ids: see ``spans``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from toolkit import hooks
from toolkit.lm import LM, NoThinkTagsError
from toolkit.spans import ANSWER, PHASES, PROMPT, TAIL, THINK, find_tag, phase_at_end


@dataclass(frozen=True)
class Scope:
    """Positions of prompt and response at which an intervention acts, and its relative strength (0 to 1) there.

    Each position has a phase: *prompt* until thinking is opened (even in the response), *think* from the opening tag on, *answer* from the
    closing tag on. The last token of a tag is the first position of the new phase. So the position that predicts ``</think>`` is in the
    think phase. The position of ``</think>`` itself, which predicts the first token of the answer, is in the answer phase.

    ``first``, ``until``, ``ramp`` and ``budget`` count think tokens from the start of thinking. They change the strength only in the think
    phase. In the prompt and answer phases, if these are among ``phases``, the intervention acts with full strength.

    Attributes:
        phases: Phases in which the intervention acts: any of ``"prompt"``, ``"think"``, ``"answer"``.
        first: Number of think tokens after which the intervention begins to act.
        until: Number of think tokens after which it stops acting; ``None`` if it does not stop.
        ramp: ``"up"`` if the strength rises from 0 to full over the first ``budget`` think tokens, ``"down"`` if it falls from full to 0.
            After the ramp the strength stays full or 0, respectively. ``None`` means full strength throughout.
        budget: Length of the ramp: number of think tokens over which the strength changes. ``None`` without a ramp.
        newest: True to act only at the prompt's last position and at response tokens, as in arXiv:2506.15647. All earlier positions of the
            prompt are excluded.
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
    def parse(during: str | Scope) -> Scope:
        """Return a scope from its short form; a ``Scope`` is returned unchanged.

        ``"all"`` means every position. ``"newest"`` means the prompt's last position and all response tokens. Any other text lists phases,
        joined by ``+``.

        >>> str(Scope.parse("think+answer"))
        'think+answer'
        """
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
        """True if the intervention acts with full strength at every position, whatever its phase."""
        return self == EVERYWHERE

    def __str__(self) -> str:
        parts = ["+".join(self.phases)]
        parts += [f"from think token {self.first}"] if self.first else []
        parts += [f"until {self.until}"] if self.until is not None else []
        parts += [f"ramp {self.ramp} over {self.budget}"] if self.ramp else []
        return "everywhere" if self.everywhere else ("newest position, " if self.newest else "") + ", ".join(parts)

    def weight(self, now: Now) -> Float[Tensor, "batch seq"]:
        """Return the factor on the intervention's strength at each position of a forward pass.

        The factor is 0 outside the scope and 1 inside; on a ramp it is between 0 and 1.

        Args:
            now: Phases of the positions of this forward pass.
        """
        in_phase = [now.phase == PHASES.index(name) for name in self.phases]
        weight = (in_phase[0] if len(in_phase) == 1 else torch.stack(in_phase).any(dim=0)).float()
        if self.newest and now.newest is not None:
            weight = weight * now.newest
        if self.first or self.until is not None:
            early = now.written < self.first
            outside = early if self.until is None else early | (now.written >= self.until)
            # Only in the think phase: elsewhere the number of think tokens does not matter.
            weight = weight.masked_fill((now.phase == THINK) & outside, 0.0)
        if self.budget is not None:
            share = (now.written / self.budget).clamp(max=1.0)
            weight = torch.where(now.phase == THINK, weight * (share if self.ramp == "up" else 1 - share), weight)
        return weight


EVERYWHERE, THINKING = Scope(), Scope(("think",))


def check_tags(scope: Scope, lm: LM) -> None:
    """Raise NoThinkTagsError if a scope has only think tokens and the model has no think tags: it would never contain a position."""
    if lm.tags is None and {*scope.phases} == {"think"}:
        raise NoThinkTagsError(
            f"{lm.name} has no think tags, so an intervention that acts only while it thinks would never act: load the model with "
            "tags=ThinkTags(...) (--think), or choose other positions, such as during='answer' or 'newest'."
        )


@dataclass(frozen=True)
class Now:
    """The phases of the positions of one forward pass.

    Attributes:
        phase: Phase of each position, ``[batch, seq]``: one of the integers PROMPT, THINK, ANSWER (0, 1, 2).
        earlier: Function that returns the number of think-phase positions in the KV cache, ``[batch, 1]``. It is a function because most
            scopes do not need the number. ``None`` if no tokens are cached.
        newest: Mask for ``Scope.newest``, ``[batch, seq]``: True at the prompt's last position and at response tokens, False in the rest of the prompt.
            ``None`` means True everywhere.
        recordable: True if the pass may be captured, for example as a CUDA graph, and replayed for later tokens (see ``recording``). Code
            that reads this object must then not branch on the values of tensors, because a replay does not run Python again.
    """

    phase: Int[Tensor, "batch seq"]
    earlier: Callable[[], Int[Tensor, "batch 1"]] | None
    newest: Bool[Tensor, "batch seq"] | None
    recordable: bool = False

    @cached_property
    def written(self) -> Int[Tensor, "batch seq"]:
        """Number of think-phase positions before each position, including those in the KV cache.

        At a think token this is the number of think tokens so far, counting that token itself. The reason: the think phase begins one
        position earlier, for example at the opening tag.
        """
        # The cumulative sum includes the position itself, so subtract it.
        thinking = (self.phase == THINK).long()
        earlier = 0 if self.earlier is None else self.earlier()
        return earlier + thinking.cumsum(dim=1) - thinking


class Tracker:
    """Phases of the current forward pass, in the property ``now``. ``track`` makes a tracker and updates it before every pass."""

    def __init__(self) -> None:
        self._now: Now | None = None
        self._weights: dict[tuple[Scope, torch.device], Tensor | None] = {}

    @property
    def now(self) -> Now:
        """Phases of the current forward pass."""
        assert self._now is not None, "no pass has begun"
        return self._now

    @now.setter
    def now(self, now: Now) -> None:
        self._now, self._weights = now, {}  # weights of an earlier pass are dropped

    def weight(self, scope: Scope, device: torch.device) -> Float[Tensor, "batch seq"] | None:
        """Return ``scope.weight`` for the current forward pass, on a device. The result is cached, since every layer needs it.

        If the weight is 0 at every position, return ``None``: the caller can then skip the intervention. This check is done only on a CPU,
        since on a GPU the CPU would have to wait for the GPU. It is not done in a pass that may be captured and replayed
        (``Now.recordable``).

        Args:
            scope: Positions at which the intervention acts.
            device: Device of the returned weight.
        """
        if (key := (scope, device)) not in self._weights:
            weight = scope.weight(self.now).to(device)
            checked = device.type == "cpu" and not self.now.recordable
            self._weights[key] = None if checked and not weight.any() else weight
        return self._weights[key]


class History(DynamicLayer):
    """Additional layer of the KV cache that stores the token ids of each row, and their phases.

    ``keys`` holds the token ids and ``values`` the phases, both ``[rows, 1, seq, 1]``. Because they are a layer of the cache, they change
    with it when rows are reordered, dropped or repeated, and when tokens are cropped.
    """


class RowPhases(DynamicLayer):
    """Additional layer of the KV cache of ``slots.Slots``: the current phase of each row and its number of think-phase positions.

    ``phase`` is the phase of each row's last token, and ``thought`` the row's number of think-phase positions, both ``[rows, 1]``. Both
    are updated in place, so a decoding step can be captured as a CUDA graph and replayed. In ``slots.Slots``, this layer replaces
    ``History``, which stores every token.

    Args:
        lm: The model. Its think tags must be single tokens (``single_tokens``), since text is not searched here.
        rows: Number of rows.
    """

    def __init__(self, lm: LM, rows: int) -> None:
        super().__init__()
        self.phase, self.thought = (torch.zeros(rows, 1, dtype=torch.long, device=lm.device) for _ in range(2))
        self.opened_phases = _phase_lookup(lm)

    def now(self, ids: Int[Tensor, "rows 1"]) -> Now:
        """Return the phases of a forward pass that appends one token to each row. ``ids`` holds the appended tokens."""
        return Now(self._phase(ids), lambda: self.thought, None, recordable=True)

    def advance(self, ids: Int[Tensor, "rows 1"]) -> None:
        """Update ``phase`` and ``thought`` after one token has been appended to each row.

        Args:
            ids: The appended tokens.
        """
        self.phase.copy_(self._phase(ids))
        self.thought += self.phase == THINK

    def _phase(self, ids: Int[Tensor, "rows 1"]) -> Int[Tensor, "rows 1"]:
        return torch.maximum(self.phase, self.opened_phases(ids, ids))

    def begin(self, rows: Int[Tensor, " new"], history: History) -> None:
        """Begin new prompts in some rows: set ``phase`` and ``thought`` of these rows to their values at the end of the prompts.

        Args:
            rows: Index of the row in which each prompt begins.
            history: Tokens of the prompts and their phases, one row per prompt.
        """
        assert history.values is not None
        phases = history.values[:, 0, :, 0]
        self.phase[rows] = phases[:, -1:]
        self.thought[rows] = _thought(phases)

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Replace all rows by a selection of them.

        Args:
            rows: Indices of the selected rows, in their new order.
        """
        self.phase, self.thought = self.phase[rows], self.thought[rows]


def single_tokens(lm: LM) -> bool:
    """Return True if each think tag of the model is a single token, so that a token's id tells whether it starts a phase."""
    return lm.tags is None or all(tag is None or lm.token_id(tag) is not None for tag in (lm.tags.open, lm.tags.close))


def history_of(cache: Cache | None) -> History | None:
    """Return the layer of a KV cache that holds token ids and phases. ``None`` if there is no such layer, or no cache."""
    return next((layer for layer in reversed(cache.layers) if isinstance(layer, History)), None) if cache is not None else None


def _row_phases(cache: Cache | None) -> RowPhases | None:
    return next((layer for layer in reversed(cache.layers) if isinstance(layer, RowPhases)), None) if cache is not None else None


def _thought(phases: Int[Tensor, "batch past"]) -> Int[Tensor, "batch 1"]:
    return (phases == THINK).sum(dim=1, keepdim=True)


@contextmanager
def track(lm: LM) -> Iterator[Tracker]:
    """Return a context manager that tracks the phase (prompt, think or answer) of each position in every forward pass of the model.

    It yields a ``Tracker``, which holds the phases of the current pass. There are three kinds of forward pass:

    - A pass with an empty KV cache is a prompt. All its positions have the phase prompt, except the last one. That has the phase in which
      the response begins: see ``spans.phase_at_end``.
    - A pass with a filled cache continues a response, by one token or by several.
    - A pass without a cache is a whole sequence, prompt and response. Where the prompt ends is unknown, so the tags decide. Everything
      before the last opening tag counts as prompt. If the sequence has only a closing tag, everything before the first one counts as
      prompt, even text that may be thinking.

    Raises (when the model runs):
        hooks.UnknownPastError: the cache was filled before the ``with`` block of this context manager.
        ValueError: embeddings were passed instead of token ids; or a whole sequence was passed, but the model has no opening think tag. The
            phases are then unknown.
    """
    tracker, opened_phases = Tracker(), _phase_lookup(lm)

    def before(ids: Tensor | None, cache: Cache | None) -> None:
        if ids is None:
            raise ValueError("Phases are read off token ids: pass input_ids, not inputs_embeds.")
        if (row_phases := _row_phases(cache)) is not None:
            tracker.now = row_phases.now(ids)
            return
        history = history_of(cache)
        if history is None and cache is not None and cache.get_seq_length() > 0:
            raise hooks.UnknownPastError(
                "This KV cache was begun outside the intervention, so the phase of its rows is unknown: "
                "run the prompt inside the same context, or act everywhere (during='all')."
            )
        if history is not None:
            tracker.now = _further(ids, history, opened_phases)
        elif cache is not None:
            tracker.now = _prompt(lm, ids)
        else:
            tracker.now = _whole(lm, ids)

    def after(ids: Tensor, cache: Cache | None) -> None:
        if cache is None or _row_phases(cache) is not None:  # ``Slots`` advances a ``RowPhases`` itself
            return
        if (history := history_of(cache)) is None:
            cache.layers.append(history := History())
        if history.get_seq_length() < cache.get_seq_length():  # another tracker of the same pass may have updated it already
            history.update(ids[:, None, :, None], tracker.now.phase[:, None, :, None])

    with hooks.around_passes(lm.body, before, after):
        yield tracker


def _prompt(lm: LM, ids: Int[Tensor, "batch seq"]) -> Now:
    """Return the phases of a prompt's positions: PROMPT, except that the last position has the phase in which the response begins."""
    phase = torch.zeros_like(ids)
    phase[:, -1] = torch.tensor([phase_at_end(lm, row) for row in ids.tolist()], device=ids.device)
    newest = torch.zeros_like(ids, dtype=torch.bool)
    newest[:, -1] = True
    return Now(phase, None, newest)


_PhaseLookup = Callable[[Tensor, Tensor], Tensor]
"""A function ``(ids before, new ids) -> the phase that each new token starts``.

This is THINK for the last token of an opening tag and ANSWER for the last token of a closing tag. Any other token starts no phase; its
value is PROMPT. Phases are integers, PROMPT < THINK < ANSWER, and a sequence never returns to a smaller one. So the phase at a token is the
largest value among all tokens up to it.
"""


def _phase_lookup(lm: LM) -> _PhaseLookup:
    """Return the ``_PhaseLookup`` of a model: by token id if each tag is a single token, else by a search in the decoded text."""
    # Without tags, the table below is 0 (PROMPT) everywhere.
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


def _further(ids: Int[Tensor, "batch seq"], history: History, opened_phases: _PhaseLookup) -> Now:
    """Return the phases of tokens that follow cached tokens.

    The first opening tag starts the think phase, the first closing tag the answer phase. After a closing tag, no tag has an effect.

    Args:
        ids: The new tokens.
        history: The cached tokens and their phases.
        opened_phases: The model's ``_PhaseLookup``.
    """
    assert history.keys is not None and history.values is not None
    before = history.values[:, 0, :, 0]
    opened = opened_phases(history.keys[:, 0, -TAIL:, 0], ids)  # a tag may begin in the last cached tokens
    if ids.shape[1] > 1:
        opened = opened.cummax(dim=1).values
    return Now(
        torch.maximum(before[:, -1:], opened), lambda: _thought(before), None
    )  # a phase is never below that of the last cached token


def _whole(lm: LM, ids: Int[Tensor, "batch seq"]) -> Now:
    """Return the phases of whole sequences (prompt and response).

    The last opening tag and the first closing tag after it divide a sequence. Positions are PROMPT before the last token of this opening
    tag, THINK from there on, and ANSWER from the last token of this closing tag on. A sequence without an opening tag has no think phase:
    its positions are PROMPT before the last token of the first closing tag, and ANSWER from there on.

    Raises:
        ValueError: the model has no opening tag.
    """
    if lm.tags is None or lm.tags.open is None:
        raise ValueError(
            f"No tag opens the thinking of {lm.name}, so in a whole sequence it is unknown where the prompt ends: "
            "use collect.logits (it knows), generate with a cache, or act everywhere (during='all')."
        )
    nothing = ids[:, :0]
    opening = _ends(lm, nothing, ids, lm.tags.open)
    # The sum, taken from the right, counts the opening tags that end at a position or later. last: True only at the end of the last opening
    # tag, where this count is 1. opened: True from there on.
    last = opening & (opening.flip(1).cumsum(dim=1).flip(1) == 1)
    opened = last.cummax(dim=1).values
    # A closing tag counts after the last opening tag, or anywhere if there is no opening tag.
    after = opened | ~opening.any(dim=1, keepdim=True)
    closed = (_ends(lm, nothing, ids, lm.tags.close) & after).cummax(dim=1).values
    phases = torch.where(closed, ANSWER, torch.where(opened, THINK, PROMPT))
    return Now(phases, None, phases > PROMPT)


def _ends(lm: LM, before: Int[Tensor, "batch past"], ids: Int[Tensor, "batch seq"], tag: str | None) -> Bool[Tensor, "batch seq"]:
    """Return a mask of the new tokens ``ids``: True at the last token of each tag. The tag may begin in the tokens ``before``."""
    if tag is None:
        return torch.zeros_like(ids, dtype=torch.bool)
    single = lm.token_id(tag)
    if single is not None:
        return ids == single
    ends, past = torch.zeros_like(ids, dtype=torch.bool), before.shape[1]
    for i, row in enumerate(torch.cat([before, ids], dim=1).tolist()):
        for span in find_tag(lm, row, tag):
            if span.stop > past:
                ends[i, span.stop - 1 - past] = True
    return ends
