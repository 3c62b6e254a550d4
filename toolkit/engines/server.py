"""The engine that lets a server sample: llama-server, vLLM, SGLang or Ollama (``Server``)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.engines.adapter import save_difference
from toolkit.engines.base import EngineError, Request, Response
from toolkit.engines.client import Client
from toolkit.engines.probing import Probe, check_unmodified, complete, probe
from toolkit.engines.wire import Served, Wire
from toolkit.lm import LM, Condition
from toolkit.sampling import Sampling

log = logging.getLogger(__name__)
STORED = 64, 15.0  # responses, or seconds, after which finished responses are handed on to be stored
CLEARER = 2.0  # a served model is taken for the right one only if it is closer than all others by this factor


@dataclass(frozen=True)
class Server:
    """An engine that lets a server sample. The server must serve the weights of the condition; this is checked by log-probabilities.

    A condition of the base model is sampled by the server's base model. A condition with edited or trained weights is sampled by the
    adapter of the server that computes the same. If there is none and the server can load adapters while it runs (vLLM, SGLang), the
    change of the weights is saved as an adapter and loaded.

    A server cannot sample conditions with interventions (steering, masks, run-time edits) or decoding rules.

    The random numbers are the server's. Each response has a seed, so a repeated run samples similar responses, but not the same in every
    token: a server's rounding depends on which requests it computes together.

    Attributes:
        wire: Language of the server.
        client: Connection to the server.
        base: Base model of the conditions, to recognise whether the server serves it or an edited one; ``None`` if all conditions are
            unedited models.
        tolerance: Largest mean absolute difference of log-probabilities between the server and the model, in nats per token. The default is
            ours: quantised servers reach about half of it.
        adapters: Directory in which adapters are saved for the server to load.
    """

    wire: Wire
    client: Client
    base: LM | None = None
    tolerance: float = 0.1
    adapters: Path = Path("runs/adapters")

    @property
    def name(self) -> str:
        """Kind and address of the server."""
        return f"{self.wire.name} at {self.client.url}"

    @property
    def header(self) -> Mapping[str, str]:
        """Kind of server, and whether tokens are those of the text that it returned."""
        return {"engine": self.wire.name if self.wire.exact else f"{self.wire.name} (tokens from text)"}

    def check(self, condition: Condition, sampling: Sampling) -> None:
        """Raise EngineError if the condition acts inside the network or has decoding rules, or if entropies are to be recorded."""
        check_unmodified(condition, sampling, self.name)

    def session(self, condition: Condition, requests: Sequence[Request], sampling: Sampling) -> _Session:
        """Find which of the server's models computes what the condition's model computes, and return a session with it.

        Raises:
            EngineError: the condition needs more than a server can do, the server serves other weights, or it does not answer.
        """
        self.check(condition, sampling)
        longest = max(len(request.prompt) for request in requests) + sampling.max_new_tokens
        context = self.wire.context(self.client)
        if context is not None and longest > context:
            raise EngineError(
                f"{self.name} has a context of {context} tokens, but the longest prompt and max_new_tokens={sampling.max_new_tokens} make "
                f"{longest}: start it with a longer context, or lower max_new_tokens."
            )
        return _Session(self, condition.lm, self._served(condition.lm, requests), sampling)

    def _served(self, lm: LM, requests: Sequence[Request]) -> Served:
        probes = [probe(self.wire, self.client, lm, requests, served) for served in self.wire.served(self.client)]
        chosen = self._matching(lm, probes)
        if chosen is None and self.base is not None and lm.fingerprint != self.base.fingerprint:
            name = f"toolkit-{lm.fingerprint[:16]}"
            folder = save_difference(self.base, lm, self.adapters / name)
            served = self.wire.load(self.client, name, str(folder.resolve()))
            if served is not None:
                probes = [*probes, probe(self.wire, self.client, lm, requests, served)]
                chosen = self._matching(lm, probes)
        if chosen is None:
            measured = ", ".join(f"{p.served.name} {p.divergence(lm):.3f}" for p in probes)
            raise EngineError(
                f"{self.name} does not serve {lm.name}: log-probabilities of {probes[0].tokens} sampled tokens differ from this model's by "
                f"{measured} nats per token (at most {self.tolerance} expected, and nearer to this model than to its base). {self.wire.advice}"
            )
        log.info("%s serves %s as %r: %.4f nats per token", self.name, lm.name, chosen.served.name, chosen.divergence(lm))
        return chosen.served

    def _matching(self, lm: LM, probes: Sequence[Probe]) -> Probe | None:
        """Return the probe of the served model that computes what ``lm`` computes; ``None`` if there is none.

        Raises:
            EngineError: several served models are about equally near, and neither name nor path tells them apart.
        """
        near = sorted((p for p in probes if self._agrees(p, lm)), key=lambda p: p.divergence(lm))
        if not near:
            return None
        best, *others = near
        rivals = [p for p in others if p.divergence(lm) < CLEARER * best.divergence(lm)]
        if not rivals:
            return best
        named = [p for p in (best, *rivals) if p.served.source and Path(p.served.source).name in (Path(lm.name).name, lm.name)]
        if len(named) == 1:
            return named[0]
        if self.base is None or lm.fingerprint == self.base.fingerprint:
            return next((p for p in probes if p in near), best)  # the base model comes first
        raise EngineError(
            f"{self.name} serves models that cannot be told apart from {lm.name}: "
            + ", ".join(f"{p.served.name} ({p.divergence(lm):.4f} nats per token)" for p in (best, *rivals))
            + ". Serve the condition under the name of its directory, or alone."
        )

    def _agrees(self, tried: Probe, lm: LM) -> bool:
        """Return True if a served model is within the tolerance of ``lm`` and, if ``lm`` is edited, nearer to it than to its base."""
        divergence = tried.divergence(lm)
        if divergence > self.tolerance:
            return False
        if self.base is None or lm.fingerprint == self.base.fingerprint:
            return True
        return divergence < tried.divergence(self.base)


@dataclass(frozen=True)
class _Session:
    engine: Server
    lm: LM
    served: Served
    sampling: Sampling

    def sample(self, requests: Sequence[Request], tick: Callable[[int], Any]) -> Iterator[list[tuple[int, Response]]]:
        wire, client = self.engine.wire, self.engine.client
        bodies = [wire.body(self.lm, r, self.sampling, logprobs=False) | dict(self.served.fields) for r in requests]
        before = client.get(wire.identity)

        def same(now: Any) -> None:
            if now != before:
                raise EngineError(
                    f"{self.engine.name} was restarted with another model or other settings ({wire.identity} changed)."
                )

        answers = client.post_all(wire.path, bodies, same, wire.identity)
        done, since = [], time.monotonic()
        try:
            for index, answer in answers:
                done.append((index, complete(self.lm, wire.read(self.lm, answer))))
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
            answers.close()
        if done:
            yield done
