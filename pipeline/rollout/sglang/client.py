"""Sends every sample to an SGLang server as a request of its own, over connections that stay open.

One event loop in one thread holds them all. aiohttp, which SGLang installs, and not httpx: 16,384 requests in flight
cost httpx over 80 CPU-seconds (4,096 of them 22; its pool searches all connections at every event), see
``tools.bench.client``.
"""

from __future__ import annotations

import asyncio
import gc
import queue
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import NamedTuple

import aiohttp

from pipeline.http_client import KEEP_ALIVE_S


class Reply(NamedTuple):
    """What came of a request."""

    status: int | None  # of HTTP; 0: no answer came, None: the request was withdrawn before it was sent
    said: str = ""  # what is wrong
    body: bytes = b""


_COLLECT = (50_000, 20, 100)  # objects before a search for garbage, and how many of those before a wider one
_GATHER_S = 0.05  # replies so close together are handed out together
_JSON = {"Content-Type": "application/json"}


class Call:
    """Requests that were sent together; their replies are handed out as they come."""

    def __init__(self, count: int) -> None:
        self.waiting = count  # replies that were not handed out yet
        self.withdrawn = False  # what is unsent stays unsent
        self._replies: queue.SimpleQueue[tuple[int, Reply]] = queue.SimpleQueue()

    def put(self, number: int, reply: Reply) -> None:
        """Keep the reply to request ``number``."""
        self._replies.put((number, reply))

    def take(self) -> list[tuple[int, Reply]]:
        """The next replies, with the numbers of their requests; waits for the first, and shortly for more."""
        found = [self._replies.get()]
        until = time.monotonic() + _GATHER_S
        while len(found) < self.waiting:
            try:
                found.append(self._replies.get(timeout=max(0.0, until - time.monotonic())))
            except queue.Empty:
                break
        self.waiting -= len(found)
        return found


class Client:
    """The connections to one server. Any thread may ask."""

    def __init__(self, url: str, at_once: int) -> None:
        """``at_once``: requests in flight at most; the others wait for their turn, in order."""
        self._url = url
        # Thousands of requests are many objects and no garbage. By default Python would search them, and all that lives
        # already, again and again: a third of the client's CPU time.
        gc.freeze()
        gc.set_threshold(*_COLLECT)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="SGLang client", daemon=True)
        self._thread.start()
        self._room = asyncio.Semaphore(at_once)
        self._session = asyncio.run_coroutine_threadsafe(_session(), self._loop).result()

    def post(self, path: str, bodies: Sequence[bytes]) -> Call:
        """Post every body, JSON. There is no deadline: whoever asks watches the server."""
        call = Call(len(bodies))
        self._loop.call_soon_threadsafe(self._begin, call, self._url + path, bodies)
        return call

    def close(self) -> None:
        """Drop all connections; calls that wait get replies that say so."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _begin(self, call: Call, url: str, bodies: Sequence[bytes]) -> None:
        for number, body in enumerate(bodies):
            task = self._loop.create_task(self._ask(call, number, url, body))
            task.set_name("sample")

    async def _ask(self, call: Call, number: int, url: str, body: bytes) -> None:
        reply = Reply(None)
        try:
            async with self._room:
                if not call.withdrawn:
                    async with self._session.post(url, data=body, headers=_JSON) as response:
                        content = await response.read()
                    ok = response.status == HTTPStatus.OK
                    reply = Reply(response.status, "" if ok else content[:500].decode(errors="replace"), content)
        except (aiohttp.ClientError, OSError) as error:
            reply = Reply(0, str(error) or type(error).__name__)
        finally:
            call.put(number, reply)

    async def _end(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task.get_name() == "sample"]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()


async def _session() -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout())
