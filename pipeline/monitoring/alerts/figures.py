"""Figures for alert rules that no event holds: time since an event, steps since a checkpoint, disk left."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from itertools import combinations
from statistics import median
from typing import Any

from pipeline.units import GIB

STEPS = 50  # that the median of a step's time is taken over
BETWEEN = 10  # evaluations and checkpoints whose longest may be under way
SAMPLE_EVERY, SAMPLES, FEWEST = 60.0, 60, 10  # seconds between two samples of the disk; kept at most; needed for a rate
KINDS = ("step", "checkpoint", "evaluation")


class Clock:
    """The figures that change as time passes.

    ``since/<kind>`` and ``since/event`` in seconds, ``since/steps`` in median steps, ``disk/free`` in GiB,
    ``disk/hours_left``.

    ``since/steps`` leaves out the longest time that one of the last evaluations and checkpoints took: what is under way
    may be one.

    ``hours_left`` is at the rate of the last hour, infinite while it does not fill. The rate is the median slope
    between two samples (Theil-Sen), which one checkpoint that comes or goes does not move.
    """

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._seconds: deque[float] = deque(maxlen=STEPS)
        self._between: deque[float] = deque([0.0], maxlen=BETWEEN)  # seconds of evaluations and checkpoints
        self._free: deque[tuple[float, float]] = deque(maxlen=SAMPLES)
        self._disk: dict[str, float] = {}

    def observe(self, event: Mapping[str, Any]) -> None:
        """Note when an event came."""
        kind, time = event["kind"], event["time"]
        if kind in ("evaluation", "checkpoint"):
            self._between.append(time - self._last.get("event", time))
        if kind == "checkpoint" or not self._last:
            self._last["checkpoint"] = time  # work done before it is saved; at the start there is none
        self._last |= {"event": time, **({kind: time} if kind in KINDS else {})}
        total = event.get("seconds", {}).get("total") if kind == "step" else None
        if total is not None:
            self._seconds.append(total)

    def disk(self, now: float, free: int) -> None:
        """Note the bytes that are free."""
        if self._free and now - self._free[-1][0] < SAMPLE_EVERY:
            return
        self._free.append((now, free / GIB))
        self._disk = {"disk/free": free / GIB}
        if len(self._free) >= FEWEST:
            slopes = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in combinations(self._free, 2)]
            rate = -3600 * median(slopes)
            self._disk["disk/hours_left"] = free / GIB / rate if rate > 0 else math.inf

    def figures(self, now: float) -> dict[str, float]:
        """Everything known at ``now``, Unix seconds."""
        found = {f"since/{kind}": now - time for kind, time in self._last.items()} | self._disk
        if "step" in self._last and self._seconds and (typical := median(self._seconds)) > 0:
            found["since/steps"] = max(0.0, now - self._last["event"] - max(self._between)) / typical
        return found
