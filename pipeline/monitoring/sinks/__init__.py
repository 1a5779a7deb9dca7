"""The destinations of events beside the log.

Sinks follow the log from a process of their own, so that none can slow or stop training.
"""

from __future__ import annotations

from typing import Any, Protocol


class Sink(Protocol):
    """Something that is told every event of a run, in order; after ``resume`` at step k, steps from k on come again."""

    def event(self, event: dict[str, Any]) -> None:
        """Take one event.

        ``OSError``: not now, the caller tries this event again later. Any other error: the caller logs it and goes on.
        """

    def close(self) -> None:
        """Flush and end. Idempotent."""
