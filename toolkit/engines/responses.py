"""Drawn tokens in the toolkit's own loop.

``Rules`` applies decoding rules to them and answers tool calls. ``Written`` collects them into responses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from toolkit.engines.base import Response
from toolkit.engines.calls import Calls
from toolkit.lm import Condition
from toolkit.sampling import Sampling
from toolkit.spans import Reader
from toolkit.tensors import upload


class Rules:
    """Applies the decoding rules of a condition, and answers its tool calls. Both replace drawn tokens by other tokens.

    If there are rules or tools, every row (response) has a reader and a queue. The reader (``spans.Reader``) tracks the phase of the row's
    newest token (prompt, think or answer). The queue holds tokens that a rule or a tool has returned and that are not appended to the
    response yet. The reader does not get the tokens of tool results: they are not thinking, and cannot open or close it.
    """

    def __init__(self, condition: Condition, prompts: Sequence[list[int]], budget: int) -> None:
        self.lm, self.rules, tools = condition.lm, condition.rules, condition.tools
        self.readers = [Reader(self.lm, prompt) for prompt in prompts] if self.rules or tools else []
        self.queues: list[list[int]] = [[] for _ in self.readers]
        self.calls = [Calls(self.lm, tools, budget) for _ in prompts] if tools else []

    def __call__(
        self, tokens: Int[Tensor, " rows"], alive: Sequence[int | None]
    ) -> tuple[Int[Tensor, " rows"], Bool[Tensor, " rows"] | None]:
        """Return one token per row to append to its response: the drawn token, or one that a rule or a tool has put in its place.

        Rules and tools run on the CPU. So if there are any, each step on a GPU waits until its tokens are copied to the CPU.

        Args:
            tokens: The drawn tokens. Returned unchanged if none is replaced.
            alive: For each token, the index of its row among the prompts, or ``None`` for a token that belongs to no row.

        Returns:
            A pair: the tokens, and a mask that is True for those that a rule or a tool has placed, even if they equal the drawn ones. The
            mask is ``None`` if there are no such tokens.
        """
        if not self.readers:
            return tokens, None
        pairs = [
            (token, False) if row is None else self._one(token, row) for token, row in zip(tokens.tolist(), alive, strict=True)
        ]
        if not any(placed for _, placed in pairs):
            return tokens, None
        chosen, placed = upload(torch.tensor(pairs).T.contiguous(), tokens.device)  # one copy of both
        return chosen, placed.bool()

    def _one(self, token: int, row: int) -> tuple[int, bool]:
        """Return the next token of a row, and True if a rule or a tool has placed it."""
        reader, queue = self.readers[row], self.queues[row]
        placed = bool(queue)
        # A rule may place several tokens: they wait in the row's queue, and no rule is called until it is empty.
        if not queue:
            instead = next((tokens for rule in self.rules if (tokens := rule(self.lm, reader, token))), None)
            placed = instead is not None
            reader.forced += placed
            queue += instead or [token]
        token = queue.pop(0)
        if self.calls and self.calls[row].placing():
            return token, True
        if self.calls:
            queue[:0] = self.calls[row].after(token, reader)
        reader.push(token)
        return token, placed

    def finished(self, responses: Iterable[tuple[int, Response]]) -> Iterator[tuple[int, Response]]:
        """Yield pairs (row, complete response), with the tool results of each response.

        Args:
            responses: Pairs (row, all tokens that were decoded), from ``Written.take``.
        """
        for row, response in responses:
            yield row, self.calls[row].finished(response) if self.calls else response


class Written:
    """The responses so far, one per row.

    ``put`` stores the tokens of each step on the device. ``take`` copies all stored steps to the CPU at once, because each copy from a GPU
    waits for the GPU.

    Attributes:
        over: Indices of the rows that have ended.
    """

    def __init__(self, rows: int, eos_ids: frozenset[int], sampling: Sampling) -> None:
        self.eos_ids, self.budget, self.details = eos_ids, sampling.max_new_tokens, sampling.details
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.scores: list[tuple[list[float], list[float]]] = [([], []) for _ in range(rows)]
        self.steps: list[Tensor] = []  # not taken yet: [1, rows] tokens, or [3, rows] with the bits of their details, as int32
        self.over: set[int] = set()

    def put(self, tokens: Int[Tensor, " rows"], details: Float[Tensor, "2 rows"] | None) -> None:
        """Store one step.

        Args:
            tokens: One token per row of the batch.
            details: Log-probability and entropy of each token; ``None`` if they are not wanted.
        """
        self.steps.append(tokens[None].int() if details is None else torch.cat([tokens[None].int(), details.view(torch.int32)]))

    def take(self, alive: Sequence[int | None]) -> Iterator[tuple[int, Response]]:
        """Copy the steps from the device, and yield the index and the response of each row that has ended since the last call.

        A row ends at its first end-of-sequence token or at the token limit. Tokens after the end are ignored.

        Args:
            alive: For each place in the stored steps, the index of its row, or ``None`` if it holds no row.
        """
        taken = torch.stack(self.steps, dim=-1).cpu()  # [1 or 3, rows, steps]
        self.steps.clear()
        details = taken[1:].view(torch.float32).tolist() if self.details else None
        for place, (row, new) in enumerate(zip(alive, taken[0].tolist(), strict=True)):
            if row is None or row in self.over:
                continue
            new = new[: self.budget - len(self.tokens[row])]
            if not self.eos_ids.isdisjoint(new):
                new = new[: next(i for i, token in enumerate(new) if token in self.eos_ids) + 1]
            self.tokens[row] += new
            if details is not None:
                for kept, values in zip(self.scores[row], details, strict=True):
                    kept += values[place][: len(new)]
            if new[-1] in self.eos_ids or len(self.tokens[row]) == self.budget:
                self.over.add(row)
                yield row, self._response(row)

    def _response(self, row: int) -> Response:
        tokens = self.tokens[row]
        scores = self.scores[row] if self.details else (None, None)
        return Response(tokens, "stop" if tokens[-1] in self.eos_ids else "length", *scores)
