"""Notices that a run stands still: a thread in the training process, and a supervisor outside that watches the thread.

What is in progress (the start, a step, an evaluation, a checkpoint) counts as stalled when it has taken longer than the
median of its kind in this process plus ``monitoring.stall.factor`` allowances, and longer than ``min_seconds``. The
allowance is the median itself up to 60 s; above 60 s it grows as the square root of the median, because a long step
varies less, in proportion, than a short one. The first of its kind has nothing to be compared with: ``min_seconds``
stands for its median.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Required, TypedDict

import msgspec

from launchers.supervise.stacks import children, seen_from_outside
from pipeline.config.schema import RunConfig
from pipeline.monitoring.console import clean
from pipeline.monitoring.event_kinds import DamagedLineError, decoded
from pipeline.rollout.sglang.startup import startup_limit_s

if TYPE_CHECKING:
    from pipeline.monitoring.recorder import Recorder

log = logging.getLogger(__name__)

HEARTBEAT = "heartbeat.json"
STACKS = Path("logs") / "stacks"
INTERVAL_S = 5.0
# Nothing that hangs as well, Ray or the file system, may keep a stalled run from ending.
STACKS_TIMEOUT_S = 120.0
LAST_WORDS_S = 30.0
_SHORT_S = 60.0  # up to here, what may vary grows in proportion


class _Beat(TypedDict, total=False):
    time: Required[float]
    pid: Required[int]
    host: str
    step: int
    activity: str
    phase: str


_BEAT: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(_Beat)


class Others(Protocol):
    """The other processes of a run (``launchers.supervise.roll_call``)."""

    def collect(self, folder: Path) -> list[str]:
        """Have each of them write its stack into ``folder``; names of those that did not answer."""

    def end_silent(self) -> None:
        """End those that did not answer; the others notice by themselves that this process is gone."""


class Patience:
    """For how long something has looked the same, counted only while somebody looks: a suspended job is not stalled."""

    def __init__(self) -> None:
        self._seen = time.monotonic()
        self._sign: object = None
        self._seconds = 0.0

    def seconds(self, sign: object) -> float:
        """Seconds since ``sign`` changed; a look that comes late counts as three intervals at most."""
        now = time.monotonic()
        passed, self._seen = now - self._seen, now
        self._seconds = self._seconds + min(passed, 3 * INTERVAL_S) if sign == self._sign else 0.0
        self._sign = sign
        return self._seconds


def least_seconds(config: RunConfig) -> float:
    """``monitoring.stall.min_seconds``, and the time to find a dead SGLang engine and start it again within a step."""
    least = config.monitoring.stall.min_seconds
    if config.rollout.engine != "sglang":
        return least
    return (
        least + config.rollout.sglang.liveness_timeout_s + startup_limit_s(config.rollout, Path(config.model.hf_path))
    )


class Watchdog:
    """A thread that leaves heartbeats, tells the recorder the time, and helps a run that stands still.

    A context manager.

    ``others`` is None where this process is the only one of the run, but for its children.
    """

    def __init__(self, recorder: Recorder, config: RunConfig, others: Others | None) -> None:
        self._recorder, self._stall, self._others = recorder, config.monitoring.stall, others
        self._least = least_seconds(config)
        self._patience = Patience()
        self._reported = -1  # number of the activity whose stall is known
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(INTERVAL_S)  # not for ever: it may hang on a file system that does

    def _run(self) -> None:
        said = ""
        while not self._over.wait(INTERVAL_S):
            try:
                self.look()
                said = ""
            except Exception as error:  # whatever it is: without heartbeats the supervisor would kill a healthy run
                if repr(error) != said:  # once, not every few seconds
                    log.exception("the watchdog could not do its round")
                said = repr(error)

    def look(self) -> None:
        """Do one round of the watch."""
        write_heartbeat(self._recorder.run_dir, self._recorder.heartbeat())
        activity = self._recorder.activity
        number, waited = activity.number, self._patience.seconds(activity.number)
        limit = stall_limit(self._stall.factor, self._least, activity.typical())
        if waited > limit and number != self._reported:
            self._reported = number
            # In a thread of its own, so that heartbeats go on.
            threading.Thread(target=self._help, args=(number, waited), name="help", daemon=True).start()
        self._recorder.tick(time.time())

    def _help(self, number: int, waited: float) -> None:
        """Stacks, an event, and the end of the process if that is wanted and nothing has moved in between."""
        recorder, at = self._recorder, self._recorder.heartbeat()
        folder = recorder.run_dir / STACKS / f"{datetime.now():%Y%m%d-%H%M%S}"
        found: dict[str, list[str]] = {"stacks": [], "silent": []}
        within(STACKS_TIMEOUT_S, lambda: found.update(self._collect(folder)))
        action = self._stall.action if recorder.activity.number == number else "report"
        doing = f"{at['activity']}{at['phase'] and ': ' + at['phase']}"
        mute = f"; no answer from {', '.join(found['silent'])}" if found["silent"] else ""
        said = f"stalled: {waited:.0f} s in {doing} after {at['step']} steps{mute}; stacks: {folder}"
        log.error(said)
        event = {**at, "seconds": round(waited, 1), "factor": self._stall.factor, **found, "action": action}
        within(LAST_WORDS_S, lambda: recorder.stall(event, said))
        if action == "restart":
            if self._others is not None:
                within(LAST_WORDS_S, self._others.end_silent)
            _exit(recorder.run_dir)

    def _collect(self, folder: Path) -> dict[str, list[str]]:
        """``stacks``: files with the stacks of all; ``silent``: who did not answer."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "driver.txt").open("w") as file:
            faulthandler.dump_traceback(file)
            if self._others is None:
                file.writelines(f"\n{seen_from_outside(child)}" for child in children(os.getpid()))
        silent = self._others.collect(folder) if self._others is not None else []
        stacks = sorted(str(path.relative_to(self._recorder.run_dir)) for path in folder.glob("*"))
        return {"stacks": stacks, "silent": silent}


