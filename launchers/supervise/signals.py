"""Handles the signals that ask a run to stop."""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

Handler = Callable[[int, object], None]
STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # SIGINT: ctrl-C


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGTERM, SIGUSR1 or ctrl-C into a flag; a second one acts as usual. For the main thread."""
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        name = signal.Signals(number).name
        log.warning("%s: finishing what is in progress, then saving a checkpoint (once more to stop at once)", name)
        asked.set()
        signal.signal(number, previous[signal.Signals(number)])

    with handled(ask) as previous:
        yield asked.is_set


@contextmanager
def caught(told: str = "") -> Iterator[list[int]]:
    """The signals that ask to stop, as they come in, to be handed on to processes of ours; for the main thread.

    Of ctrl-C's a zero, which is no signal: it reaches them by itself. ``told`` is logged with the first.
    """
    signals: list[int] = []

    def note(number: int, frame: object) -> None:
        if told and not signals:
            log.warning("%s: %s", signal.Signals(number).name, told)
        signals.append(0 if number == signal.SIGINT else number)

    with handled(note):
        yield signals


def hand_on(process: subprocess.Popen[bytes], signals: Sequence[int], before: int) -> int:
    """Send ``process`` what has come in since the first ``before`` of ``signals``; returns how many it has had now."""
    new = signals[before:]
    for number in new:
        process.send_signal(number)
    return before + len(new)


@contextmanager
def handled(handler: Handler) -> Iterator[Mapping[signal.Signals, Any]]:
    """``handler`` for every signal that asks to stop; yields what handled them before, and does again afterwards."""
    previous = {number: signal.signal(number, handler) for number in STOP}
    try:
        yield previous
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
