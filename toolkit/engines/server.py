"""The engine that lets a server sample: llama-server, vLLM, SGLang or Ollama (``Server``)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolkit.engines.adapter import save_difference
from toolkit.engines.base import CannotSampleError, EngineError, Request, Response
from toolkit.engines.client import Client
from toolkit.engines.probing import Probe, check_unmodified, complete, probe
from toolkit.engines.wire import Served, Wire
from toolkit.lm import LM, Condition
from toolkit.sampling import Sampling

log = logging.getLogger(__name__)
CHANGED = (
    0.02  # after a failed request, a server may differ from our model by this much (nats per token), however little it did before
)
STORED = 64, 15.0  # responses, or seconds, after which finished responses are handed on to be stored
SLOWEST = 0.5  # seconds per token of ``max_new_tokens`` that a request may take, queueing included
CLEARER = 2.0  # among models that show the same edit, the nearest is taken only if the others are farther by this factor


@dataclass(frozen=True)
class Server:
    """An engine that lets a server sample. The server must serve the weights of the condition; this is checked by log-probabilities.

    A server may offer several models. The first rule that applies chooses the one that samples the responses of a condition:

    1. A model with the name or path of the condition's model, or the adapter that was loaded for that model before.
    2. If the condition's model is the base model, or ``base`` is ``None``: the server's base model.
    3. If the server can load adapters while it runs (vLLM, SGLang): a new adapter with the difference between the condition's model and
       ``base``.
    4. The model whose log-probabilities agree best with those of the condition's model.

    Then the chosen model is checked. Its log-probabilities of tokens that the server sampled must agree with those of the condition's
    model. For an edited model, they must also show the whole edit (``Probe.verdict``). An edit that changes log-probabilities less than the
    server's rounding cannot be seen. It is accepted only if rule 1 or 3 chose the model, that is, by the model's name.

    A server cannot run interventions (steering, masks, run-time edits) or decoding rules, so conditions with them raise an error.

    The server draws the random numbers, from a seed per response. A repeated run samples similar responses, but some tokens may differ: a
    server's rounding depends on which requests it computes together.

    Attributes:
        wire: Writes requests and reads replies for this kind of server.
        client: Connection to the server.
        base: Base model of the conditions. With it, the server's log-probabilities can tell an edited model from the base. ``None`` if all
            conditions are unedited models.
        tolerance: Largest allowed mean absolute difference between the log-probabilities of the server and of the condition's model, in
            nats per token. ``None`` means the default of the kind of server (``Wire.tolerance``).
        adapters: Directory in which adapters are saved for the server to load.
    """

    wire: Wire
    client: Client
    base: LM | None = None
    tolerance: float | None = None
    adapters: Path = Path("runs/adapters")

    @property
    def name(self) -> str:
        """Kind and address of the server."""
        return f"{self.wire.name} at {self.client.url}"

    @property
    def header(self) -> Mapping[str, str]:
        """``{"engine": KIND}``, with the kind of server. ``" (tokens from text)"`` is added to it if the server returns no token ids."""
        return {"engine": self.wire.name if self.wire.exact else f"{self.wire.name} (tokens from text)"}

    @property
    def takes_adapters(self) -> bool:
        """Whether this kind of server can load adapters while it runs."""
        return self.wire.loads

    def check(self, condition: Condition, sampling: Sampling) -> None:
        """Raise CannotSampleError if the condition has interventions or decoding rules, or if ``sampling.details`` asks for entropies."""
        check_unmodified(condition, sampling, self.name)

    def check_edits(self) -> None:
        """Do nothing, because a server can be started with any weights."""

    def session(self, condition: Condition, requests: Sequence[Request], sampling: Sampling) -> _Session:
        """Choose the server's model for the condition (see the class), check it, and return a session that samples with it.

        Raises:
            CannotSampleError: as in ``check``; or the server's context is too short; or the server serves other weights.
            EngineError: the server's reply is missing or malformed; or as in ``adapter.save_difference``.
        """
        self.check(condition, sampling)
        longest = max(len(request.prompt) for request in requests) + sampling.max_new_tokens
        context = self.wire.context(self.client)
        if context is not None and longest > context:
            raise CannotSampleError(
                f"{self.name} has a context of {context} tokens, but the longest prompt and max_new_tokens={sampling.max_new_tokens} make "
                f"{longest}: start it with a longer context, or lower max_new_tokens."
            )
        return _Session(self, condition.lm, self._served(condition.lm, requests), sampling, self._client_for(sampling))

    def _client_for(self, sampling: Sampling) -> Client:
        """Return the client with which responses are sampled: its requests do not queue in the server, and its time limit fits long responses."""
        slots = self.wire.slots(self.client)
        parallel = self.client.parallel if slots is None else min(self.client.parallel, slots)
        return replace(self.client, parallel=parallel, timeout=max(self.client.timeout, SLOWEST * sampling.max_new_tokens))

    @property
    def limit(self) -> float:
        """The tolerance in use, in nats per token: ``tolerance``, or the default of the kind of server."""
        return self.wire.tolerance if self.tolerance is None else self.tolerance

    def check_served(self, lm: LM, served: Served, requests: Sequence[Request]) -> Probe:
        """Check by log-probabilities that a model of the server has the weights of ``lm``. Return the probe that was used.

        Args:
            lm: The model of the condition.
            served: The model of the server.
            requests: Requests whose prompts are used; ``probing.chosen_prompts`` chooses some of them.

        Raises:
            CannotSampleError: the log-probabilities do not agree with those of ``lm``.
        """
        tried = probe(self.wire, self.client, lm, requests, served)
        if not self._agrees(tried, lm, named=True):
            raise self._refusal(lm, [tried])
        return tried

    def _served(self, lm: LM, requests: Sequence[Request]) -> Probe:
        offered = self.wire.served(self.client)
        edited = self.base is not None and lm.fingerprint != self.base.fingerprint
        own = f"toolkit-{(self.base or lm).fingerprint[:8]}-{lm.fingerprint[:16]}"
        named = [s for s in offered if s.name == own] or [s for s in offered if _is_named(s, lm, self.base)]
        if not named and not edited:
            named = offered[:1]
        if not named and self.base is not None and self.wire.loads:
            folder = save_difference(self.base, lm, self.adapters / own)
            named = [self.wire.load(self.client, own, str(folder.resolve()))]
        if len(named) == 1:
            chosen = self.check_served(lm, named[0], requests)
        else:
            chosen = self._recognised(lm, [probe(self.wire, self.client, lm, requests, served) for served in named or offered])
        log.info("%s serves %s as %r: %.4f nats per token", self.name, lm.name, chosen.served.name, chosen.divergence(lm))
        if edited and self.base is not None and chosen.verdict(self.base, lm) == "unseen":
            log.warning(
                "the edit of %s is smaller than the rounding of %s: only its name says that it is served", lm.name, self.name
            )
        if not edited and lm.made_from:
            log.warning(
                "%s was edited or trained: give its base model too (compare), else a server of the base may pass for it", lm.name
            )
        return chosen

    def _recognised(self, lm: LM, probes: Sequence[Probe]) -> Probe:
        """Return the probe that agrees best with ``lm``, among those that agree (``_agrees``).

        Raises:
            CannotSampleError: none agrees, or two agree about equally well.
        """
        agreeing = [p for p in probes if self._agrees(p, lm, named=False)]
        if not agreeing:
            raise self._refusal(lm, probes)
        best, *rivals = sorted(agreeing, key=lambda p: p.divergence(lm))
        if rivals and rivals[0].divergence(lm) < CLEARER * best.divergence(lm):
            raise CannotSampleError(
                f"{self.name} serves models that cannot be told apart from {lm.name}: "
                + ", ".join(f"{p.served.name} ({p.divergence(lm):.4f} nats per token)" for p in (best, *rivals))
                + ". Serve the condition under the name of its directory, or alone."
            )
        return best

    def _agrees(self, tried: Probe, lm: LM, *, named: bool) -> bool:
        """Return True if a probe's log-probabilities agree with ``lm`` within the tolerance. If ``lm`` is edited, they must show the edit.

        Args:
            tried: Probe of a model of the server.
            lm: The model of the condition.
            named: True if the server's model was chosen by name. Then an edit that is too small to be seen is accepted.
        """
        if not tried.divergence(lm) <= self.limit:
            return False
        if self.base is None or lm.fingerprint == self.base.fingerprint:
            return True
        return tried.verdict(self.base, lm) in (("served", "unseen") if named else ("served",))

    def _refusal(self, lm: LM, probes: Sequence[Probe]) -> CannotSampleError:
        measured = ", ".join(f"{p.served.name} {p.divergence(lm):.3f}" for p in probes)
        shown = ""
        if self.base is not None and lm.fingerprint != self.base.fingerprint:
            shares = (p.share(self.base, lm) for p in probes)
            shown = ", and of the edit they show " + ", ".join(f"{share:.2f} +- {error:.2f}" for share, error in shares)
        return CannotSampleError(
            f"{self.name} does not serve {lm.name}: log-probabilities of {probes[0].tokens} sampled tokens differ from this model's by "
            f"{measured} nats per token (at most {self.limit} expected){shown}. {self.wire.advice}"
        )


@dataclass(frozen=True)
class _Session:
    engine: Server
    lm: LM
    probe: Probe
    sampling: Sampling
    client: Client

    @property
    def served(self) -> Served:
        """The model of the server that samples the responses."""
        return self.probe.served

    @property
    def serves(self) -> str:
        return self.served.name

    def _check_again(self) -> None:
        """Probe the server again after a failed request. Raise EngineError if it no longer serves the condition's model."""
        engine = self.engine
        now = probe(engine.wire, engine.client, self.lm, self.probe.requests, self.served)
        limit = max(CLEARER * self.probe.divergence(self.lm), CHANGED)
        if not now.divergence(self.lm) <= limit or not engine._agrees(now, self.lm, named=True):
            raise EngineError(
                f"{engine.name} was restarted with another model or other settings: its log-probabilities differ from this model's by "
                f"{now.divergence(self.lm):.3f} nats per token, before by {self.probe.divergence(self.lm):.3f}. Start it as it was, then repeat the "
                "same command or call."
            )

    def sample(self, requests: Sequence[Request], tick: Callable[[int], Any]) -> Iterator[list[tuple[int, Response]]]:
        wire = self.engine.wire
        bodies = [wire.body(self.lm, r, self.sampling, logprobs=False) | dict(self.served.fields) for r in requests]
        replies = self.client.post_all(wire.path, bodies, self._check_again)
        done, since = [], time.monotonic()
        try:
            for index, reply in replies:
                done.append((index, complete(self.lm, wire.read(self.lm, requests[index], reply), self.sampling.max_new_tokens)))
                tick(1)
                if len(done) >= STORED[0] or time.monotonic() - since > STORED[1]:
                    yield done
                    done, since = [], time.monotonic()
        except GeneratorExit:
            raise
        except BaseException:  # whatever stops the run (Ctrl-C, a server that is gone), what is finished is stored first
            if done:
                yield done
            raise
        finally:
            replies.close()
        if done:
            yield done


def _is_named(served: Served, lm: LM, base: LM | None) -> bool:
    """Return True if a model of the server has the name of ``lm``, or was loaded from the directory or hub id of ``lm``.

    Args:
        served: A model of the server.
        lm: The model of the condition.
        base: Base model of the conditions, or ``None``.
    """
    if served.name == lm.name or (served.source and served.source == lm.name):
        return True
    # The folder of a model made from another, and that of a merged adapter, is the folder of its base: it does not hold its weights.
    of_base = lm.parent is not None or (base is not None and lm.folder == base.folder and lm.fingerprint != base.fingerprint)
    return bool(served.source) and lm.folder is not None and not of_base and Path(served.source).resolve() == lm.folder.resolve()
