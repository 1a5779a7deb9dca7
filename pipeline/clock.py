"""Where the time of one training step goes, phase by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepClock:
    """Where one step's time goes: ``with clock("sample"): ...``. Starts when it is made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._phases: dict[str, float] = {}
        self.phase = ""  # the one in progress

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of the block to ``phase``."""
        started, self.phase = time.perf_counter(), phase
        try:
            yield
        finally:
            self.phase = ""
            self._phases[phase] = self._phases.get(phase, 0.0) + time.perf_counter() - started

    def seconds(self, outside: float = 0.0) -> dict[str, float]:
        """Seconds by phase, with ``other`` (outside any phase, plus ``outside``) and ``total``."""
        total = time.perf_counter() - self._started + outside
        return {**self._phases, "other": total - sum(self._phases.values()), "total": total}
