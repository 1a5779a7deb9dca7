"""The contract by which weights travel into one engine's server, whatever carries them."""

from __future__ import annotations

import time
from typing import Protocol

from pipeline.rollout.engine import EngineTimeoutError
from pipeline.types import WeightBucket


class Deadline:
    """The moment by which one phase of an update must have ended."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining_s(self) -> float:
        """Seconds left, above 0. Raises ``EngineTimeoutError`` when there are none."""
        remaining = self._end - time.monotonic()
        if remaining <= 0:
            raise EngineTimeoutError(f"{self.seconds:g} s have passed")
        return remaining


class WeightTransport(Protocol):
    """Carries weight buckets into one server; one object per start of the server.

    States and what may be called in them::

        new --connect--> idle --begin(v)--> sending --send*, verify--> verified --commit--> idle
        idle, sending, verified --abort--> idle             any --close--> closed

    The engine is the caller, and owns everything else: ``RolloutEngine.begin_update`` pauses the server, then calls
    ``begin``; ``load_bucket`` checks a bucket's version, checksum, names and shapes, then calls ``send``, so that no
    wrong byte reaches a transport; ``verify_update`` sees that all buckets came, calls ``verify``, then verifies what
    the server holds; ``commit_update`` calls ``commit``, then lets the server continue; ``abort_update`` calls
    ``abort``; ``start`` calls ``connect``, and ``close`` calls ``close``. The server is paused from ``begin`` to
    ``commit`` and after ``abort``.

    Every phase gets a deadline. What cannot be done raises ``EngineError``, what is late ``EngineTimeoutError``; either
    way the engine aborts. ``begin`` after ``abort`` mends everything that a failed update left behind.
    """

    def connect(self, deadline: Deadline) -> None:
        """Set up what lasts as long as the server, e.g. a process group."""

    def begin(self, version: int, deadline: Deadline) -> None:
        """Get ready for the buckets of ``version``; also ends what an earlier update left open on the server."""

    def send(self, bucket: WeightBucket, deadline: Deadline) -> None:
        """Carry one bucket. When it returns, the bucket's memory may be used again."""

    def verify(self, deadline: Deadline) -> None:
        """All buckets were sent; when it returns, the server's parameters hold every one of them."""

    def commit(self) -> None:
        """The update is done; give back what only it needed."""

    def abort(self) -> None:
        """Give up the update. Touches only this side, so that it neither waits for a dead server nor raises."""

    def close(self) -> None:
        """Take down what ``connect`` set up. Idempotent; never raises."""
