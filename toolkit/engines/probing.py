"""Checks of a condition for engines other than the toolkit's own loop: does the engine serve its weights, and support its other parts?

For the first check, the server samples a few tokens after some of the prompts and reports their log-probabilities (``probe``). The toolkit
computes the log-probabilities of the same tokens with the condition's model. If the server serves that model, the two agree up to the
rounding of the server's dtype.

``complete`` turns a server's response into a ``Response`` of the toolkit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit.engines.base import CannotSampleError, EngineError, Request, Response
from toolkit.engines.client import Client
from toolkit.engines.wire import Sampled, Served, Wire
from toolkit.identity import describe_tools
from toolkit.lm import LM, Condition
from toolkit.sampling import Sampling

PROMPTS = 4  # prompts that are tried
NEAR = 0.25  # an edit is recognised if the share of it that the server shows differs from 1 by at most this number
Verdict = Literal["served", "other", "unseen"]
PROBE = Sampling(max_new_tokens=32)


@dataclass(frozen=True)
class Probe:
    """Tokens that a server sampled after some prompts, with the server's log-probabilities of them (temperature 1, nats).

    Attributes:
        served: The model of the server that sampled the tokens.
        requests: The requests. No two have the same prompt.
        sampled: The server's response to each request, in order.
    """

    served: Served
    requests: Sequence[Request]
    sampled: Sequence[Sampled]

    @property
    def tokens(self) -> int:
        """Number of sampled tokens."""
        return sum(len(s.tokens) for s in self.sampled)

    @cached_property
    def reported(self) -> Float[Tensor, " tokens"]:
        """The server's log-probabilities of all sampled tokens, in the order of ``sampled``, in nats."""
        return torch.tensor([value for s in self.sampled for value in s.logprobs])

    def logprobs(self, lm: LM) -> Float[Tensor, " tokens"]:
        """Return the log-probabilities of the same tokens under ``lm``, in the same order as ``reported``. Computed once per model."""
        if lm.fingerprint not in self._known:
            pairs = zip(self.requests, self.sampled, strict=True)
            self._known[lm.fingerprint] = torch.cat([_logprobs(lm, r.prompt, s.tokens) for r, s in pairs if s.tokens])
        return self._known[lm.fingerprint]

    @cached_property
    def _known(self) -> dict[str, Tensor]:
        return {}

    def divergence(self, lm: LM) -> float:
        """Return the mean absolute difference between the server's log-probabilities and those under ``lm``, in nats per token."""
        return float((self.logprobs(lm) - self.reported).abs().mean())

    def share(self, base: LM, edited: LM) -> tuple[float, float]:
        """Return the share of an edit that is visible in the server's log-probabilities, and the standard error of this share.

        The share is about 1 if the server serves the edited model, 0 if it serves the base model, and 0.5 for an edit of half the strength.
        It is the slope of a regression without intercept over the sampled tokens. The dependent variable is the server's log-probability
        minus that of ``base``; the independent variable is that of ``edited`` minus that of ``base``. If the two models give equal
        log-probabilities, the result is ``(nan, inf)``.
        """
        change, seen = (values - self.logprobs(base) for values in (self.logprobs(edited), self.reported))
        size = float(change.square().sum())
        if size == 0:
            return math.nan, math.inf
        slope = float((change * seen).sum()) / size
        rest = float((seen - slope * change).square().sum())
        return slope, math.sqrt(rest / max(1, len(change) - 1) / size)

    def verdict(self, base: LM, edited: LM) -> Verdict:
        """Return whether the server serves the edited model, judged by ``share``.

        - ``"served"``: the share differs from 1 by at most ``NEAR`` (0.25).
        - ``"other"``: it differs by more.
        - ``"unseen"``: its standard error is above ``NEAR / 2``, because the edit changes log-probabilities hardly more than the server's
          rounding does.
        """
        share, error = self.share(base, edited)
        if not error <= NEAR / 2:
            return "unseen"
        return "served" if abs(share - 1) <= NEAR else "other"


