"""The toolkit's own sampling loop. It supports every part of a condition: interventions, decoding rules, masks, tools.

Samples of one problem share one prefill. There are two ways to decode:

- In *batches* (``decode.Batch``): responses begin together, those that have ended leave, and the next batch begins when all have ended.
  This works for every model and condition.
- In *slots* (``slots.Slots``): a new response takes the place of one that has ended. On a GPU, a decoding step is captured as a CUDA graph
  and replayed. Slots are the default on a GPU, if model and condition allow them (``slots.obstacle``). Not tested on a GPU. On a CPU,
  batches are at least as fast, because the time of a step grows with the number of its rows.

Responses are handed on, to be stored, when their batch has ended; in slots, when there is one for every slot or ``HAND_ON`` seconds have
passed. Those that have ended are also handed on if the run is stopped by an error or Ctrl-C, or if memory runs out: then only the others are
sampled again, fewer together.

**Reproducibility.** Each response has its own random numbers, which do not depend on the other responses (see ``sampling``). So responses
that are decoded together can change each other only by rounding: kernels for matrix products and attention sum in an order that depends on
the shape of the batch. On a CPU in fp32, sampled tokens were equal in every test, and log-probabilities agreed to about 1e-5. On a GPU,
above all in bf16, rounding is coarser. After some hundreds of tokens, a response may get a different token and differ from there on. How
often this happens is not measured yet.

In some models, rotary frequencies depend on the longest row (``LM.frequency_limit``). There, rows on both sides of the limit do not share a
batch, and a response that may grow beyond the limit is refused.

``OwnLoop(fixed=(rows, width))`` avoids this. It decodes in slots, and every step has the shape ``(rows, width)``, whatever the number and
length of the responses. Each prompt is run alone. A response then depends on others only if a kernel's result for one row depends on the
numbers in other rows. Kernels that choose their algorithm by shape alone have no such dependence. PyTorch's deterministic algorithms would
not suffice: with them, the same batch gives the same result twice, but a row may still differ between two batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from toolkit.decode import Batch, batches, check_growth, prefill
from toolkit.engines import refill
from toolkit.engines.base import EngineError, Request, Response
from toolkit.engines.calls import check_tools
from toolkit.engines.responses import Rules, Written
from toolkit.lm import Condition
from toolkit.memory import FittingSize, out_of_memory, release
from toolkit.recording import recorder_for
from toolkit.sampling import Sampling, Streams, draw
from toolkit.slots import Slots, obstacle
from toolkit.tensors import upload

CHECK_EVERY = refill.CHECK_EVERY
# Ended rows are removed only if at most this share of the rows is left, since removing them copies the others' cache.
COMPACT_BELOW = 0.95
PREFILL_TOKENS = refill.PREFILL_TOKENS
HAND_ON = 15.0  # seconds after which responses that have ended are handed on to be stored, even if there are few


@dataclass(frozen=True)
class OwnLoop:
    """The engine that decodes in this process, with the model of the condition. With default arguments it supports every condition.

    Attributes:
        in_slots: True to decode in slots, False to decode in batches (see the module ``loop``). ``None`` means slots on a GPU, if model and
            condition allow them, and batches otherwise.
        fixed: Pair ``(rows, width)`` to decode in slots of this shape. A response then does not depend on number and length of the others,
            but decoding is slower. ``rows`` is the number of slots, ``width`` the largest number of tokens of prompt and response together.
            ``None``: no fixed shape.
    """

    in_slots: bool | None = None
    fixed: tuple[int, int] | None = None
    name: ClassVar[str] = "the toolkit's own loop"
    takes_adapters: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.fixed and (self.in_slots is False or min(self.fixed) < 1):
            raise EngineError(
                f"fixed={self.fixed}, in_slots={self.in_slots}: a fixed shape needs slots, and two numbers of at least 1."
            )

    @property
    def header(self) -> Mapping[str, str]:
        """``{"shape": "64 x 2048"}`` for the fixed shape (64, 2048); ``{}`` without a fixed shape.

        Sampling resumes only into a directory of rollouts with the same header. So a directory never mixes rollouts of two shapes.
        """
        return {"shape": f"{self.fixed[0]} x {self.fixed[1]}"} if self.fixed else {}

    def check(self, condition: Condition, sampling: Sampling) -> None:
        """Check that the condition can be decoded with ``in_slots`` and ``fixed``. If both are ``None``, every condition passes.

        Raises:
            EngineError: ``in_slots`` is True or ``fixed`` is set, but the model or the condition does not allow slots; or a mark of the
                tools is a think tag.
        """
        if condition.tools:
            check_tools(condition.lm, condition.tools)
        if (self.in_slots or self.fixed) and (why := obstacle(condition)) is not None:
            raise EngineError(
                f"{condition.lm.name} cannot be decoded in slots: {why}. Leave out in_slots and fixed to decode it in batches."
            )

    def check_edits(self) -> None:
        """Do nothing, because the loop can sample from edited and trained models."""

    def session(self, condition: Condition, requests: Sequence[Request], sampling: Sampling) -> _Session:
        """Return a session that samples responses from the condition, in slots or in batches.

        Raises:
            EngineError: as in ``check``; or a prompt and ``sampling.max_new_tokens`` do not fit into the fixed width.
            UnsupportedModelError: a response may grow beyond the length at which the model's rotary frequencies change
                (``LM.frequency_limit``).
        """
        self.check(condition, sampling)
        check_growth(
            condition.lm,
            {(len(request.prompt), len(request.prompt) + sampling.max_new_tokens) for request in requests},
            "Lower max_new_tokens, so that prompt and response have at most {limit} tokens, or let a server sample (--engine).",
        )
        self._check_fits(requests, sampling)
        default = self.in_slots is None and condition.lm.device.type == "cuda" and obstacle(condition) is None
        if self.in_slots or self.fixed or default:
            return _SlotSession(condition, sampling, self.fixed)
        return _Session(condition, sampling)

    def _check_fits(self, requests: Sequence[Request], sampling: Sampling) -> None:
        longest = max((len(request.prompt) for request in requests), default=0) + sampling.max_new_tokens
        if self.fixed and longest > self.fixed[1]:
            raise EngineError(
                f"The longest prompt and max_new_tokens={sampling.max_new_tokens} take {longest} tokens, the fixed width is {self.fixed[1]}: "
                f"give fixed=({self.fixed[0]}, {longest}) or more."
            )


@dataclass(frozen=True)
class _Session:
    condition: Condition
    sampling: Sampling

    @property
    def serves(self) -> str:
        return self.condition.lm.fingerprint

    def sample(self, requests: Sequence[Request], tick: Callable[[int], Any]) -> Iterator[list[tuple[int, Response]]]:
        # Prompts of similar length share a batch; the samples of one problem stay together.
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt), requests[i].problem_id, i))

        done: dict[int, Response] = {}  # of the current batch

        def run(batch: Sequence[int]) -> None:
            # If memory ran out before, some of these rows had ended: their responses are kept.
            left = [i for i in batch if i not in done]
            with self.condition.active(), torch.inference_mode():
                for row, response in _decode(self.condition, [requests[i] for i in left], self.sampling) if left else ():
                    done[left[row]] = response
                    tick(1)

        fitting = FittingSize()
        for batch in batches(
            order,
            lambda i: len(requests[i].prompt),
            PREFILL_TOKENS,
            most=self.sampling.batch_size,
            shared=lambda i: tuple(requests[i].prompt),
            limit=self.condition.lm.frequency_limit,
        ):
            try:
                fitting.run(batch, run)
            except BaseException:  # such as Ctrl-C: responses that have ended are handed on before the run stops
                if done:
                    yield list(done.items())
                raise
            yield list(done.items())
            done.clear()


OWN_LOOP = OwnLoop()


@dataclass(frozen=True)
class _SlotSession(_Session):
    """Session that decodes in slots. ``OwnLoop`` describes ``fixed``."""

    fixed: tuple[int, int] | None = None

    def sample(self, requests: Sequence[Request], tick: Callable[[int], Any]) -> Iterator[list[tuple[int, Response]]]:
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt), requests[i].problem_id, i))
        rows = self.sampling.batch_size
        while order:
            done: set[int] = set()
            rows = min(rows, len(order))
            for part in self._until_full([(i, requests[i]) for i in order], rows, tick):
                done.update(i for i, _ in part)
                yield part
            order = [i for i in order if i not in done]
            if order:  # memory ran out
                rows = max(1, rows // 2)
                release()  # the old slots and their layers refer to each other

    def _until_full(
        self, numbered: Sequence[tuple[int, Request]], rows: int, tick: Callable[[int], Any]
    ) -> Iterator[list[tuple[int, Response]]]:
        """Yield lists of pairs ``(index, response)`` until all requests are done or memory runs out. A list has at most one pair per slot.

        A list is yielded when it has that many pairs, when a response ends ``HAND_ON`` seconds or more after the last list, and before an
        error or Ctrl-C is passed on.

        Args:
            numbered: Pairs ``(index, request)``; the index is returned with the response.
            rows: Number of slots. Ignored if the shape is fixed.
        """
        requests = [request for _, request in numbered]
        width = max(len(request.prompt) for request in requests) + 1
        shape = self.fixed or (rows, width)
        slots = Slots(self.condition.lm, *shape, grows=self.fixed is None, record=recorder_for(self.condition.lm.device))
        stream = refill.decode(self.condition, requests, self.sampling, slots)
        full, stop = True, None
        while full:
            done: list[tuple[int, Response]] = []
            since = time.monotonic()
            # While the caller works with the responses, the interventions must not be active. So the context is left before each yield, and
            # captured steps (CUDA graphs), which belong to it, are dropped.
            with self.condition.active(), torch.inference_mode():
                try:
                    full = False
                    for row, response in stream:
                        done.append((numbered[row][0], response))
                        tick(1)
                        if full := len(done) == shape[0] or time.monotonic() - since >= HAND_ON:
                            break
                except BaseException as error:  # noqa: BLE001  # raised again below, after the responses that have ended are handed on
                    full = False
                    if rows == 1 or self.fixed or not out_of_memory(error):
                        stop = error
                finally:
                    slots.forget()
            if done:
                yield done
            if stop is not None:
                raise stop


def _decode(condition: Condition, rows: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Response]]:
    """Decode one left-padded batch with a KV cache. Yield ``(index in rows, response)`` after each response has ended.

    A row has two indices, since ended rows leave the batch. Its original index in ``rows`` is used by ``written``, ``rules`` and the random
    numbers. Its current place in the batch is used by ``logits``, ``tokens`` and the cache. ``alive`` (and ``at``, its copy on the device)
    maps the current place to the original index.
    """
    lm, budget = condition.lm, sampling.max_new_tokens
    rules = Rules(condition, [row.prompt for row in rows], budget)
    written = Written(len(rows), lm.eos_ids, sampling)
    streams = Streams([(row.problem_id, row.sample) for row in rows], sampling.seed)
    cache, logits, mask = prefill(lm, [row.prompt for row in rows])
    batch = Batch(lm, cache, mask, budget)
    eos = torch.tensor(sorted(lm.eos_ids))

    alive = list(range(len(rows)))  # original indices, in the order of the batch
    at = torch.arange(len(rows), device=mask.device)  # the same, on the device
    for step in range(budget):
        # 1. Draw one token per row; a rule may place another one.
        choice, details = draw(logits, streams.at(step, alive, at), sampling)
        tokens, placed = rules(choice, alive)
        if details is not None and placed is not None:
            details[0].masked_fill_(placed, 0.0)  # a token that a rule placed has probability 1, so log-probability 0
        written.put(tokens, details)

        # 2. Look which rows have ended: on a CPU at every step, elsewhere every few steps. Yield them. If they are enough, shrink the batch.
        #    Until then they are decoded further, and ``written`` ignores the tokens after their end.
        last = step + 1 == budget
        on_cpu = tokens.device.type == "cpu"
        if last or (torch.isin(tokens, eos).any() if on_cpu else (step + 1) % CHECK_EVERY == 0):
            yield from rules.finished(written.take(alive))
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
