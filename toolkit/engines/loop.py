"""The toolkit's own sampling loop: every part of a condition acts in it (interventions, decoding rules, masks).

Samples of one problem share one prefill. Responses that have ended leave the batch. A response does not depend on the other responses in
its batch: ``sampling.py`` explains how tokens are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toolkit.decode import Batch, batches, prefill
from toolkit.engines.base import Request, Response
from toolkit.lm import Condition, FittingSize
from toolkit.sampling import Sampling, Streams, draw
from toolkit.spans import Reader
from toolkit.tensors import upload

CHECK_EVERY = (
    8  # on a GPU, steps between checks for rows that have ended (a check waits for the GPU); on a CPU every step is checked
)
# Ended rows are removed only if at most this share of the rows is left, since removing them copies the others' cache.
COMPACT_BELOW = 0.95
PREFILL_TOKENS = 16384  # largest number of padded tokens of distinct prompts per batch, which are run at once


class OwnLoop:
    """The engine that decodes in this process, with the model of the condition. It can sample every condition."""

    name = "the toolkit's own loop"
    header: Mapping[str, str] = MappingProxyType({})

    def check(self, condition: Condition, sampling: Sampling) -> None:
        """Do nothing: every condition can be sampled."""

    def session(self, condition: Condition, requests: Sequence[Request], sampling: Sampling) -> _Session:
        """Return a session; nothing has to be checked or prepared."""
        return _Session(condition, sampling)


@dataclass(frozen=True)
class _Session:
    condition: Condition
    sampling: Sampling

    def sample(self, requests: Sequence[Request], tick: Callable[[int], Any]) -> Iterator[list[tuple[int, Response]]]:
        # Prompts of similar length share a batch; the samples of one problem stay together.
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt), requests[i].problem_id, i))

        def run(batch: Sequence[int]) -> None:
            with self.condition.active(), torch.inference_mode():
                drawn = list(_decode(self.condition, [requests[i] for i in batch], self.sampling))
            done.append([(batch[row], response) for row, response in drawn])
            tick(len(batch))

        fitting = FittingSize()
        for batch in batches(
            order,
            lambda i: len(requests[i].prompt),
            PREFILL_TOKENS,
            most=self.sampling.batch_size,
            shared=lambda i: tuple(requests[i].prompt),
        ):
            done: list[list[tuple[int, Response]]] = []
            fitting.run(batch, run)
            yield from done


OWN_LOOP = OwnLoop()


class _Rules:
    """Applies the decoding rules of a condition to one batch. A rule may replace a drawn token by one or more other tokens.

    If there are rules, every row of the batch has a reader and a queue. The reader (``spans.Reader``) knows the phase of the row's response
    (prompt, think or answer). The queue holds tokens that a rule has returned and that are still to be placed.
    """

    def __init__(self, condition: Condition, prompts: Sequence[list[int]]) -> None:
        self.lm, self.rules = condition.lm, condition.rules
        self.readers = [Reader(self.lm, prompt) for prompt in prompts] if self.rules else []
        self.queues: list[list[int]] = [[] for _ in self.readers]

    def __call__(self, tokens: Int[Tensor, " rows"], alive: Sequence[int]) -> Int[Tensor, " rows"]:
        """Return one token per row to append to its response: the drawn token, or one that a rule has put in its place.

        Rules run on the CPU, so with rules every step waits for the device.

        Args:
            tokens: The drawn tokens, one per row that is still decoded. Returned unchanged if no rule replaces one.
            alive: Index of each of these rows in the original batch.
        """
        if not self.rules:
            return tokens
        drawn = tokens.tolist()
        placed = [self._one(token, self.readers[row], self.queues[row]) for token, row in zip(drawn, alive, strict=True)]
        return tokens if placed == drawn else upload(torch.tensor(placed), tokens.device)

    def _one(self, token: int, reader: Reader, queue: list[int]) -> int:
        # A rule may place several tokens: they wait in the row's queue, and no rule is called until it is empty.
        if not queue:
            instead = next((tokens for rule in self.rules if (tokens := rule(self.lm, reader, token))), None)
            reader.forced += instead is not None
            queue += instead or [token]
        reader.push(queue[0])
        return queue.pop(0)


class _Written:
    """The responses of a batch so far, on the CPU.

    Steps stay on the device (``put``) until ``take`` copies all of them at once, because each copy from a GPU waits for the GPU.

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
        """Append one token to each row that is still decoded, with its log-probability and entropy, if they are recorded."""
        self.steps.append(tokens[None].int() if details is None else torch.cat([tokens[None].int(), details.view(torch.int32)]))

    def take(self, alive: Sequence[int]) -> Iterator[tuple[int, Response]]:
        """Copy the steps from the device, and yield the index and the response of each row that has ended since the last call.

        A row ends at its first end-of-sequence token, or when it has as many tokens as allowed. Tokens after the end are ignored.

        Args:
            alive: Index of each row, in the order of the tokens that were put since the last call.
        """
        taken = torch.stack(self.steps, dim=-1).cpu()  # [1 or 3, rows, steps]
        self.steps.clear()
        details = taken[1:].view(torch.float32).tolist() if self.details else None
        for place, (row, new) in enumerate(zip(alive, taken[0].tolist(), strict=True)):
            if row in self.over:
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


def _decode(condition: Condition, rows: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Response]]:
    """Decode one left-padded batch with a KV cache. Yield each response, with the index of its row, when it has ended.

    A row has two indices, since ended rows leave the batch. Its original index in ``rows`` is used by ``written``, ``rules`` and the random
    numbers. Its current place in the batch is used by ``logits``, ``tokens`` and the cache. ``alive`` (and ``at``, its copy on the device)
    maps the current place to the original index.
    """
    lm, budget = condition.lm, sampling.max_new_tokens
    rules = _Rules(condition, [row.prompt for row in rows])
    written = _Written(len(rows), lm.eos_ids, sampling)
    streams = Streams([(row.problem_id, row.sample) for row in rows], sampling.seed)
    cache, logits, mask = prefill(lm, [row.prompt for row in rows])
    batch = Batch(lm, cache, mask, budget)
    eos = torch.tensor(sorted(lm.eos_ids))

    alive = list(range(len(rows)))  # original indices, in the order of the batch
    at = torch.arange(len(rows), device=mask.device)  # the same, on the device
    for step in range(budget):
        # 1. Draw one token per row; a rule may place another one.
        choice, details = draw(logits, streams.at(step, alive, at), sampling)
        tokens = rules(choice, alive)
        if details is not None:
            details[0] = details[0].where(
                tokens == choice, 0.0
            )  # a token that a rule placed has probability 1, so log-probability 0
        written.put(tokens, details)

        # 2. Look which rows have ended: on a CPU at every step, elsewhere every few steps. Yield them. If they are enough, shrink the batch.
        #    Until then they are decoded further, and ``written`` ignores the tokens after their end.
        last = step + 1 == budget
        on_cpu = tokens.device.type == "cpu"
        if last or (torch.isin(tokens, eos).any() if on_cpu else (step + 1) % CHECK_EVERY == 0):
            yield from written.take(alive)
            left = [place for place, row in enumerate(alive) if row not in written.over]
            if not left:
                return
            if len(left) <= COMPACT_BELOW * len(alive):
                left = batch.keep(left)  # the batch may reorder its rows
                index = upload(torch.tensor(left), tokens.device)
                tokens, at = tokens[index], at[index]
                alive = [alive[i] for i in left]

        # 3. Feed the tokens to the model; its logits are those of the next step.
        with batch.acting():
            logits = batch.step(tokens)
