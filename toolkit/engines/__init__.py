"""Engines that sample responses: the toolkit's own loop (``OWN_LOOP``), or a server (``connect``).

``generate.rollouts(..., engine=...)`` takes any of them. Spans, grade and length of a response are set by ``generate``, whatever the engine.
Adding a kind of server means adding one file (a ``Wire``) and one row in ``connecting.WIRES``.
"""

from toolkit.engines.base import CannotSampleError, Engine, EngineError, Request, Response, Session
from toolkit.engines.connecting import connect
from toolkit.engines.loop import OWN_LOOP, OwnLoop
from toolkit.engines.server import Server

__all__ = [
    "OWN_LOOP",
    "CannotSampleError",
    "Engine",
    "EngineError",
    "OwnLoop",
    "Request",
    "Response",
    "Server",
    "Session",
    "connect",
]
