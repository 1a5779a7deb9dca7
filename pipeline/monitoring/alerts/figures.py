"""Figures of a run that no event holds: time since an event, steps since a checkpoint, disk left."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

GIB = 2**30
STEPS = 50  # that the median of a step's time is taken over
SAMPLE_EVERY, SAMPLES = 60.0, 360  # seconds between two samples of the disk, and how many are kept: six hours
SPAN = 600.0  # seconds of samples before a rate is made of them
KINDS = ("step", "checkpoint", "evaluation")


class Clock:
    """``since/<kind>`` and ``since/event`` in seconds, ``since/steps`` in median steps, ``disk/free`` in GiB, ``disk/hours_left``.

    ``hours_left`` is at the rate of the last six hours, and only there while the disk fills. After a resume everything starts afresh.
    """

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._seconds: deque[float] = deque(maxlen=STEPS)
        self._free: deque[tuple[float, float]] = deque(maxlen=SAMPLES)

    def observe(self, event: Mapping[str, Any]) -> None:
        """Note when an event came."""
        kind, time = event["kind"], event["time"]
        if kind == "checkpoint" or not self._last:
            self._last["checkpoint"] = time  # work done before it is saved; at the start there is none
        self._last |= {"event": time, **({kind: time} if kind in KINDS else {})}
        total = event.get("seconds", {}).get("total") if kind == "step" else None
        if total is not None:
            self._seconds.append(total)

    def disk(self, now: float, free: int) -> None:
        """Note the bytes that are free."""
        if not self._free or now - self._free[-1][0] >= SAMPLE_EVERY:
            self._free.append((now, free / GIB))

    def figures(self, now: float) -> dict[str, float]:
        """Everything known at ``now``, Unix seconds."""
        found = {f"since/{kind}": now - time for kind, time in self._last.items()}
        if "step" in self._last and self._seconds and (typical := median(self._seconds)) > 0:
            found["since/steps"] = (now - self._last["event"]) / typical
        if self._free:
            (first, before), (last, free) = self._free[0], self._free[-1]
            found["disk/free"] = free
            if last - first >= SPAN and free < before:
                found["disk/hours_left"] = free * (last - first) / (before - free) / 3600
        return found
