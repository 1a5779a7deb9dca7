"""The figures of a run as columns for charts and tables, however long the run.

``events.index/`` beside the log holds what was read of it so far, in segments (``segment.py``) of ``LINES`` lines of the log. Whoever
reads the log adds to it, the recorder of the run among them, so nobody ever reads all of a long log: a segment follows from the
log alone, two that write it at once write the same. What a resume rewinds is replaced by a segment of its own. An index that is
damaged, or of another log, is left behind and made anew.

Memory: 8 bytes for every figure of the last ``LINES`` steps, the events that are no steps, and while reading 8 bytes for each step
and column asked for (``column``) or 32 for each point (``read``).
"""

from __future__ import annotations

import bisect
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np

from pipeline.monitoring import segment as segments
from pipeline.monitoring.events import FILE_NAME, EventLogError, in_force, parse_event
from pipeline.monitoring.follow import EventReader
from pipeline.monitoring.metrics import scalars
from pipeline.monitoring.segment import BUCKET, DamagedError, Digest, Segment

FOLDER = "events.index"
LINES = 4096  # of the log that a segment holds
TRIES = 5  # to read a damaged index before the disk is blamed
# Columns beside those of metrics.py: Unix seconds, where the event begins in the log, the controller's state as a number.
TIME, OFFSET, STATE = "time", "offset", "state"
Chart = dict[str, Any]
T = TypeVar("T")


