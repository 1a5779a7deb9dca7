"""The event log of a run: ``events.jsonl``, one JSON object per line, described in docs/events.md.

Appends are crash-safe: one ``write`` per line on a descriptor opened with O_APPEND, so a crash can tear only the last line.
Readers skip a torn last line; opening the log to write cuts it off. Nothing is ever rewritten: after a resume at step k the lost
steps stay in the file, and ``read_events`` leaves them out.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

SCHEMA = 1
FILE_NAME = "events.jsonl"
_BLOCK = 1 << 20  # bytes


class EventLogError(RuntimeError):
    """An event log cannot be read; the message names file, line and remedy."""


@dataclass(frozen=True)
class StepRecord:
    """One training step as the log holds it. Means are over main rows; entropies are nats per token at T=1."""

    step: int  # 0-based: the weights after it have version step + 1
    time: float  # Unix seconds at the end of the step
    entropy_sum: float  # nats, over main response tokens
    entropy_count: float  # main response tokens
    entropy_filtered: float  # what the controller acted on; NaN without a reading
    band_low: float
    band_high: float
    target: float  # ramped set-point; NaN without control
    temperature: float  # T+ used by this step's positives; 1 where the actuator is not a temperature
    command: float  # actuator command used by this step, in the actuator's unit
    actuator: str
    state: str  # of the controller after this step's reading, see ControlDecision
    reason: str
    reward: float  # mean over main rows
    positives: int  # correct rows that the actuator consumed
    all_equal_groups: float  # share of main groups whose rewards are all equal: they carry no advantage (ACR)
    response_length: float  # tokens
    truncated: float  # share of main rows that hit the length limit
    stale_samples: int  # dropped because weights of another version drew them
    verifier_errors: int  # samples that no verifier could judge
    loss: float
    grad_norm: float
    learning_rate: float
    weight_version: int  # version that drew this step's samples
    gain: float = math.nan  # of ln H per unit of the controller's u and step, as the law learnt it; NaN: none
    metrics: Mapping[str, float] = field(default_factory=dict)  # what the learner reported beyond
    seconds: Mapping[str, float] = field(
        default_factory=dict
    )  # sample, verify, batch, train (of it inside: learner), sync, other, total
    tokens: Mapping[str, int] = field(default_factory=dict)  # response tokens drawn: main, auxiliary, repeated
    sync: Mapping[str, float] = field(default_factory=dict)  # of the weight sync: bytes, buckets
    memory: Mapping[str, float] = field(default_factory=dict)  # GiB: driver, learner (largest rank), gpu (largest rank)
    engines: Mapping[str, float] = field(default_factory=dict)  # alive, total

    @property
    def entropy(self) -> float:
        """Nats per token; NaN when no token was seen."""
        return self.entropy_sum / self.entropy_count if self.entropy_count > 0 else math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON form; ``entropy`` is added. Numbers that are not finite become null when the event is written."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return plain | {"entropy": self.entropy}


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
        written = os.write(self._descriptor, line)
        if written != len(line):
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise OSError(errno.ENOSPC, "an event was written in part", str(self.path))

    def sync(self) -> None:
        """Flush everything appended so far to the disk."""
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
    try:
        return json.dumps(values, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(_finite(values), allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def read_events(path: Path) -> list[dict[str, Any]]:
    """The history in force: the events of ``path`` in order, less a torn last line and what a resume has superseded.

    Raises ``EventLogError`` for a missing file, a damaged line before the last, or a newer schema.
    """
    return in_force(read_all_events(path))


def read_all_events(path: Path) -> list[dict[str, Any]]:
    """Every complete event ever written, superseded ones included. Errors as ``read_events``."""
    if not path.is_file():
        raise EventLogError(f"{path} does not exist: give the folder of a run that was started")
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is nothing, or torn
    return [parse_event(line, number, path) for number, line in enumerate(lines, start=1)]


def in_force(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop what later events supersede.

    ``resume`` at step k (k updates done) supersedes earlier steps and alerts from step k on, evaluations and checkpoints after k updates,
    and an earlier ``run_end``. A step that is not beyond all before it supersedes those from its number on; a repeated evaluation
    or checkpoint of one step supersedes the earlier one.
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
        key = (event["kind"], event["step"] if event["kind"] in ("step", "evaluation", "checkpoint") else index)
        kept.pop(key, None)
        kept[key] = event
    return list(kept.values())


def _lost(event: dict[str, Any], resumed: int) -> bool:
    if event["kind"] in ("step", "alert"):
        return event["step"] >= resumed
    if event["kind"] in ("evaluation", "checkpoint"):
        return event["step"] > resumed
    return event["kind"] == "run_end"


def parse_event(line: bytes, number: int, path: Path) -> dict[str, Any]:
    """One line of a log. Raises ``EventLogError`` for a line that is no event, or of a newer schema."""
    try:
        event = json.loads(line)
        schema = event["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise EventLogError(
            f"{path}, line {number}, is not an event ({error}): remove the line to read the rest"
        ) from error
    if schema > SCHEMA:
        raise EventLogError(
            f"{path}, line {number}: event schema {schema}, this version reads up to {SCHEMA}: update isentrope"
        )
    return event


def cut_torn_line(path: Path) -> None:
    """Remove what a crash left after the last newline, so that the next line starts on its own; reads the end of the file only."""
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


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
