"""The event log of a run: ``events.jsonl``, one JSON object per line, described in docs/events.md.

Appends are crash-safe: one ``write`` per line on a descriptor opened with O_APPEND, so a crash can tear only the last
line. Readers leave a torn last line alone; opening the log to write cuts it off. A damaged line before the last is
skipped, counted and reported: what a run has done must not depend on one bad line. Nothing is ever rewritten: after a
resume at step k the lost steps stay in the file, and ``read_events`` leaves them out.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from pipeline.disk import naming
from pipeline.monitoring.event_kinds import SCHEMA, DamagedLineError, parse_event

log = logging.getLogger(__name__)

FILE_NAME = "events.jsonl"
_BLOCK = 1 << 20  # bytes
_ENCODER = msgspec.json.Encoder(enc_hook=lambda value: value.item())  # of NumPy numbers
_BETWEEN_STEPS = ("evaluation", "band", "snapshot", "checkpoint")  # kinds whose ``step`` counts the updates done before


class EventLogError(RuntimeError):
    """An event log cannot be read; the message names the file and the remedy."""


class EventLog:
    """An append-only log of events, open for writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        cut_torn_line(path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def append(self, kind: str, values: Mapping[str, Any]) -> None:
        """Write one event in a single call; ``sync`` makes it survive a power cut.

        Raises ``OSError`` when the disk is full; the log then ends with the event before.
        """
        line = to_json({"schema": SCHEMA, "kind": kind, **values}).encode() + b"\n"
        with naming(self.path):
            written = os.write(self._descriptor, line)
        if written != len(line):
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise OSError(errno.ENOSPC, "an event was written in part", str(self.path))

    def sync(self) -> None:
        """Flush everything appended so far to the disk."""
        with naming(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Flush and close. Idempotent."""
        if self._descriptor >= 0:
            self.sync()
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def to_json(values: Mapping[str, Any] | Sequence[Any]) -> str:
    """One line of strict JSON: NaN and infinities, which JSON lacks, become null."""
    return _ENCODER.encode(values).decode()


class EventReader:
    """The complete events of a log, once each, in the order written; superseded ones included, as nobody can know yet.

    Holds no file open between polls. Memory and time of a poll go with what is new. Starts behind the first ``lines``
    lines, which are ``offset`` bytes. A damaged line is skipped and counted; the first one is said in the log of the
    process.
    """

    def __init__(self, path: Path, offset: int = 0, lines: int = 0) -> None:
        self.path = path
        self.offset = offset  # bytes read, always the start of a line
        self.lines = lines
        self.damaged = 0  # lines that are no events
        self.damage = ""  # which is the first of them, and why

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """What the log holds now from here on, held in memory a piece at a time. Errors as ``poll``."""
        while found := self.poll(_BLOCK):
            yield from found

    def poll(self, limit_bytes: int = 1 << 26) -> list[dict[str, Any]]:
        """Events appended since the last poll, of about ``limit_bytes`` at most, so poll until nothing comes.

        Raises ``EventLogError`` for a missing file or a log that became shorter than what was read.
        """
        return [event for _, event in self.poll_placed(limit_bytes)]

    def poll_placed(self, limit_bytes: int) -> list[tuple[int, dict[str, Any]]]:
        """As ``poll``, each event with the byte at which its line begins."""
        while content := self._complete_lines(limit_bytes):
            if found := list(self._events(content)):
                return found
        return []

    def _events(self, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
        for line in content.split(b"\n")[:-1]:
            begin = self.offset
            self.offset += len(line) + 1
            self.lines += 1
            try:
                yield begin, parse_event(line)
            except DamagedLineError as error:
                self._skip(error)

    def _skip(self, error: DamagedLineError) -> None:
        self.damaged += 1
        if self.damaged == 1:
            self.damage = f"line {self.lines} is no event: {error}"
            log.warning("%s, %s; such lines are skipped, what they told is lost", self.path, self.damage)

    def _complete_lines(self, limit_bytes: int) -> bytes:
        if not self.path.is_file():
            raise EventLogError(f"{self.path} does not exist: give the folder of a run that was started")
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self.offset:
                raise EventLogError(f"{self.path} became shorter while it was read: was it replaced? Start again")
            file.seek(self.offset)
            content = file.read(limit_bytes)
            if content and b"\n" not in content:
                content += file.readline()  # a line longer than the limit
        return content[: content.rfind(b"\n") + 1]  # what follows the last newline is nothing, or torn


def run_id(run_dir: Path) -> str:
    """16 hex digits that name this run only, made from the first event of the log.

    The same after every resume and wherever the folder goes.
    """
    with (run_dir / FILE_NAME).open("rb") as events:
        return hashlib.sha256(events.readline()).hexdigest()[:16]


def read_events(path: Path) -> list[dict[str, Any]]:
    """The history in force: the events of ``path`` in order, less what a resume has superseded.

    Raises ``EventLogError`` for a missing file.
    """
    return in_force(read_all_events(path))


def read_all_events(path: Path) -> list[dict[str, Any]]:
    """Every complete event ever written, superseded ones included. Raises ``EventLogError`` for a missing file."""
    return list(EventReader(path))


def in_force(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop what later events supersede.

    ``resume`` at step k (k updates done) supersedes earlier steps and alerts from step k on, evaluations,
    snapshots and checkpoints after k updates, and an earlier ``run_end``. A step that is not beyond all before it
    supersedes those from its number on; a repeated evaluation, snapshot or checkpoint of one step supersedes the
    earlier one.
    """
    kept: dict[tuple[str, int], dict[str, Any]] = {}
    last = -1
    for index, event in enumerate(events):
        if event["kind"] == "resume":
            kept = {key: old for key, old in kept.items() if not _lost(old, event["step"])}
            last = min(last, event["step"] - 1)
        if event["kind"] == "step":
            for step in range(event["step"], last + 1):
                kept.pop(("step", step), None)
            last = event["step"]
        key = (event["kind"], event["step"] if event["kind"] in ("step", *_BETWEEN_STEPS) else index)
        kept.pop(key, None)
        kept[key] = event
    return list(kept.values())


def _lost(event: dict[str, Any], resumed: int) -> bool:
    if event["kind"] in ("step", "alert"):
        return event["step"] >= resumed
    if event["kind"] in _BETWEEN_STEPS:
        return event["step"] > resumed
    return event["kind"] == "run_end"


def cut_torn_line(path: Path) -> None:
    """Remove what a crash left after the last newline, so that the next line starts on its own.

    Reads the end of the file only.
    """
    if not path.is_file():
        return
    with path.open("rb+") as file:
        end = start = file.seek(0, os.SEEK_END)
        kept = 0
        while start and not kept:
            stop, start = start, max(0, start - _BLOCK)
            file.seek(start)
            newline = file.read(stop - start).rfind(b"\n")
            kept = start + newline + 1 if newline >= 0 else 0
        if kept < end:
            file.truncate(kept)
