"""Send HTTP requests to a sampling server, several at a time. While it does not reply, requests are repeated after growing pauses."""

from __future__ import annotations

import asyncio
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from toolkit.engines.base import EngineError

RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))  # statuses of a server that is busy, loading or restarting
ASKED = 15.0  # seconds to wait for the reply to a question about the server
KEY = "TOOLKIT_ENGINE_KEY"
"""Environment variable with the API key of the server, for servers that require one."""
PAUSES = (0.5, 8.0)  # seconds between two attempts: the first pause, doubled each time up to the second value
SHOWN = 300  # characters of a server's reply in an error message


class RefusedError(EngineError):
    """Raised if a server replies that it does not have the URL path of a request, or that it rejects the request."""


@dataclass(frozen=True)
class Client:
    """Sends JSON to a server.

    Attributes:
        url: Address of the server, such as ``http://localhost:8080``.
        key: API key, sent as a bearer token; ``None`` for a server without one.
        parallel: Largest number of requests that wait for a reply at the same time.
        patience: Seconds for which a failing request is repeated, while the server is busy or unreachable. Then ``EngineError`` is raised.
        timeout: Seconds to wait for the reply to a POST request. It is long, because a server replies only when the whole response is
            sampled. When responses are sampled, it is at least ``server.SLOWEST`` (0.5) seconds per token of ``max_new_tokens``.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    parallel: int = 32
    patience: float = 60.0
    timeout: float = 1800.0

    def get(self, path: str) -> Any:
        """Send a GET request to a URL path of the server and return the JSON of its reply. Raise EngineError as ``post`` does."""
        return self._json(self._call("GET", path, None), path)

    def post(self, path: str, body: Any) -> Any:
        """Send a JSON value to a URL path of the server (POST) and return the JSON of its reply.

        Raises:
            EngineError: the server cannot be reached, refuses the request, or replies with something other than JSON.
        """
        return self._json(self._call("POST", path, body), path)

    def tell(self, path: str, body: Any) -> None:
        """Send a JSON value to a URL path of the server and ignore the text of its reply. Raise EngineError if the server refuses it."""
        self._call("POST", path, body)

    def find(self, path: str) -> Any:
        """Return the JSON at a URL path, as ``get`` does, but ``None`` if the server has no such path or its reply is not JSON."""
        try:
            return self._call("GET", path, None).json()
        except RefusedError:
            return None
        except ValueError as error:
            if isinstance(error, EngineError):
                raise
            return None

    def post_all(self, path: str, bodies: Sequence[Any], returned: Callable[[], None]) -> Generator[tuple[int, Any], None, None]:
        """Send many JSON values to a path, several at a time. Yield ``(index in bodies, JSON of the reply)`` as soon as each reply comes.

        Args:
            path: URL path on the server.
            bodies: JSON values to send.
            returned: Function without arguments that is called, in another thread, after a request failed and before it is repeated. The
                server may have been restarted meanwhile: the function must raise ``EngineError`` if it now serves another model.

        Raises:
            EngineError: as in ``post``.
        """
        replies: queue.SimpleQueue[tuple[int, Any] | BaseException | None] = queue.SimpleQueue()
        worker = _Worker(self, path, iter(enumerate(bodies)), replies, returned)
        worker.start()
        try:
            while (item := replies.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:  # also when the caller stops early, such as on Ctrl-C
            worker.cancel()

    def _call(self, method: str, path: str, body: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            async with self._async() as client:
                return await self.request(client, method, path, body)

        def target() -> None:
            try:
                done.put(asyncio.run(run()))
            except BaseException as error:  # noqa: BLE001  # raised again in the calling thread
                done.put(error)

        # In another thread, because a notebook already runs an event loop in this one. As a daemon, so that Ctrl-C ends the process.
        done: queue.SimpleQueue[httpx.Response | BaseException] = queue.SimpleQueue()
        threading.Thread(target=target, daemon=True).start()
        answer = done.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def request(
        self, client: httpx.AsyncClient, method: str, path: str, body: Any, again: Callable[[float], Any] | None = None
    ) -> httpx.Response:
        """Send one request, repeat it while the server does not reply, and return the reply.

        Args:
            client: Connection to the server.
            method: ``GET`` or ``POST``.
            path: URL path on the server.
            body: JSON value to send; ``None`` to send none.
            again: Asynchronous function that is called before each repetition, with the time of the last failure (``time.monotonic()``).
                ``None`` calls nothing.

        Raises:
            RefusedError: the server replies that it has no such path, or that it rejects the request.
            EngineError: the server requires an API key, or did not reply in time.
        """
        pause, since = PAUSES[0], math.inf
        failed: float | None = None
        while True:
            try:
                if failed is not None and again is not None:
                    began = time.monotonic()
                    await again(failed)
                    since += time.monotonic() - began  # a check is no time without a reply
                timeout = self.timeout if method == "POST" else ASKED
                reply = await client.request(method, path, json=body, timeout=httpx.Timeout(timeout, connect=10.0, pool=None))
                if reply.status_code == 200:
                    return reply
                problem = f"it answers {reply.status_code}: {_short(reply.text)}"
                if reply.status_code in (401, 403):
                    raise EngineError(f"The server at {self.url} wants a key ({problem}): set the environment variable {KEY}.")
                if reply.status_code not in RETRIED:
                    raise RefusedError(f"The server at {self.url} refuses {path}: {problem}")
            except httpx.ReadTimeout as error:
                raise EngineError(
                    f"The server at {self.url} did not answer {path} within {timeout:.0f} s, queueing included: give it fewer requests at a time "
                    "(--batch-size; in Python engines.connect(..., parallel=...)), or shorter responses (--max-new-tokens)."
                ) from error
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            failed = time.monotonic()
            since = min(since, failed)
            # Questions come first: where nothing listens at all, they need not wait for a server that restarts.
            if failed - since >= self.patience or (method == "GET" and problem.startswith("ConnectError")):
                raise EngineError(
                    f"No server answers at {self.url} ({problem[:SHOWN]}, for {failed - since:.0f} s). Start it, then repeat the same command or call."
                )
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSES[1])

    def _json(self, reply: httpx.Response, path: str) -> Any:
        try:
            return reply.json()
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise EngineError(f"The server at {self.url} answers {path} with {_short(reply.text)!r}, which is not JSON.") from error

    def _async(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limits = httpx.Limits(max_connections=self.parallel)
        # An environment's proxy would be asked for local addresses too, and most servers are local.
        return httpx.AsyncClient(base_url=self.url, headers=headers, limits=limits, trust_env=False)


class _Worker(threading.Thread):
    """Thread of ``Client.post_all``: it sends the bodies, and puts the replies, or the error that stopped it, into a queue."""

    def __init__(
        self,
        client: Client,
        path: str,
        bodies: Iterator[tuple[int, Any]],
        replies: queue.SimpleQueue,
        returned: Callable[[], None],
    ) -> None:
        super().__init__(daemon=True)
        self.client, self.path, self.bodies, self.replies, self.returned = client, path, bodies, replies, returned
        self.loop = asyncio.new_event_loop()
        self.told_to_stop = asyncio.Event()
        self.checking, self.checked = asyncio.Lock(), 0.0  # time at which the server was last found to serve the same

    def run(self) -> None:
        try:
            self.loop.run_until_complete(self._all())
        except BaseExceptionGroup as errors:
            self.replies.put(errors.exceptions[0])
        except BaseException as error:  # noqa: BLE001  # raised again by ``post_all``
            self.replies.put(error)
        finally:
            self.loop.close()
            self.replies.put(None)

    def cancel(self) -> None:
        """Stop sending, give up the requests in flight, and wait until the thread has ended."""
        if self.is_alive():
            with suppress(RuntimeError):  # the loop has just ended by itself
                self.loop.call_soon_threadsafe(self.told_to_stop.set)
            self.join()

    async def _all(self) -> None:
        async with self.client._async() as http, asyncio.TaskGroup() as group:
            senders = [group.create_task(self._send(http)) for _ in range(self.client.parallel)]
            stopper = group.create_task(self._cancel_when_stopped(senders))
            await asyncio.wait(senders)
            stopper.cancel()

    async def _cancel_when_stopped(self, senders: Sequence[asyncio.Task]) -> None:
        await self.told_to_stop.wait()
        for sender in senders:
            sender.cancel()

    async def _send(self, http: httpx.AsyncClient) -> None:
        for index, body in self.bodies:
            reply = await self.client.request(http, "POST", self.path, body, self._check)
            self.replies.put((index, self.client._json(reply, self.path)))

    async def _check(self, failed: float) -> None:
        """Check which model the server serves after a request failed. One check serves all requests that failed before it."""
        async with self.checking:
            if self.checked < failed:
                await self.loop.run_in_executor(None, self.returned)
                self.checked = time.monotonic()


def _short(text: str) -> str:
    """Return the first ``SHOWN`` (300) characters of a text, on one line."""
    return " ".join(text.split())[:SHOWN]
