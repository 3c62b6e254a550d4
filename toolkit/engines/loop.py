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
from jaxtyping import Int
from torch import Tensor

from toolkit.decode import Batch, batches, prefill
from toolkit.engines.base import Request, Response
from toolkit.lm import Condition, FittingSize
from toolkit.sampling import Sampling, Streams, draw
from toolkit.spans import Reader

COMPACT_EVERY = 8  # on a GPU, steps between checks for rows that have ended (a check synchronises); on a CPU every step is checked
COMPACT_BELOW = (
    0.95  # ended rows are removed only if at most this share of the rows is left, since removing them copies the others' cache
)
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

        Args:
            tokens: The drawn tokens, one per row that is still decoded. Returned unchanged if there are no rules.
            alive: Index of each of these rows in the original batch.
        """
        if not self.rules:
            return tokens
        placed = [self._one(token, self.readers[row], self.queues[row]) for token, row in zip(tokens.tolist(), alive, strict=True)]
        return torch.tensor(placed, device=tokens.device)

    def _one(self, token: int, reader: Reader, queue: list[int]) -> int:
        # A rule may place several tokens: they wait in the row's queue, and no rule is called until it is empty.
        if not queue:
            instead = next((tokens for rule in self.rules if (tokens := rule(self.lm, reader, token))), None)
            reader.forced += instead is not None
            queue += instead or [token]
        reader.push(queue[0])
        return queue.pop(0)


def _decode(condition: Condition, rows: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Response]]:
    """Decode one left-padded batch with a KV cache. Yield each response, with the index of its row, when the row leaves the batch.

    A row has two indices, since ended rows leave the batch. Its original index in ``rows`` is used by ``drawn``, ``details`` and the random
    numbers. Its current place in the batch is used by ``logits``, ``tokens``, ``ended`` and the cache. ``alive`` (and ``at``, its copy on
    the device) maps the current place to the original index.
    """
    lm, budget = condition.lm, sampling.max_new_tokens
    rules = _Rules(condition, [row.prompt for row in rows])
    streams = Streams([(row.problem_id, row.sample) for row in rows], sampling.seed)
    cache, logits, mask = prefill(lm, [row.prompt for row in rows])
    batch = Batch(lm, cache, mask, budget)
    eos = torch.tensor(sorted(lm.eos_ids), device=mask.device)

    # Everything drawn stays on the device until its row leaves, so a step needs no synchronisation.
    drawn = torch.zeros(len(rows), budget, dtype=torch.long, device=mask.device)
    details = torch.zeros(2, *drawn.shape, device=mask.device) if sampling.details else None
    ended = torch.zeros(len(rows), dtype=torch.bool, device=mask.device)
    alive = list(range(len(rows)))  # original indices, in the order of the batch
    at = torch.arange(len(rows), device=mask.device)  # the same, on the device
    check_every = COMPACT_EVERY if mask.device.type != "cpu" else 1
    for step in range(budget):
        # 1. Draw one token per row; a rule may place another one.
        choice, scores = draw(logits, streams.at(step, alive, at), sampling)
        tokens = rules(choice, alive)

        # 2. Record the token, and its log-probability and entropy.
        drawn[at, step] = tokens
        if details is not None and scores is not None:
            scores[0] = scores[0].where(tokens == choice, 0.0)  # a token that a rule placed has probability 1, so log-probability 0
            details[:, at, step] = scores

        # 3. Every few steps, check which rows have ended. If enough have, yield them and shrink the batch. Until then they are decoded
        #    further, and _response cuts off the tokens after their end.
        ended = ended | torch.isin(tokens, eos)
        last = step + 1 == budget
        if last or (step + 1) % check_every == 0:
            left = [i for i, e in zip(range(len(alive)), ended.tolist(), strict=True) if not e]
            if last or not left or len(left) <= COMPACT_BELOW * len(alive):
                gone = range(len(alive)) if last else sorted({*range(len(alive))} - {*left})
                yield from (_response(alive[i], drawn, details, step + 1, lm.eos_ids) for i in gone)
                if last or not left:
                    return
                left = batch.keep(left)  # the batch may reorder its rows
                index = torch.tensor(left, device=mask.device)
                tokens, ended, at = tokens[index], ended[index], at[index]
                alive = [alive[i] for i in left]

        # 4. Feed the tokens to the model; its logits are those of the next step.
        with batch.acting():
            logits = batch.step(tokens)


def _response(row: int, drawn: Tensor, details: Tensor | None, steps: int, eos_ids: frozenset[int]) -> tuple[int, Response]:
    """Return the index of a row and its response: its tokens up to and including the first end-of-sequence token, with their details.

    Args:
        row: Original index of the row.
        drawn: Tokens of all rows, ``[rows, steps]``.
        details: Log-probabilities and entropies, ``[2, rows, steps]``, or ``None``.
        steps: Number of decoding steps so far.
        eos_ids: Token ids that end a response.
    """
    tokens = drawn[row, :steps].tolist()
    ends = [i for i, token in enumerate(tokens) if token in eos_ids]
    stop = ends[0] + 1 if ends else steps
    scores = details[:, row, :stop].tolist() if details is not None else (None, None)
    return row, Response(tokens[:stop], "stop" if ends else "length", *scores)