class Series:
    """Figures of one run, by the names of ``metrics.py``. Call ``update`` to see what has been written since. Not thread-safe.

    Raises ``EventLogError`` (here and in ``update``) as ``read_events`` does.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / FILE_NAME
        self._folder = self.run_dir / FOLDER
        self._elsewhere: TemporaryDirectory[str] | None = (
            None  # where segments go if the run's folder cannot be written
        )
        self._distrusted: set[Path] = set()
        self._open()
        self.update()

    @property
    def steps(self) -> int:
        """Steps in force: the number of the last one, plus one."""
        return self._next

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events in force that are no steps, in order, every restart and fault among them. One without a step has the steps done."""
        return in_force(event for piece in self._all() for event in piece.events)

    def update(self) -> bool:
        """Read what was appended to the log; says whether anything was."""
        before = self._reader.offset
        self._trusted(self._catch_up)
        return self._reader.offset != before

    def read(self, names: Sequence[str], first: int = 0, last: int | None = None, points: int = 2000) -> Chart:
        """Steps ``first`` to ``last`` (the last one in force) in at most ``points`` buckets of equal width, a power of two.

        Returns ``{"step": int64 [n], name: {"mean", "low", "high"}: float64 [n]}``, NaN where a bucket has no number; a bucket's
        step is its middle. Buckets begin at multiples of their width, so they do not move while a run grows. ``evaluation/...``
        stands at the number of updates done.
        """
        end = self._next if any(name.startswith("evaluation/") for name in names) else self._next - 1
        last = end if last is None else min(last, end)
        if last < first:
            empty = np.empty(0)
            return {"step": np.empty(0, np.int64), **{n: dict.fromkeys(("mean", "low", "high"), empty) for n in names}}
        width = 1
        while last // width - first // width + 1 > points:
            width *= 2
        digests = self._trusted(lambda: [self._digest(name, first, last, width) for name in (OFFSET, *names)])
        starts = (first // width + np.arange(last // width - first // width + 1)) * width
        middles = (np.maximum(starts, first) + np.minimum(starts + width - 1, last)) // 2
        seen = np.logical_or.reduce([digest.finite > 0 for digest in digests])
        curves = {name: _curve(digest, seen) for name, digest in zip(names, digests[1:], strict=True)}
        return {"step": middles[seen], **curves}

    def column(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """A figure of every step from ``first`` to ``last``: float64 [last - first + 1], NaN where there is none."""
        last = self._next - 1 if last is None else min(last, self._next - 1)

        def gather() -> np.ndarray:
            values = np.full(max(0, last - first + 1), np.nan)
            for piece in self._pieces(first, last):
                low, high = max(first, piece.first), min(last + 1, piece.stop)
                values[low - first : high - first] = piece.column(name)[low - piece.first : high - piece.first]
            return values

        return self._trusted(gather)

    def states(self) -> list[str]:
        """The controller's states, by the number that stands for them in the column ``state``."""
        return list(self._states)

    def in_state(self, state: str) -> np.ndarray:
        """Whether the controller was in a state, of every step: bool [steps]."""
        return self.column(STATE) == (self._states.index(state) if state in self._states else -1)

    def names(self) -> list[str]:
        """Every name that has a figure, in the order of their appearance."""
        found = dict.fromkeys(name for piece in self._all() for name in piece.names)
        evaluations = (scalars(event) for event in self.events if event["kind"] == "evaluation")
        found |= dict.fromkeys(name for figures in evaluations for name in figures)
        return [name for name in found if name not in (TIME, OFFSET, STATE)]

    def event(self, step: int) -> dict[str, Any] | None:
        """The ``step`` event of a step, as it was written; None if there is none."""
        offset = self.column(OFFSET, step, step) if 0 <= step < self._next else np.empty(0)
        if not len(offset) or np.isnan(offset[0]):
            return None
        with self.path.open("rb") as file:
            file.seek(int(offset[0]))
            return parse_event(file.readline(), 0, self.path)

    def marks(self) -> list[dict[str, Any]]:
        """What happened beside the steps, in order: dicts with ``step``, ``kind``, ``text``, ``severity`` (info, warning, critical)."""
        return [
            {"step": event["step"], "kind": kind, "text": text, "severity": severity}
            for event in self.events
            if event["kind"] in _MARKS
            for kind, text, severity in (_MARKS[event["kind"]](event),)
        ]

    def _open(self) -> None:
        """Begin with what the index holds of this log."""
        found = []
        for folder in (self._folder, *([Path(self._elsewhere.name)] if self._elsewhere else [])):
            for path in folder.glob(f"*{segments.SUFFIX}"):
                with suppress(DamagedError):
                    found += [] if path in self._distrusted else [segments.load(path)]
        self._chain = segments.chain(found)
        while self._chain and not self._is_line(self._chain[-1].end, self._chain[-1].last_line):
            self._chain.pop()
        last = self._chain[-1] if self._chain else None
        self._states = list(last.states) if last else []
        self._next = last.stop if last else 0
        self._reader = EventReader(self.path, last.end if last else 0, last.lines if last else 0)
        self._last_line = last.last_line if last else (0, 0)
        self._tail = _Tail(self._next, self._reader.offset, self._reader.lines)

    def _is_this_log(self) -> bool:
        """Whether the log still holds what was read of it: it may have been replaced."""
        return self._reader.offset == 0 or self._is_line(self._reader.offset, self._last_line)

    def _is_line(self, end: int, expected: tuple[int, int]) -> bool:
        length, check = expected
        with suppress(OSError), self.path.open("rb") as file:
            file.seek(max(0, end - length))
            return _fingerprint(file.read(length)) == (length, check)
        return False

    def _catch_up(self) -> None:
        """Read the log to its end."""
        try:
            if not self._is_this_log():
                self._open()
            while self._advance():
                pass
        except EventLogError:
            self._open()  # lines before the bad one were taken, their batch was not: begin again next time
            raise

    def _advance(self) -> bool:
        """Take the next lines of the log; says whether there were any."""
        start, first = self._reader.offset, self._reader.lines + 1
        lines = self._reader.poll_lines(1 << 23)
        for number, line in enumerate(lines, start=first):
            self._take(parse_event(line, number, self.path), start, line, number)
            start += len(line) + 1
        return bool(lines)

    def _take(self, event: Mapping[str, Any], start: int, line: bytes, number: int) -> None:
        """Enter one event, whose line begins at ``start``."""
        rewound = False
        try:
            if event["kind"] == "step":
                rewound = self._rewind(event["step"])
                if event["step"] > self._next and self._tail.rows:  # steps are missing: begin again behind the gap
                    self._close(start, number - 1)
                self._enter(event, start)
            else:
                if event["kind"] == "resume":
                    rewound = self._rewind(event["step"])
                self._tail.events.append({"step": self._next, **event})
        except (KeyError, TypeError, ValueError) as error:
            raise EventLogError(
                f"{self.path}, line {number}, is not a whole event ({error!r}): remove the line"
            ) from error
        self._last_line = _fingerprint(line + b"\n")
        if rewound or number - self._tail.lines >= LINES:
            self._close(start + len(line) + 1, number)

    def _enter(self, event: Mapping[str, Any], start: int) -> None:
        step, state = int(event["step"]), event["state"]
        if state not in self._states:
            self._states.append(state)
        if not self._tail.rows:
            self._tail.first = step
        own = {TIME: float(event["time"]), OFFSET: float(start), STATE: float(self._states.index(state))}
        self._tail.put(scalars(event) | own)
        self._next = step + 1

    def _rewind(self, step: int) -> bool:
        """Forget steps from ``step`` on; says whether segments of the index were among them."""
        if step >= self._next:
            return False
        in_tail = step >= self._tail.first or not (self._chain and self._chain[-1].stop > step)
        if in_tail:
            self._tail.cut(max(0, step - self._tail.first))
        else:
            self._reopen(step)
        before = self._chain[-1].stop if self._chain else 0
        self._next = self._tail.stop if self._tail.rows else before
        self._tail.first = self._next - self._tail.rows
        return not in_tail

    def _reopen(self, step: int) -> None:
        """Make one tail of what is left of the segments that hold ``step`` and later ones."""
        gone = []
        while self._chain and self._chain[-1].stop > step:
            gone.append(self._chain.pop())
        earliest, tail = gone[-1], self._tail
        kept = max(0, step - earliest.first)
        columns = {name: earliest.column(name)[:kept] for name in earliest.names}
        lines = self._chain[-1].lines if self._chain else 0
        self._tail = _Tail(earliest.first, earliest.start, lines, columns, kept)
        replaced: list[Segment | _Tail] = [*reversed(gone), tail]
        self._tail.events = [event for piece in replaced for event in piece.events]

    def _close(self, end: int, lines: int) -> None:
        """Turn the tail into a segment that ends at byte ``end`` of the log."""
        tail = self._tail
        columns = {name: tail.column(name) for name in tail.names}
        made = Segment(
            first=tail.first,
            rows=tail.rows,
            start=tail.start,
            end=end,
            lines=lines,
            last_line=self._last_line,
            events=tail.events,
            names=tail.names,
            states=list(self._states),
        )
        stale = [path for path in self._folder.glob(f"*{segments.SUFFIX}") if tail.start < int(path.stem) < end]
        self._chain.append(self._write(made, columns))
        for path in stale:
            with suppress(OSError):
                path.unlink()
        self._tail = _Tail(self._next, end, lines)

    def _write(self, made: Segment, columns: Mapping[str, np.ndarray]) -> Segment:
        if self._elsewhere is None:
            with suppress(OSError):
                return segments.write(self._folder, made, columns)
            self._elsewhere = TemporaryDirectory(prefix="isentrope-index-")
        return segments.write(Path(self._elsewhere.name), made, columns)

    def _trusted(self, read: Callable[[], T]) -> T:
        """What ``read`` returns; an index found damaged is made anew first."""
        for attempt in range(TRIES):
            try:
                if attempt:
                    self._catch_up()
                return read()
            except DamagedError as error:
                self._discard(error.path)
        raise OSError(f"{self._folder}: what is written there cannot be read back: is the disk damaged?")

    def _discard(self, damaged: Path) -> None:
        """Leave a segment behind, and with it those after it."""
        self._distrusted.add(damaged)
        with suppress(OSError):
            damaged.unlink()
        self._open()

    def _evaluations(self, name: str, first: int, last: int) -> Iterator[tuple[int, float]]:
        for event in self.events:
            if event["kind"] == "evaluation" and first <= event["step"] <= last and name in (found := scalars(event)):
                yield event["step"], found[name]

    def _digest(self, name: str, first: int, last: int, width: int) -> Digest:
        count = last // width - first // width + 1
        into = Digest(np.zeros(count), np.zeros(count), np.full(count, np.inf), np.full(count, -np.inf))
        if name.startswith("evaluation/"):
            for step, value in self._evaluations(name, first, last):
                _merge(
                    into, segments.digest(np.array([value]), step, width), np.array([step // width - first // width])
                )
            return into
        for piece in self._pieces(first, last):
            low, high = max(first, piece.first), min(last + 1, piece.stop)
            if width >= BUCKET and (low, high) == (piece.first, piece.stop):
                ids = (piece.first // BUCKET + np.arange(len((found := piece.digest(name)).finite))) * BUCKET // width
                _merge(into, found, ids - first // width)
            else:
                values = piece.column(name)[low - piece.first : high - piece.first]
                found = segments.digest(values, low, width)
                _merge(into, found, low // width - first // width + np.arange(len(found.finite)))
        return into

    def _all(self, begin: int = 0) -> list[Segment | _Tail]:
        return [*self._chain[begin:], self._tail]

    def _pieces(self, first: int, last: int) -> Iterator[Segment | _Tail]:
        begin = bisect.bisect_right(self._chain, first, key=lambda piece: piece.stop)
        for piece in self._all(begin):
            if piece.rows and piece.first <= last:
                yield piece


class _Tail:
    """The last figures of a log, not yet a segment: begins at byte ``start``, behind ``lines`` lines."""

    def __init__(
        self, first: int, start: int, lines: int, columns: Mapping[str, np.ndarray] | None = None, rows: int = 0
    ) -> None:
        self.first, self.start, self.lines, self.rows = first, start, lines, rows
        self.events: list[dict[str, Any]] = []
        self._columns = {name: self._empty(values) for name, values in (columns or {}).items()}

    @property
    def stop(self) -> int:
        return self.first + self.rows

    @property
    def names(self) -> list[str]:
        return list(self._columns)

    def put(self, figures: Mapping[str, float]) -> None:
        """Append one step."""
        for name, value in figures.items():
            if name not in self._columns:
                self._columns[name] = self._empty()
            self._columns[name][self.rows] = value
        self.rows += 1

    def cut(self, rows: int) -> None:
        """Keep the first ``rows`` steps only."""
        self.rows = rows
        for values in self._columns.values():
            values[rows:] = np.nan

    def column(self, name: str) -> np.ndarray:
        """As ``Segment.column``."""
        return self._columns.get(name, _NOTHING)[: self.rows]

    def digest(self, name: str) -> Digest:
        """As ``Segment.digest``."""
        return segments.digest(self.column(name), self.first, BUCKET)

    @staticmethod
    def _empty(begun: Sequence[float] | np.ndarray = ()) -> np.ndarray:
        values = np.full(LINES + 1, np.nan)
        values[: len(begun)] = begun
        return values


_NOTHING = np.full(LINES + 1, np.nan)


def _merge(into: Digest, found: Digest, at: np.ndarray) -> None:
    np.add.at(into.finite, at, found.finite)
    np.add.at(into.total, at, found.total)
    np.minimum.at(into.low, at, found.low)
    np.maximum.at(into.high, at, found.high)


def _curve(digest: Digest, seen: np.ndarray) -> dict[str, np.ndarray]:
    count, total, low, high = (values[seen] for values in digest)
    none = count == 0
    mean = np.divide(total, count, out=np.full(len(count), np.nan), where=~none)
    return {"mean": mean, "low": np.where(none, np.nan, low), "high": np.where(none, np.nan, high)}


def _fingerprint(line: bytes) -> tuple[int, int]:
    return len(line), zlib.crc32(line)


def _alert(event: Mapping[str, Any]) -> tuple[str, str, str]:
    over = event.get("state") == "end"
    rule = event.get("rule", event.get("condition", ""))
    text = f"{rule} is over" if over else f"{rule}: {event['reason']}"
    return "alert", text, "info" if over else event.get("severity", "warning")


def _evaluation(event: Mapping[str, Any]) -> tuple[str, str, str]:
    text = ", ".join(f"pass@{k} {estimate['value']:.3f}" for k, estimate in event["pass_at_k"].items())
    return "evaluation", text, "info"


def _end(event: Mapping[str, Any]) -> tuple[str, str, str]:
    text = f"{event['status']}{': ' + event['error'] if event.get('error') else ''}"
    return "end", text, "critical" if event["status"] == "failed" else "info"


# Kind of mark, text and severity, by kind of event.
_MARKS: dict[str, Callable[[Mapping[str, Any]], tuple[str, str, str]]] = {
    "resume": lambda event: ("restart", f"resumed after {event['step']} steps", "info"),
    "alert": _alert,
    "fault": lambda event: ("fault", event["description"], "warning"),
    "stall": lambda event: ("stall", f"no step for {event['seconds']:.0f} s", "critical"),
    "checkpoint": lambda event: ("checkpoint", event["path"], "info"),
    "evaluation": _evaluation,
    "run_end": _end,
}
