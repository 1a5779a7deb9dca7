"""Starts and ends a run's sidecar: the process that delivers its events (``pipeline.monitoring.deliver``)."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.config.schema import RunConfig
from pipeline.monitoring.deliver import behind
from pipeline.monitoring.sinks.factory import build_sinks

log = logging.getLogger(__name__)

FAREWELL_S = 30.0  # that sinks have for what is left when training is over


class Sidecar:
    """The process that hands events to sinks; none where no sink is configured.

    Enter it before the recorder, which writes the last event.
    """

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        """Of sinks that ``factory.problems`` has nothing to say about; nothing is started."""
        self._run_dir = run_dir
        self._sinks = list(build_sinks(config, run_dir))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start following the log, which must exist. A sidecar that cannot start is a warning: the run goes on."""
        if not self._sinks:
            return
        logs = self._run_dir / "logs"
        logs.mkdir(exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "pipeline.monitoring.deliver",
            str(self._run_dir),
            "--driver",
            str(os.getpid()),
        ]
        with (logs / "sidecar.log").open("ab") as output:
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                )
            except OSError as error:
                log.warning("sinks get nothing, their process cannot be started: %s", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the last events to be delivered, but not for a sink that is dead."""
        if self._process is None:
            return
        try:
            self._process.wait(FAREWELL_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        late = behind(self._run_dir, self._sinks)
        if late:
            where = self._run_dir / "logs" / "sidecar.log"
            log.warning("%s did not take every event: see %s", " and ".join(late), where)
