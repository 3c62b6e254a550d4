"""HTTP requests to a sampling server: several in flight, repeated with growing pauses while the server does not answer."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from toolkit.engines.base import EngineError

RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))  # statuses of a server that is busy, loading or restarting
PAUSES = (0.5, 8.0)  # seconds between two attempts: the first pause, doubled each time up to the second value
SHOWN = 300  # characters of a server's answer in an error message


@dataclass(frozen=True)
class Client:
    """Sends JSON to a server.

    Attributes:
        url: Address of the server, such as ``http://localhost:8080``.
        key: API key, sent as a bearer token; ``None`` for a server without one.
        parallel: Largest number of requests in flight.
        patience: Seconds for which a request is repeated while the server does not answer. Then ``EngineError`` is raised.
        timeout: Seconds to wait for one answer. A server answers only when a response is complete.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    parallel: int = 32
    patience: float = 60.0
    timeout: float = 1800.0

    def get(self, path: str) -> Any:
        """Return the JSON at a path of the server. Raise EngineError as ``post`` does."""
        return self._one("GET", path, None)

    def post(self, path: str, body: Any) -> Any:
        """Send a JSON value to a path of the server and return the JSON that it answers.

        Raises:
            EngineError: the server cannot be reached, refuses the request, or answers something else than JSON.
        """
        return self._one("POST", path, body)

    def tell(self, path: str, body: Any) -> None:
        """Send a JSON value to a path of the server, whatever text it answers. Raise EngineError if the server refuses it."""
        self._one("POST", path, body, parse=False)

    def find(self, path: str) -> Any:
        """Return the JSON at a path, or ``None`` if the server has no such path or does not answer with JSON there."""
        try:
            with httpx.Client(**self._settings) as client:
                answer = client.get(path)
            return answer.json() if answer.status_code == 200 else None
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        except ValueError:
            return None

    def post_all(
        self, path: str, bodies: Sequence[Any], returned: Callable[[Any], None], identity: str
    ) -> Generator[tuple[int, Any], None, None]:
        """Send many JSON values to a path, several at a time. Yield each answer, with the index of its value, as soon as it comes.

        Args:
            path: Path of the server.
            bodies: Values to send.
            returned: Function that is called with the JSON at ``identity`` whenever the server answers again after a failure. It raises
                ``EngineError`` if the server now serves something else.
            identity: Path that says what the server serves.

        Raises:
            EngineError: as in ``post``.
        """
        answers: queue.SimpleQueue[tuple[int, Any] | BaseException | None] = queue.SimpleQueue()
        worker = _Worker(self, path, iter(enumerate(bodies)), answers, returned, identity)
        worker.start()
        try:
            while (item := answers.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:  # also when the caller stops early, such as on Ctrl-C
            worker.cancel()

    def _one(self, method: str, path: str, body: Any, *, parse: bool = True) -> Any:
        async def run() -> Any:
            async with self._async() as client:
                answer = await self.request(client, method, path, body)
                return self._json(answer, path) if parse else None

        # In another thread, because a notebook already runs an event loop in this one.
        return ThreadPoolExecutor(1).submit(asyncio.run, run()).result()

    async def request(
        self, client: httpx.AsyncClient, method: str, path: str, body: Any, again: Callable[[httpx.AsyncClient], Any] | None = None
    ) -> httpx.Response:
        """Send one request, repeat it while the server does not answer, and return the answer.

        Args:
            client: Connection to the server.
            method: ``GET`` or ``POST``.
            path: Path of the server.
            body: JSON value to send; ``None`` to send none.
            again: Asynchronous function that is called before the request is repeated after a failure; ``None`` for none.
        """
        pause, waited = PAUSES[0], 0.0
        while True:
            try:
                if waited and again is not None:
                    await again(client)
                answer = await client.request(method, path, json=body)
                if answer.status_code == 200:
                    return answer
                if answer.status_code not in RETRIED:
                    raise EngineError(
                        f"The server at {self.url} refuses {path} with status {answer.status_code}: {_short(answer.text)}"
                    )
                problem = f"it answers {answer.status_code}: {_short(answer.text)}"
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            if waited >= self.patience:
                raise EngineError(
                    f"The server at {self.url} did not complete a request within {waited:.0f} s of repeating it ({problem[:SHOWN]}). Start it "
                    "again, then repeat the same command or call."
                )
            await asyncio.sleep(pause)
            waited, pause = waited + pause, min(2 * pause, PAUSES[1])

    def _json(self, answer: httpx.Response, path: str) -> Any:
        try:
            return answer.json()
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise EngineError(
                f"The server at {self.url} answers {path} with {_short(answer.text)!r}, which is not JSON."
            ) from error

    def _unreachable(self, error: Exception) -> EngineError:
        return EngineError(f"No server answers at {self.url} ({type(error).__name__}: {error}). Start it, or give another address.")

    @property
    def _settings(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = httpx.Timeout(self.timeout, connect=10.0)
        # An environment's proxy would be asked for local addresses too, and most servers are local.
        return {"base_url": self.url, "headers": headers, "timeout": timeout, "trust_env": False}

    def _async(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(**self._settings, limits=httpx.Limits(max_connections=self.parallel))


class _Worker(threading.Thread):
    """Sends the bodies in an event loop of its own, and puts the answers, or the error that stopped it, into a queue."""

    def __init__(
        self,
        client: Client,
        path: str,
        bodies: Iterator[tuple[int, Any]],
        answers: queue.SimpleQueue,
        returned: Callable[[Any], None],
        identity: str,
    ) -> None:
        super().__init__(daemon=True)
        self.client, self.path, self.bodies, self.answers = client, path, bodies, answers
        self.returned, self.identity = returned, identity
        self.loop = asyncio.new_event_loop()
        self.told_to_stop = asyncio.Event()

    def run(self) -> None:
        try:
            self.loop.run_until_complete(self._all())
        except BaseExceptionGroup as errors:
            self.answers.put(errors.exceptions[0])
        finally:
            self.loop.close()
            self.answers.put(None)

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
        async def again(client: httpx.AsyncClient) -> None:
            answer = await client.get(self.identity)
            if answer.status_code == 200:
                self.returned(answer.json())

        for index, body in self.bodies:
            answer = await self.client.request(http, "POST", self.path, body, again)
            self.answers.put((index, self.client._json(answer, self.path)))


def _short(text: str) -> str:
    """Return the beginning of a text, on one line."""
    return " ".join(text.split())[:SHOWN]
