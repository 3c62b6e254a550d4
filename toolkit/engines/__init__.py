"""Engines that sample responses: the toolkit's own loop (``OURS``).

``generate.rollouts(..., engine=...)`` takes any of them. Spans, grade and length of a response are set by ``generate``, whatever the engine.
"""

from toolkit.engines.base import Engine, EngineError, Request, Response, Session
from toolkit.engines.loop import OwnLoop

__all__ = ["OURS", "Engine", "EngineError", "OwnLoop", "Request", "Response", "Session"]

OURS = OwnLoop()