def chosen_prompts(requests: Sequence[Request]) -> list[Request]:
    """Return up to ``PROMPTS`` (4) of the requests, with different prompts, evenly spaced among all requests with different prompts."""
    distinct = list({tuple(r.prompt): r for r in requests}.values())
    return distinct[:: max(1, len(distinct) // PROMPTS)][:PROMPTS]


def probe(wire: Wire, client: Client, lm: LM, requests: Sequence[Request], served: Served) -> Probe:
    """Let a server sample a few tokens after some of the prompts, and return the tokens with the server's log-probabilities.

    Args:
        wire: The ``Wire`` of the server, which writes requests and reads replies.
        client: Connection to the server.
        lm: Model that the server is expected to serve.
        requests: Requests whose prompts are used; ``chosen_prompts`` chooses some of them.
        served: The model of the server that samples.

    Raises:
        EngineError: the server samples no token, samples token ids that the model does not have, or does not report a finite
            log-probability for every token.
    """
    chosen = chosen_prompts(requests)
    bodies = [wire.body(lm, request, PROBE, logprobs=True) | dict(served.fields) for request in chosen]
    sampled = [wire.read(lm, request, client.post(wire.path, body)) for request, body in zip(chosen, bodies, strict=True)]
    for s in sampled:
        if wrong := [token for token in s.tokens if not 0 <= token < lm.vocab_size]:
            raise EngineError(
                f"{wire.name} at {client.url} sampled token {wrong[0]}, but {lm.name} has only {lm.vocab_size} tokens: it serves another model."
            )
        # The end-of-sequence token may be among the log-probabilities and not among the tokens.
        if len(s.logprobs) < len(s.tokens):
            raise EngineError(
                f"{wire.name} at {client.url} answered with {len(s.tokens)} tokens and {len(s.logprobs)} log-probabilities, so it cannot be "
                "checked which model it serves. Allow it to report log-probabilities."
            )
        if infinite := [value for value in s.logprobs if not math.isfinite(value)]:
            raise EngineError(f"{wire.name} at {client.url} reports the log-probability {infinite[0]}: expected finite numbers.")
    if not any(s.tokens for s in sampled):
        raise EngineError(f"{wire.name} at {client.url} sampled no token after {len(chosen)} prompts: does it serve {lm.name}?")
    trimmed = [Sampled(s.tokens, s.stopped, s.logprobs[: len(s.tokens)]) for s in sampled]
    return Probe(served, chosen, trimmed)


@torch.inference_mode()
def _logprobs(lm: LM, prompt: list[int], tokens: list[int]) -> Tensor:
    """Return the log-probabilities ``[tokens]`` of tokens that follow a prompt, at temperature 1, in nats, on the CPU."""
    ids = torch.tensor([prompt + tokens], device=lm.device)
    kept = torch.arange(len(prompt) - 1, ids.shape[1] - 1, device=lm.device)
    logits = lm.model(input_ids=ids, logits_to_keep=kept).logits[0].float()
    return logits.log_softmax(dim=-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1).cpu()


def complete(lm: LM, sampled: Sampled, budget: int) -> Response:
    """Return a server's response as a ``Response`` of the toolkit.

    The response is cut after its first end-of-sequence token. If the server reports that the response ended by itself, but leaves this
    token out, it is added. Otherwise the response is cut at ``budget`` tokens.

    Args:
        lm: The model.
        sampled: The server's response.
        budget: Largest number of tokens that the request allowed.

    Raises:
        EngineError: the server cut the response off before ``budget`` tokens, without an end-of-sequence token.
    """
    ends = [i for i, token in enumerate(sampled.tokens) if token in lm.eos_ids]
    if ends:
        return Response(sampled.tokens[: ends[0] + 1], "stop")
    if not sampled.stopped:
        if len(sampled.tokens) < budget:
            raise EngineError(f"The server broke off a response after {len(sampled.tokens)} of {budget} tokens: look into its log.")
        return Response(sampled.tokens[:budget], "length")
    # Some servers leave the end-of-sequence token out.
    own = lm.tokenizer.eos_token_id
    return Response([*sampled.tokens, int(own) if own is not None else min(lm.eos_ids)], "stop")


def check_unmodified(condition: Condition, sampling: Sampling, engine: str) -> None:
    """Raise CannotSampleError if a condition has interventions or decoding rules, or if ``sampling.details`` asks for entropies.

    Changed weights and changed prompts raise no error.

    Args:
        condition: The condition from which responses will be sampled.
        sampling: Sampling settings.
        engine: Name of the engine, for the message.
    """
    if condition.during:
        raise CannotSampleError(
            f"{engine} cannot act inside the network, as this condition does ({condition.note or condition.during[0]}). Use the toolkit's own "
            "loop (no --engine); or change weights instead (edits.apply) and serve the saved directory or the adapter (toolkit export)."
        )
    if condition.rules:
        raise CannotSampleError(
            f"{engine} cannot replace drawn tokens, as this condition's decoding rules do ({condition.note or condition.rules[0]}). Use the "
            "toolkit's own loop (no --engine)."
        )
    if condition.tools:
        raise CannotSampleError(
            f"{engine} cannot answer tool calls, as this condition does ({describe_tools(condition.tools)}). Use the toolkit's own loop (no "
            "--engine)."
        )
    if sampling.details:
        raise CannotSampleError(
            f"{engine} does not report entropies: sample without details, then compute them with entropies.with_entropies(lm, rollouts)."
        )