def stall_limit(factor: float, least: float, typical: float) -> float:
    """Seconds after which something counts as stalled.

    ``median + factor * sqrt(median * min(median, 60 s))``, at least ``least``.

    ``typical`` is that median, NaN for the first of its kind; ``factor`` 0: never.
    """
    if factor == 0:
        return math.inf
    median = least if math.isnan(typical) else typical
    return max(least, median + factor * math.sqrt(median * min(median, _SHORT_S)))


def write_heartbeat(run_dir: Path, values: dict[str, Any]) -> None:
    """Replace ``heartbeat.json``: time (Unix seconds), pid, host and ``values``."""
    written = run_dir / f".{HEARTBEAT}"
    beat = {"time": time.time(), "pid": os.getpid(), "host": socket.gethostname(), **values}
    written.write_text(json.dumps(beat) + "\n")
    written.replace(run_dir / HEARTBEAT)


def within(seconds: float, act: Callable[[], object]) -> bool:
    """Run ``act`` in a thread of its own and wait for it; False when it is not over in time."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


class Supervision:
    """What a supervisor sees of a training process that it started: whether its watchdog lives.

    A process whose heartbeat has not changed for as long as a stall takes at least hangs as a whole. Nothing is said
    before its first heartbeat, nor where stalls are not looked for, or only reported.
    """

    def __init__(self, run_dir: Path, pid: int, config: RunConfig) -> None:
        self._run_dir, self._pid = run_dir, pid
        self._wanted = config.monitoring.stall.factor > 0 and config.monitoring.stall.action == "restart"
        self._least = least_seconds(config)
        self._patience = Patience()
        self._looked = -math.inf

    def complaint(self) -> str:
        """Why the process should be killed, "" while it lives.

        Looks every few seconds only, however often it is called.
        """
        if not self._wanted or time.monotonic() - self._looked < INTERVAL_S:
            return ""
        self._looked = time.monotonic()
        beat = read_heartbeat(self._run_dir)
        seconds = self._patience.seconds((beat.get("pid"), beat.get("time")))
        if beat.get("pid") != self._pid or seconds <= self._least:
            return ""
        path = self._run_dir / STACKS / f"{datetime.now():%Y%m%d-%H%M%S}" / "driver.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(seen_from_outside(self._pid))
        return f"stalled: the training process gave no sign of life for {seconds:.0f} s; its stack: {path}"


def read_heartbeat(run_dir: Path) -> dict[str, Any]:
    """The newest heartbeat; empty when there is none.

    A damaged one counts as none, and is said in the process's log.
    """
    path = run_dir / HEARTBEAT
    try:
        return parse_heartbeat(path.read_bytes(), str(path))
    except OSError:
        return {}


def parse_heartbeat(content: bytes, path: str) -> dict[str, Any]:
    """What the file ``path`` says: the fields of ``write_heartbeat`` with their types.

    Empty where it is damaged, with a warning.
    """
    try:
        return decoded(_BEAT, content)
    except DamagedLineError as error:
        log.warning("%s is no heartbeat: %s; it counts as none", path, error)
        return {}


def _exit(run_dir: Path) -> None:
    """End this process at once, whatever its other threads hang in; the last line says how to go on."""
    sys.stdout.flush()
    sys.stderr.write(clean(f"stalled; go on with: isentrope train --resume {shlex.quote(str(run_dir))}\n"))
    sys.stderr.flush()
    os._exit(1)
