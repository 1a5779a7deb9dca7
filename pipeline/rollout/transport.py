"""The contract by which weights travel into one engine's server, whatever carries them."""

from __future__ import annotations

import time
from typing import Protocol

from pipeline.reshard.order import Order
from pipeline.rollout.engine import EngineTimeoutError


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
    """Takes weights into one server; one object per start of the server.

    States and what may be called in them::

        idle --begin--> open --receive--> received --verify--> verified --commit--> idle
        idle, open, received, verified --abort--> idle             any --close--> closed

    The engine is the caller, and owns everything else: it pauses the server before ``begin``, and lets it continue
    after ``commit``. Every phase gets a deadline. What cannot be done raises ``EngineError``, what is late
    ``EngineTimeoutError``; either way the engine aborts. ``begin`` after ``abort`` mends everything that a failed
    update left behind.
    """

    def begin(self, deadline: Deadline) -> None:
        """Get ready; also ends what an earlier update left open on the server."""

    def receive(self, order: Order, engine: int, deadline: Deadline) -> None:
        """Take all that the learner's ranks send to engine number ``engine``."""

    def verify(self, order: Order, deadline: Deadline) -> None:
        """When it returns, the server is ready to compute with what was received."""

    def commit(self) -> None:
        """The update is done; give back what only it needed."""

    def abort(self) -> None:
        """Give up the update. Touches only this side, so that it neither waits for a dead server nor raises."""

    def close(self) -> None:
        """Give back everything. Idempotent; never raises."""
