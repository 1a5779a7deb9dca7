"""The process beside the driver that hands the event log to sinks.

The sinks are TensorBoard, W&B, MLflow, Prometheus and the delivery of alerts.

``python -m pipeline.monitoring.deliver RUN [--driver PID] [key=value ...]``. With a driver it follows the log until
``run_end`` was delivered or the driver is gone; without one it delivers what the log holds, so that a run can be shown
elsewhere long after, e.g. ``python -m pipeline.monitoring.deliver runs/pi 'monitoring.sinks=[wandb]'``.

Every sink has a thread and a reader of its own: the log is its queue, so one that is slow falls behind and one that is
dead holds nothing and nobody up. How far each has come stands in ``RUN/sinks/<name>.json``; a later attempt goes on
from there.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

from pipeline.config.errors import ConfigError
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.disk import replacing
from pipeline.monitoring.console import clean, log_to_terminal
from pipeline.monitoring.events import FILE_NAME, EventLogError, EventReader
from pipeline.monitoring.sinks import Sink
from pipeline.monitoring.sinks.factory import build_sinks, problems

log = logging.getLogger("isentrope.deliver")

FOLDER = "sinks"  # in the run folder
POLL_S = 0.5
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 10.0  # between tries of what a sink could not take
DRAIN_S = 20.0  # that sinks have once the driver is gone
Result = TypeVar("Result")


class Follower(threading.Thread):
    """One sink and how far it has come."""

    def __init__(self, name: str, build: Callable[[], Sink], run_dir: Path, over: threading.Event) -> None:
        """``over``: nothing will be appended to the log any more."""
        super().__init__(name=name, daemon=True)
        self._build = build
        self._over = over
        self._saved = run_dir / FOLDER / f"{name}.json"
        self._reader = EventReader(run_dir / FILE_NAME, *read_position(self._saved))
        self._causes: set[str] = set()  # of what was left out, said once

    def run(self) -> None:
        """Deliver event by event until the run is over, then close the sink."""
        sink = self._attempt(self._build)
        if sink is None:
            log.error("%s: switched off until the run is resumed", self.name)
            return
        ended, saved = False, self._reader.offset
        try:
            while True:
                over = self._over.is_set()  # asked before the log is: what was appended until then is delivered
                events = self._reader.poll(limit_bytes=1)  # a single event: the position is exact
                for event in events:
                    self._attempt(partial(sink.event, event))
                    ended = event["kind"] == "run_end"
                if self._reader.offset != saved:
                    self._save()
                    saved = self._reader.offset
                if not events:
                    if ended or over:
                        break
                    self._over.wait(POLL_S)
        except EventLogError as error:
            log.error("%s: %s", self.name, error)
        self._attempt(sink.close)

    def _attempt(self, action: Callable[[], Result]) -> Result | None:
        """Do it, again and again while ``OSError`` says "not now"; None when another error says "never"."""
        wait, outage = FIRST_WAIT_S, set[str]()
        while True:
            try:
                result = action()
            except OSError as error:
                self._report(error, "trying again until it works", outage)
            except Exception as error:  # noqa: BLE001 - whatever a library raises must not end the other sinks' process
                self._report(error, "going on without this", self._causes)
                return None
            else:
                if outage:
                    log.warning("%s: works again", self.name)
                return result
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_S)

    def _report(self, error: Exception, consequence: str, known: set[str]) -> None:
        """Log an error once per cause: the same words but for numbers and addresses."""
        said = f"{type(error).__name__}: {error}"
        cause = re.sub(r"0x[0-9a-f]+|[0-9a-f]{16,}|\d+", "#", said)
        if cause not in known:
            known.add(cause)
            log.error("%s: %s; %s", self.name, said, consequence)

    def _save(self) -> None:
        size, lines = self._reader.offset, self._reader.lines
        try:
            with replacing(self._saved) as partial:
                partial.write_text(json.dumps({"bytes": size, "lines": lines}))
        except OSError as error:  # a full disk: the event is delivered all the same
            self._report(error, "a restart may deliver events twice", self._causes)


def read_position(path: Path) -> tuple[int, int]:
    """Bytes and lines of the log that a sink has taken; nothing yet where ``path`` does not exist or is damaged."""
    try:
        saved = json.loads(path.read_text())
        return int(saved["bytes"]), int(saved["lines"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0


def behind(run_dir: Path, names: list[str]) -> list[str]:
    """Those of the sinks that have not taken the whole log."""
    size = (run_dir / FILE_NAME).stat().st_size
    return [name for name in names if read_position(run_dir / FOLDER / f"{name}.json")[0] < size]


def follow(config: RunConfig, run_dir: Path, driver: int | None) -> bool:
    """Deliver until the run is over; whether every sink came to its end."""
    (run_dir / FOLDER).mkdir(exist_ok=True)
    over = threading.Event()

    def driver_gone() -> bool:
        return driver is None or os.getppid() != driver

    with _lock(run_dir / FOLDER / ".lock", driver_gone):
        followers = [Follower(name, build, run_dir, over) for name, build in build_sinks(config, run_dir).items()]
        for follower in followers:
            follower.start()
        while any(follower.is_alive() for follower in followers) and not driver_gone():
            time.sleep(POLL_S)
        over.set()
        deadline = math.inf if driver is None else time.monotonic() + DRAIN_S
        while any(follower.is_alive() for follower in followers) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        late = [follower.name for follower in followers if follower.is_alive()]
    if late:
        log.error("ends although %s did not take everything; resuming the run goes on from there", " and ".join(late))
    return not late


def _lock(path: Path, give_up: Callable[[], bool]) -> IO[str]:
    """Hold ``path`` alone, once the process of an attempt that was killed has delivered the rest."""
    file = path.open("w")
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if give_up():
                file.close()
                raise SystemExit(f"{path} is locked: another process delivers this run") from None
        time.sleep(POLL_S)


def main() -> None:
    """The command line of the module; exit code 2 for what cannot be delivered, 1 when not everything was."""
    what = "Hand a run's events to its sinks."
    parser = argparse.ArgumentParser(prog="python -m pipeline.monitoring.deliver", description=what)
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument("--driver", type=int, help="process whose run this is; none: deliver what is there and end")
    parser.add_argument("overrides", nargs="*", help="key=value over the run's configuration")
    arguments = parser.parse_args()
    log_to_terminal(logging.WARNING, "%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it announces every retry
    try:
        config = load_config(arguments.run_dir / "config.yaml", arguments.overrides, check=False)
        if arguments.driver is None:  # a driver has seen to it
            _refuse(config, arguments.run_dir)
    except ConfigError as error:
        parser.exit(2, clean(f"{error}\n"))
    if arguments.driver is not None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # they ask the driver to end; this ends after it
            signal.signal(number, signal.SIG_IGN)
        os.nice(10)  # training comes first
    if not follow(config, arguments.run_dir, arguments.driver):
        os._exit(1)  # not past a thread that hangs


def _refuse(config: RunConfig, run_dir: Path) -> None:
    """Raises ``ConfigError`` when nothing could be delivered."""
    found = problems(config)
    if found:
        raise ConfigError.of(found)
    if not build_sinks(config, run_dir):
        raise ConfigError("monitoring.sinks", [], "nowhere to deliver to", "name a sink: 'monitoring.sinks=[wandb]'")


if __name__ == "__main__":
    main()
