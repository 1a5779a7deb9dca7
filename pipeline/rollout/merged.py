"""Several iterators as one, each drawn from in a thread of its own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class Merged(Generic[T]):
    """The items of all iterators that were added, as they come; more may be added at any time."""

    def __init__(self) -> None:
        self._arrived: SimpleQueue[T | Future[None]] = SimpleQueue()
        self._running = 0
        self._failed: list[BaseException] = []

    def add(self, items: Iterator[T]) -> None:
        """Have a thread draw from ``items``."""
        self._running += 1
        thread = ThreadPoolExecutor(1, "merged")
        thread.submit(self._draw, items).add_done_callback(self._arrived.put)
        thread.shutdown(wait=False)  # after that

    def next(self) -> T | None:
        """The next item, None once there are no more. Raises what an iterator raised first, when all have ended."""
        while self._running:
            some = self._arrived.get()
            if not isinstance(some, Future):
                return some
            self._running -= 1
            if (error := some.exception()) is not None:
                self._failed.append(error)
        if self._failed:
            raise self._failed[0]
        return None

    def _draw(self, items: Iterator[T]) -> None:
        for item in items:
            self._arrived.put(item)
