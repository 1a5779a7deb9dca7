"""Reads the figures of a run from its event log into columns for charts and tables.

Memory: 8 bytes for each figure of each step (100,000 steps of 64 figures: 50 MB) and the events that are no steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.monitoring.event_kinds import parse_event
from pipeline.monitoring.events import FILE_NAME, EventReader, in_force
from pipeline.monitoring.metrics import scalars, step_columns
from pipeline.monitoring.naming import counted

LAST_STEPS = 20  # steps that a figure "now", or at the end of a run, is the mean of
CHUNK = 1 << 18  # bytes of the log that are parsed at a time: few live objects cost the garbage collector little
# Columns beside those of metrics.py: Unix seconds, where the event begins in the log, the controller's state as a
# number.
TIME, OFFSET, STATE = "time", "offset", "state"
Chart = dict[str, Any]


class Series:
    """Figures of one run, by the names of ``metrics.py``.

    Call ``update`` to see what has been written since. Not thread-safe.

    Raises ``EventLogError`` (here and in ``update``) as ``read_events`` does.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / FILE_NAME
        self._first_line = b""  # tells this log from another in its place
        self._begin()
        self.update()

    @property
    def steps(self) -> int:
        """Steps in force: the number of the last one, plus one."""
        return int(self._table.steps[-1]) + 1 if len(self._table.steps) else 0

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events in force that are no steps, in order, every restart and fault among them.

        One without a step has the steps done."""
        return in_force(self._events)

    @property
    def damage(self) -> tuple[int, str]:
        """How many lines of the log are no events, and what is wrong with the first."""
        return self._reader.damaged, self._reader.damage

    def update(self) -> bool:
        """Read what was appended to the log; says whether anything was."""
        if not self._is_this_log():
            self._begin()
        before = self._reader.offset
        while found := self._reader.poll_placed(CHUNK):
            self._take(found)
        if not self._first_line:
            self._first_line = self._read_line(0)
        return self._reader.offset != before

    def read(self, names: Sequence[str], first: int = 0, last: int | None = None, points: int = 2000) -> Chart:
        """Steps ``first`` to ``last`` (the last one in force) in at most ``points`` buckets.

        Buckets have equal width, a power of two.

        Returns ``{"step": int64 [n], name: {"mean", "low", "high"}: float64 [n]}``, NaN where a bucket has no number; a
        bucket's step is its middle. Buckets begin at multiples of their width, so they do not move while a run grows.
        ``evaluation/...`` stands at the number of updates done.
        """
        end = self.steps if any(name.startswith("evaluation/") for name in names) else self.steps - 1
        last = end if last is None else min(last, end)
        width = 1
        while last // width - first // width + 1 > points:
            width *= 2
        starts = np.arange(first // width, last // width + 1) * width
        middles = (np.maximum(starts, first) + np.minimum(starts + width - 1, last)) // 2
        curves = {name: _curve(*self._points(name, first, last), starts, width) for name in (OFFSET, *names)}
        seen = np.logical_or.reduce([np.isfinite(curve["mean"]) for curve in curves.values()])
        drawn = {name: {kind: values[seen] for kind, values in curves[name].items()} for name in names}
        return {"step": middles[seen], **drawn}

    def column(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """A figure of every step from ``first`` to ``last``: float64 [last - first + 1], NaN where there is none."""
        last = self.steps - 1 if last is None else min(last, self.steps - 1)
        values = np.full(max(0, last - first + 1), np.nan)
        rows = self._table.between(first, last)
        values[self._table.steps[rows] - first] = self._table.column(name)[rows]
        return values

    def recent_mean(self, name: str) -> float:
        """Mean of a figure over the last ``LAST_STEPS`` steps; NaN without one."""
        values = self.column(name, max(0, self.steps - LAST_STEPS))
        return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan

    def states(self) -> list[str]:
        """The controller's states, by the number that stands for them in the column ``state``."""
        return list(self._states)

    def in_state(self, state: str) -> np.ndarray:
        """Whether the controller was in a state, of every step: bool [steps]."""
        return self.column(STATE) == self._states.get(state, -1)

    def names(self) -> list[str]:
        """Every name that has a figure, in the order of their appearance."""
        evaluations = (scalars(event) for event in self.events if event["kind"] == "evaluation")
        found = dict.fromkeys([*self._table.names(), *(name for figures in evaluations for name in figures)])
        return [name for name in found if name not in (TIME, OFFSET, STATE)]

    def event(self, step: int) -> dict[str, Any] | None:
        """The ``step`` event of a step, as it was written; None if there is none."""
        rows = self._table.between(step, step)
        offsets = self._table.column(OFFSET)[rows]
        return parse_event(self._read_line(int(offsets[0])).rstrip(b"\n")) if len(offsets) else None

    def marks(self) -> list[dict[str, Any]]:
        """What happened beside the steps, in order.

        Dicts with ``step``, ``kind``, ``text``, ``severity`` (info, warning, critical).
        """
        return [
            {"step": event["step"], "kind": kind, "text": text, "severity": severity}
            for event in self.events
            if event["kind"] in _MARKS
            for kind, text, severity in (_MARKS[event["kind"]](event),)
        ]

    def _begin(self) -> None:
        self._reader = EventReader(self.path)
        self._first_line = b""
        self._table = _Table()
        self._events: list[dict[str, Any]] = []
        self._states: dict[str, int] = {}

    def _is_this_log(self) -> bool:
        """Whether the log still holds what was read of it: it may have been replaced."""
        with suppress(OSError):
            return self.path.stat().st_size >= self._reader.offset and self._read_line(0).startswith(self._first_line)
        return True  # the reader says what is wrong

    def _read_line(self, offset: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            line = file.readline()
        return line if line.endswith(b"\n") else b""

    def _take(self, found: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Enter events, each with the byte at which its line begins."""
        ahead: list[tuple[int, Mapping[str, Any]]] = []  # steps that follow each other
        for offset, event in found:
            if event["kind"] == "step":
                if ahead and event["step"] <= ahead[-1][1]["step"]:
                    self._enter(ahead)
                    ahead = []
                ahead.append((offset, event))
                continue
            self._enter(ahead)
            ahead = []
            if event["kind"] == "resume":
                self._table.forget_from(event["step"])
            self._events.append({"step": self.steps, **event})
        self._enter(ahead)

    def _enter(self, ahead: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
        if not ahead:
            return
        events = [event for _, event in ahead]
        states = [self._states.setdefault(event["state"], len(self._states)) for event in events]
        own = {TIME: [event["time"] for event in events], OFFSET: [offset for offset, _ in ahead], STATE: states}
        self._table.forget_from(events[0]["step"])
        self._table.append([event["step"] for event in events], step_columns(events) | own)

    def _points(self, name: str, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a figure from ``first`` to ``last``."""
        if name.startswith("evaluation/"):
            found = [(e["step"], scalars(e)) for e in self.events if e["kind"] == "evaluation"]
            points = [(step, values[name]) for step, values in found if first <= step <= last and name in values]
            return np.array([step for step, _ in points], int), np.array([value for _, value in points], float)
        rows = self._table.between(first, last)
        return self._table.steps[rows], self._table.column(name)[rows]


class _Table:
    """Columns that grow: one row per step in force, in order."""

    def __init__(self) -> None:
        self._rows = 0
        self._steps = np.empty(0, np.int64)
        self._columns: dict[str, np.ndarray] = {}

    @property
    def steps(self) -> np.ndarray:
        """The step of each row: int64 [rows], ascending."""
        return self._steps[: self._rows]

    def names(self) -> list[str]:
        """Those of the columns that have a number."""
        return [name for name in self._columns if np.isfinite(self.column(name)).any()]

    def column(self, name: str) -> np.ndarray:
        """float64 [rows]; NaN where the log has no number."""
        return self._columns[name][: self._rows] if name in self._columns else np.full(self._rows, np.nan)

    def between(self, first: int, last: int) -> slice:
        """The rows of steps ``first`` to ``last``."""
        return slice(*np.searchsorted(self.steps, [first, last + 1]).tolist())

    def forget_from(self, step: int) -> None:
        """Drop the rows of this step and of later ones."""
        self._rows = self.between(0, step - 1).stop

    def append(self, steps: Sequence[int], columns: Mapping[str, Sequence[float | None]]) -> None:
        """Add rows; None stands for no number."""
        before, self._rows = self._rows, self._rows + len(steps)
        self._steps = _grown(self._steps, before, self._rows)
        self._steps[before : self._rows] = steps
        for name in columns.keys() - self._columns.keys():
            self._columns[name] = np.full(before, np.nan)
        for name, values in self._columns.items():
            self._columns[name] = grown = _grown(values, before, self._rows)
            grown[before : self._rows] = np.array(columns[name], float) if name in columns else np.nan


def _grown(values: np.ndarray, used: int, needed: int) -> np.ndarray:
    """``values`` with room for ``needed`` entries, the first ``used`` of them kept."""
    if needed <= len(values):
        return values
    room = np.empty(max(needed, 2 * len(values)), values.dtype)
    room[:used] = values[:used]
    return room


def _curve(steps: np.ndarray, values: np.ndarray, starts: np.ndarray, width: int) -> dict[str, np.ndarray]:
    """Mean, least and largest value of each bucket of steps that begins at ``starts``, NaN where it has none."""
    finite = np.isfinite(values)
    values, count = values[finite], len(starts)
    into = steps[finite] // width - (starts[0] // width if count else 0)
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, into, values)
    np.maximum.at(high, into, values)
    number, total = np.bincount(into, minlength=count), np.bincount(into, values, minlength=count)
    none = number == 0
    mean = np.divide(total, number, out=np.full(count, np.nan), where=~none)
    return {"mean": mean, "low": np.where(none, np.nan, low), "high": np.where(none, np.nan, high)}


def _alert(event: Mapping[str, Any]) -> tuple[str, str, str]:
    if event["state"] == "end":
        return "alert", f"{event['rule']} is over", "info"
    return "alert", f"{event['rule']}: {event['reason']}", event["severity"]


def _evaluation(event: Mapping[str, Any]) -> tuple[str, str, str]:
    text = ", ".join(f"pass@{k} {estimate['value']:.3f}" for k, estimate in event["pass_at_k"].items())
    return "evaluation", text, "info"


def _end(event: Mapping[str, Any]) -> tuple[str, str, str]:
    text = f"{event['status']}{': ' + event['error'] if event.get('error') else ''}"
    return "end", text, "critical" if event["status"] == "failed" else "info"


# Kind of mark, text and severity, by kind of event.
_MARKS: dict[str, Callable[[Mapping[str, Any]], tuple[str, str, str]]] = {
    "resume": lambda event: ("restart", f"resumed after {counted(event['step'], 'step')}", "info"),
    "alert": _alert,
    "fault": lambda event: ("fault", event["description"], "warning"),
    "stall": lambda event: ("stall", f"no step for {event['seconds']:.0f} s", "critical"),
    "checkpoint": lambda event: ("checkpoint", event["path"], "info"),
    "evaluation": _evaluation,
    "run_end": _end,
}
