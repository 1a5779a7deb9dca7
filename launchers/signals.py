"""Signals that ask a run to stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # SIGINT: ctrl-C


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGTERM, SIGUSR1 or ctrl-C into a flag; a second one acts as usual. For the main thread."""
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        name = signal.Signals(number).name
        log.warning("%s: finishing what is in progress, then saving a checkpoint (once more to stop at once)", name)
        asked.set()
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, ask) for number in STOP}
    try:
        yield asked.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
