"""A piece of the index beside an event log: the figures of a few thousand lines as columns, written once and never changed.

File: one line of JSON that says what is inside, then float64 columns one behind the other, native byte order, for each name
``rows`` values (NaN: none), and for each name its digest (``digest``). Everything is guarded by CRC-32, so that what a power cut or
a full disk left is recognised and thrown away.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

VERSION = 1
SUFFIX = ".segment"
BUCKET = 64  # steps that one entry of a digest stands for


class DamagedError(RuntimeError):
    """A segment cannot be trusted, for ``why``; remove it, its log holds the same."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} {why}")
        self.path = path


class Digest(NamedTuple):
    """What a chart needs of the values in a bucket of steps: how many are finite, their sum, the least and the largest.

    Each is float64 [buckets]; an empty bucket has 0, 0, inf, -inf.
    """

    finite: np.ndarray
    total: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Segment:
    """Lines ``[start, end)`` (bytes) of a log, as they stand at ``end``: steps ``[first, first + rows)`` and all other events."""

    first: int
    rows: int
    start: int
    end: int
    lines: int  # of the log before ``end``
    last_line: tuple[int, int]  # length and CRC-32 of the line that ends at ``end``: what tells this log from another
    events: list[dict[str, Any]]  # that are no steps, in order
    names: list[str]
    states: list[str]  # what the numbers in the column ``state`` stand for
    path: Path = field(default=Path(), compare=False)
    at: int = field(default=0, compare=False)  # where the columns begin in the file
    checks: list[list[int]] = field(default_factory=list, compare=False)  # CRC-32 of column and digest, by name

    @property
    def stop(self) -> int:
        """The step behind the last one."""
        return self.first + self.rows

    def column(self, name: str) -> np.ndarray:
        """float64 [rows]; NaN where the log has no number. Raises ``DamagedError``."""
        if name not in self.names:
            return np.full(self.rows, np.nan)
        position = self.names.index(name)
        return self._read(self.at + 8 * self.rows * position, self.rows, self.checks[position][0])

    def digest(self, name: str) -> Digest:
        """Of each bucket from ``first // BUCKET`` on. Raises ``DamagedError``."""
        buckets = _buckets(self.first, self.rows, BUCKET)
        if name not in self.names:
            return Digest(np.zeros(buckets), np.zeros(buckets), np.full(buckets, np.inf), np.full(buckets, -np.inf))
        position = self.names.index(name)
        behind = self.at + 8 * (self.rows * len(self.names) + 4 * buckets * position)
        return Digest(*self._read(behind, 4 * buckets, self.checks[position][1]).reshape(4, buckets))

    def _read(self, offset: int, count: int, check: int) -> np.ndarray:
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                content = file.read(8 * count)
        except OSError as error:
            raise DamagedError(self.path, str(error)) from error
        if zlib.crc32(content) != check:
            raise DamagedError(self.path, "is damaged")
        return np.frombuffer(content)


def digest(values: np.ndarray, first: int, width: int) -> Digest:
    """The digest of values [n] of steps ``first``, ``first + 1``, ... in buckets ``first // width`` and on."""
    finite = np.isfinite(values)
    into = ((first + np.arange(len(values))) // width - first // width)[finite]
    values, buckets = values[finite], _buckets(first, len(finite), width)
    low, high = np.full(buckets, np.inf), np.full(buckets, -np.inf)
    np.minimum.at(low, into, values)
    np.maximum.at(high, into, values)
    count, total = np.bincount(into, minlength=buckets), np.bincount(into, values, minlength=buckets)
    return Digest(count.astype(float), total, low, high)


def write(folder: Path, segment: Segment, columns: Mapping[str, np.ndarray]) -> Segment:
    """Write a segment whose ``names`` are the keys of ``columns``; it appears complete or not at all. Raises ``OSError``."""
    digests = [np.stack(digest(columns[name], segment.first, BUCKET)).tobytes() for name in segment.names]
    plain = [np.ascontiguousarray(columns[name], dtype=float).tobytes() for name in segment.names]
    checks = [[zlib.crc32(column), zlib.crc32(summed)] for column, summed in zip(plain, digests, strict=True)]
    described = {name: value for name, value in vars(segment).items() if name not in ("path", "at", "checks")}
    body = json.dumps({"version": VERSION, **described, "checks": checks}, separators=(",", ":")).encode()
    head = b"%08x %s\n" % (zlib.crc32(body), body)
    path = folder / f"{segment.end:016d}{SUFFIX}"
    folder.mkdir(exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        partial.write_bytes(b"".join([head, *plain, *digests]))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return Segment(**described, path=path, at=len(head), checks=checks)


def load(path: Path) -> Segment:
    """What a file says it holds. Raises ``DamagedError``, also for a file of another version of this format."""
    try:
        with path.open("rb") as file:
            head = file.readline()
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise DamagedError(path, str(error)) from error
    check, _, body = head.rstrip(b"\n").partition(b" ")
    if check != b"%08x" % zlib.crc32(body):
        raise DamagedError(path, "is damaged")
    said = json.loads(body)
    if said.pop("version") != VERSION:
        raise DamagedError(path, "is of another version")
    said["last_line"] = tuple(said["last_line"])
    segment = Segment(**said, path=path, at=len(head))
    if size != len(head) + 8 * len(segment.names) * (segment.rows + 4 * _buckets(segment.first, segment.rows, BUCKET)):
        raise DamagedError(path, "is cut off")
    return segment


def chain(segments: Sequence[Segment]) -> list[Segment]:
    """Of segments in any order, those that together describe a log from its start on, without a gap or an overlap.

    A segment written after a resume starts where the first one that it replaces started.
    """
    joined: list[Segment] = []
    for segment in sorted(segments, key=lambda segment: segment.end):
        kept = [other for other in joined if other.end <= segment.start]
        if segment.start == (kept[-1].end if kept else 0):
            joined = [*kept, segment]
    return joined


def _buckets(first: int, rows: int, width: int) -> int:
    return (first + rows - 1) // width - first // width + 1 if rows else 0
