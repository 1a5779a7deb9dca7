"""What a run is doing now and how long that usually takes; stalls are measured by it."""

from __future__ import annotations

import math
import time
from collections import deque
from statistics import median

LAST = 100  # durations of a kind that its median is taken over


class Activity:
    """The work of a run as a sequence without gaps.

    ``start``, then ``step``, ``evaluation`` and ``checkpoint``, ``finish`` at last.

    One thread tells what begins; any may read.
    """

    def __init__(self) -> None:
        self.kind = "start"
        self.number = 0  # of things begun before: another number, another thing
        self._since = time.monotonic()
        self._durations: dict[str, deque[float]] = {}

    def begin(self, kind: str) -> None:
        """What went on is over; ``kind`` begins."""
        now = time.monotonic()
        self._durations.setdefault(self.kind, deque(maxlen=LAST)).append(now - self._since)
        self.kind, self._since = kind, now
        self.number += 1

    def typical(self) -> float:
        """Median seconds that the present kind of work took before in this process; NaN for the first of its kind."""
        return median(self._durations.get(self.kind, ()) or (math.nan,))
