"""A lock for threads that take turns."""

from __future__ import annotations

import threading


class FairLock:
    """A lock that threads get in the order in which they ask: a plain one may be taken again and again by the same."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked = self._served = 0

    def __enter__(self) -> None:
        """Wait for the turn."""
        with self._changed:
            turn, self._asked = self._asked, self._asked + 1
            self._changed.wait_for(lambda: self._served == turn)

    def __exit__(self, *_: object) -> None:
        """Leave it to the next."""
        with self._changed:
            self._served += 1
            self._changed.notify_all()
