"""Engines that sample responses: the toolkit's own loop (``OWN_LOOP``), or a server (``connect``).

Pass an engine to ``generate.rollouts(..., engine=...)``. With every engine, ``generate`` sets spans, grade and length of a response.

To add a kind of server, add one file with a class like ``wire.Wire``, which writes requests and reads replies, and one row in
``connecting.WIRES``.
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
