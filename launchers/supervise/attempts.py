"""Records the attempts at one run and how each ended, and decides whether there should be another.

``attempts.jsonl`` in the run's ``launch/`` folder has one line when an attempt starts and one when it ends. An attempt
that is lost (node failure, kill, time limit) writes no end; the next one writes it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from pipeline.monitoring.event_kinds import DamagedLineError, decoded
from pipeline.monitoring.events import FILE_NAME, EventReader

LAUNCH = "launch"  # folder in a run's
FILE = "attempts.jsonl"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """One attempt; ``end`` is "" while it runs."""

    number: int
    job_id: str
    restart: int  # Slurm's count of this job's requeues
    nodes: tuple[str, ...]
    first_step: int  # updates done when it started
    started: float  # Unix seconds
    end: str = ""  # completed | saved | cancelled | again | failed | lost
    last_step: int | None = None  # updates done when it ended
    ended: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class _Ending:
    """What the line at the end of an attempt says.

    The line at its start holds the fields of ``Attempt`` before ``end``.
    """

    number: int
    end: str
    last_step: int
    ended: float
    reason: str = ""


class _Head(msgspec.Struct):
    end: str = ""  # of a start there is none


_HEAD, _START, _END = msgspec.json.Decoder(_Head), msgspec.json.Decoder(Attempt), msgspec.json.Decoder(_Ending)


@dataclass(frozen=True)
class Progress:
    """How far a run has come, as its event log tells."""

    step: int  # updates done
    status: str  # completed | stopped | failed, of the newest run_end; "" if it has none
    error: str = ""


def progress(run_dir: Path) -> Progress:
    """What the event log of ``run_dir`` says; step 0 where there is none yet."""
    if not (run_dir / FILE_NAME).exists():
        return Progress(0, "")
    done, last = 0, dict[str, Any]()
    for last in EventReader(run_dir / FILE_NAME):
        if last["kind"] == "step":
            done = last["step"] + 1
        elif last["kind"] == "resume":
            done = min(done, last["step"])
    return Progress(done, last.get("status", ""), last.get("error", ""))  # none but run_end has these


def begun(run_dir: Path) -> bool:
    """Whether a run can be resumed: it has left its configuration and an event log."""
    return (run_dir / FILE_NAME).exists() and (run_dir / "config.yaml").exists()


class AttemptLog:
    """The attempts of the run in ``run_dir``."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / LAUNCH / FILE

    def read(self) -> list[Attempt]:
        """Every attempt, oldest first; of a torn last line nothing remains."""
        return read_attempts(self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else [], self.path)

    def start(self, job_id: str, restart: int, nodes: Sequence[str], first_step: int) -> Attempt:
        """Record that an attempt begins."""
        number = max((attempt.number for attempt in self.read()), default=-1) + 1
        attempt = Attempt(number, job_id, restart, tuple(nodes), first_step, time.time())
        entry = asdict(attempt)
        self._append({name: entry[name] for name in ("number", "job_id", "restart", "nodes", "first_step", "started")})
        return attempt

    def end(self, attempt: Attempt, end: str, last_step: int, reason: str = "") -> None:
        """Record how it ended."""
        ending = {"end": end, "last_step": last_step, "ended": time.time(), "reason": reason}
        self._append({"number": attempt.number, **ending})

    def _append(self, entry: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def read_attempts(lines: Iterable[bytes], path: Path) -> list[Attempt]:
    """The attempts that the lines of ``path`` tell of, oldest first.

    A damaged line is skipped, and said in the process's log.
    """
    found: dict[int, Attempt] = {}
    for number, line in enumerate(lines, start=1):
        try:
            if decoded(_HEAD, line).end:
                ending = decoded(_END, line)
                if ending.number in found:  # else its start is damaged
                    found[ending.number] = replace(found[ending.number], **asdict(ending))
            else:
                started = decoded(_START, line)
                found[started.number] = started
        except DamagedLineError as error:
            log.warning("%s, line %d is no attempt: %s; it is skipped", path, number, error)
    return list(found.values())


def gives_up(attempts: Sequence[Attempt], step: int, limit: int) -> str:
    """The reason why there should be no further attempt, "" if there should.

    The reason is that the last ``limit`` attempts have not gone beyond what the run had.

    ``step`` is how many updates are done now, ``attempts`` are those before. A cancelled attempt breaks the row; one
    that had to save before it completed a step does not: its walltime is too short.
    """
    row: list[Attempt] = []
    reached = step
    for attempt in reversed(attempts):
        if attempt.end in ("cancelled", "completed") or reached > attempt.first_step:
            break
        row.append(attempt)
        reached = attempt.first_step
    if len(row) < limit:
        return ""
    causes = {attempt.reason or "lost without a word: node failure, kill or time limit" for attempt in row}
    return f"{len(row)} attempts in a row did not get beyond step {step}: {'; '.join(sorted(causes))}"
