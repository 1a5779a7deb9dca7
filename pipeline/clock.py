"""Where the time of one training step goes, phase by phase, and when the others of a run are at work."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

Span = tuple[float, float]  # begin and end, seconds of ``time.perf_counter``


class StepClock:
    """Where one step's time goes: ``with clock("sample"): ...``. Starts when it is made."""

    def __init__(self) -> None:
        self.began = time.time()  # Unix seconds
        self.started = time.perf_counter()
        self._spans: dict[str, list[Span]] = {}  # by phase
        self.phase = ""  # the one in progress

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of the block to ``phase``."""
        started, self.phase = time.perf_counter(), phase
        try:
            yield
        finally:
            self.phase = ""
            self._spans.setdefault(phase, []).append((started, time.perf_counter()))

    def spans(self, phase: str) -> list[Span]:
        """When ``phase`` was in progress."""
        return list(self._spans.get(phase, ()))

    def seconds(self, outside: float = 0.0) -> dict[str, float]:
        """Seconds by phase, with ``other`` (outside any phase, plus ``outside``) and ``total``."""
        total = time.perf_counter() - self.started + outside
        phases = {phase: length(spans) for phase, spans in self._spans.items()}
        return {**phases, "other": total - sum(phases.values()), "total": total}


class Busy:
    """When somebody is at work: within ``with busy:``, in however many threads at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within = 0
        self._since = 0.0
        self._spans: list[Span] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._within:
                self._since = time.perf_counter()
            self._within += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                self._spans.append((self._since, time.perf_counter()))

    def take(self) -> list[Span]:
        """The spans since the last call, in order; work that goes on is cut here, and counts on."""
        with self._lock:
            found, self._spans = self._spans, []
            if self._within:
                now = time.perf_counter()
                found.append((self._since, now))
                self._since = now
            return found


def length(spans: Iterable[Span]) -> float:
    """Seconds within spans that do not overlap."""
    return sum(end - begin for begin, end in spans)
