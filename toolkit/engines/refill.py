"""Decode responses in slots (``slots.Slots``). When a response ends, the next one takes its slot while the others are decoded further."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count, groupby

import torch
from torch import Tensor

from toolkit.decode import batches
from toolkit.engines.base import Request, Response
from toolkit.engines.responses import Rules, Written
from toolkit.lm import Condition
from toolkit.sampling import Sampling, Streams, draw
from toolkit.slots import Slots
from toolkit.tensors import upload

CHECK_EVERY = (
    8  # on a GPU, steps between checks for rows that have ended (a check waits for the GPU); on a CPU every step is checked
)
PREFILL_TOKENS = 16384  # largest number of padded tokens of distinct prompts that are run at once
# Prompts join only when this share of the slots is empty: running one prompt takes about as long as running many.
JOIN_FROM = 1 / 8


def decode(condition: Condition, requests: Sequence[Request], sampling: Sampling, slots: Slots) -> Iterator[tuple[int, Response]]:
    """Decode responses in slots. Yield ``(index in requests, response)`` soon after each response has ended.

    Iterate over this generator inside ``with condition.active()``. The context may be left and entered again between two responses.

    Args:
        condition: The condition from which responses are sampled.
        requests: The responses to sample, in the order in which they get a slot.
        sampling: Sampling settings.
        slots: Empty slots of the condition's model.
    """
    flow = _Flow(condition, requests, sampling, slots)
    logits: Tensor | None = None
    for step in count():
        if flow.may_join():
            logits = flow.join(step, logits)
        assert logits is not None
        tokens, due = flow.draw(step, logits)
        if due:
            yield from flow.take()
            if not flow.waiting and not any(slots.lengths):
                return
            tokens = flow.shrink(tokens)
        logits = slots.step(tokens)


class _Flow:
    """The rows (responses) in the slots, and those that wait for a slot.

    Attributes:
        held: For each slot, the index in ``requests`` of its row, or ``None``. A row that has reached the token limit leaves its slot at
            once, but its index stays here until ``take`` has yielded its response.
        columns: For each slot, the index of its random numbers in ``streams``, which has one generator (a *column*) per slot. (``at``
            holds the same indices as a tensor on the device.) A slot keeps its column when other slots are removed.
        waiting: Indices in ``requests`` of the rows that have no slot yet.
    """

    def __init__(self, condition: Condition, requests: Sequence[Request], sampling: Sampling, slots: Slots) -> None:
        self.lm, self.requests, self.sampling, self.slots = condition.lm, requests, sampling, slots
        self.rules = Rules(condition, [request.prompt for request in requests], sampling.max_new_tokens)
        self.written = Written(len(requests), self.lm.eos_ids, sampling)
        self.columns = list(range(len(slots.lengths)))
        self.at = torch.arange(len(self.columns), device=self.lm.device)
        self.streams = Streams([None] * len(self.columns), sampling.seed)
        self.held: list[int | None] = [None] * len(self.columns)
        self.waiting = deque(range(len(requests)))
        self.eos = torch.tensor(sorted(self.lm.eos_ids))

    def may_join(self) -> bool:
        """Return True if rows wait, enough slots are empty, and ``take`` has been called since the last ``draw``.

        Enough is a share ``JOIN_FROM`` of all slots, or one slot per waiting row.
        """
        if not self.waiting or self.written.steps:
            return False
        empty = len(self.slots.empty)
        return empty > 0 and empty >= min(len(self.waiting), JOIN_FROM * len(self.held))

    def join(self, step: int, logits: Tensor | None) -> Tensor:
        """Put waiting rows into empty slots. Return the logits of all slots, including those for the first tokens of the new rows.

        Args:
            step: Index of the step at which the new rows' first tokens are drawn.
            logits: Logits of all slots; ``None`` before the first rows. The new rows' logits are written into this tensor.
        """
        free = deque(self.slots.empty)
        new = [self.waiting.popleft() for _ in range(min(len(free), len(self.waiting)))]
        for rows in self._together(new):
            places = [free.popleft() for _ in rows]
            first = self.slots.join(places, [self.requests[row].prompt for row in rows])
            if logits is None:
                logits = first.new_zeros(len(self.held), first.shape[-1])
            logits.index_copy_(0, upload(torch.tensor(places), logits.device), first)
            keys = [(self.requests[row].problem_id, self.requests[row].sample) for row in rows]
            self.streams.begin(step, [self.columns[place] for place in places], keys)
            for place, row in zip(places, rows, strict=True):
                self.held[place] = row
        assert logits is not None
        return logits

    def _together(self, new: Sequence[int]) -> list[list[int]]:
        """Split new rows into lists; the prompts of a list are run together. In slots of a fixed shape, a list has equal prompts only."""

        def prompt(row: int) -> tuple[int, ...]:
            return tuple(self.requests[row].prompt)

        if not self.slots.grows:
            return [list(rows) for _, rows in groupby(new, prompt)]
        return batches(new, lambda row: len(prompt(row)), PREFILL_TOKENS, shared=prompt)

    def draw(self, step: int, logits: Tensor) -> tuple[Tensor, bool]:
        """Draw one token per slot and store it in ``written``. Return the tokens, and True if ``take`` must be called now, else False."""
        uniform = self.streams.at(step, [c for c, row in zip(self.columns, self.held, strict=True) if row is not None], self.at)
        choice, details = draw(logits, uniform, self.sampling)
        tokens, placed = self.rules(choice, self.held)
        if details is not None and placed is not None:
            details[0].masked_fill_(placed, 0.0)  # a token that a rule placed has probability 1, so log-probability 0
        self.written.put(tokens, details)
        # Rows that have all their tokens now leave at once: their next positions may not exist.
        full = [
            slot
            for slot, (row, length) in enumerate(zip(self.held, self.slots.lengths, strict=True))
            if row is not None and length and length + 1 == len(self.requests[row].prompt) + self.sampling.max_new_tokens
        ]
        if full:
            self.slots.leave(full)
        if tokens.device.type == "cpu":
            return tokens, bool(full) or bool(torch.isin(tokens, self.eos).any())
        return tokens, not any(self.slots.lengths) or (step + 1) % CHECK_EVERY == 0

    def take(self) -> Iterator[tuple[int, Response]]:
        """Empty the slots of the rows that have ended. Then yield ``(index in requests, response)`` of each of these rows."""
        ended = list(self.rules.finished(self.written.take(self.held)))
        over = [slot for slot, row in enumerate(self.held) if row is not None and row in self.written.over]
        if leaving := [slot for slot in over if self.slots.lengths[slot]]:
            self.slots.leave(leaving)
        for slot in over:
            self.held[slot] = None
        yield from ended

    def shrink(self, tokens: Tensor) -> Tensor:
        """Remove slots and columns that are not needed. Return the tokens of the slots that remain.

        Half of the slots are removed if at least half are empty and no row waits. Columns are removed if at most half are needed.
        """
        slots = self.slots
        if not slots.grows or not any(slots.lengths):
            return tokens
        live = [slot for slot, length in enumerate(slots.lengths) if length]
        fewer = not self.waiting and 2 * len(live) <= len(self.held)
        if not fewer and not slots.spacious:
            return tokens
        left = [*live, *slots.empty][: len(self.held) // 2] if fewer else list(range(len(self.held)))
        slots.select(left)
        self.held, self.columns = [self.held[slot] for slot in left], [self.columns[slot] for slot in left]
        index = upload(torch.tensor(left), tokens.device)
        self.at = self.at[index]
        return tokens[index]
