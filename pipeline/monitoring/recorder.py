"""Writes a run's folder while the run goes on: config.yaml, events.jsonl, samples/, and at the end report.html."""

from __future__ import annotations

import fcntl
import importlib.metadata
import logging
import platform
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from pipeline.checkpoints import Checkpoint
from pipeline.clock import StepClock
from pipeline.config.errors import ConfigError
from pipeline.config.load import config_hash, to_yaml
from pipeline.config.schema import RunConfig
from pipeline.data.sources import PromptSet
from pipeline.data.tokenizer import Tokenizer
from pipeline.disk import replacing
from pipeline.monitoring.activity import Activity
from pipeline.monitoring.alerts.alert import Alert
from pipeline.monitoring.alerts.engine import AlertEngine, replayed
from pipeline.monitoring.alerts.rules import constants_of, rules_of
from pipeline.monitoring.events import FILE_NAME, EventLog, EventReader, in_force
from pipeline.monitoring.progress import Progress
from pipeline.monitoring.samples import write_samples
from pipeline.monitoring.step_record import step_record
from pipeline.types import StepOutcome

log = logging.getLogger(__name__)

PACKAGES = ("isentrope", "torch", "megatron-core", "transformers", "sglang", "ray")
LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.ERROR}


class Recorder:
    """The sink of one run; a context manager that closes the log whatever happens.

    One thread records; a watchdog may call ``tick``, ``stall`` and ``heartbeat`` from its own. Raises ``ConfigError``
    when ``run_dir`` cannot be made, or already holds a run that is not being resumed.
    """

    def __init__(self, run_dir: Path, config: RunConfig, *, resumed: bool = False) -> None:
        if not resumed and (run_dir / FILE_NAME).exists():
            remedy = f"continue it with --resume {run_dir}, or choose another run_dir"
            raise ConfigError("run_dir", str(run_dir), "this folder already holds a run", remedy)
        self.run_dir = run_dir
        self.activity = Activity()
        self._clock = StepClock()
        self._done = 0  # updates
        self._writing = threading.RLock()  # held over every change of the log
        self._config = config
        self._resumed = resumed
        self._log: EventLog | None = None
        self._progress: Progress | None = None
        self._prompts: dict[str, int] = {}
        self._tokenizer: Tokenizer | None = None
        self._alerts = AlertEngine(rules_of(config), constants_of(config))
        self._own_seconds = 0.0  # what recording the step before took; counted as "other" of the next
        try:
            (run_dir / "samples").mkdir(parents=True, exist_ok=True)
        except OSError as error:  # what a file system refuses only when it is asked
            what = f"cannot be made: {error.strerror}"
            raise ConfigError("run_dir", str(run_dir), what, "choose another run_dir") from error
        self._lock = _lock(run_dir)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log is not None:
            self._end("failed", f"{kind.__name__ if kind else 'unknown'}: {error}")
        self._lock.close()

    def data(self, prompts: PromptSet, tokenizer: Tokenizer | None = None) -> None:
        """Remember the sizes of the data for the first event, and how tokens read for the samples."""
        self._tokenizer = tokenizer
        sizes = {"train": len(prompts.train), "held_out": len(prompts.held_out)}
        self._prompts = {**sizes, "dropped_too_long": prompts.dropped_too_long}

    def begin(self, activity: str) -> None:
        """``evaluation``, ``checkpoint`` or ``finish`` begins; what went on before is over."""
        self.activity.begin(activity)

    def clock(self) -> StepClock:
        """The clock of a step that begins."""
        self._clock = StepClock()
        self.begin("step")
        return self._clock

    def heartbeat(self) -> dict[str, Any]:
        """What the run is at: ``step`` (updates done), ``activity``, and a step's ``phase`` (as in its seconds)."""
        phase = self._clock.phase if self.activity.kind == "step" else ""
        return {"step": self._done, "activity": self.activity.kind, "phase": phase}

    def tick(self, now: float) -> None:
        """Judge what depends on time alone; a watchdog calls this every few seconds. ``now``: Unix seconds."""
        free = shutil.disk_usage(self.run_dir).free  # before the lock: a file system that hangs must not stop training
        with self._writing:
            if self._log is not None:
                self._raise(self._alerts.tick(now, free))

    def start(self, step: int, checkpoint: Checkpoint | None = None) -> None:
        """Open the log with ``run_start``, or with ``resume`` at ``step`` updates done.

        ``checkpoint``: what the run resumes from, if there is one. From here on config.yaml is this run's.
        """
        known_by = config_hash(self._config)
        self._write_config(known_by)
        opened, self._done = EventLog(self.run_dir / FILE_NAME), step
        past = in_force(event for event in EventReader(opened.path) if event["kind"] != "step")
        saved = [event["step"] for event in past if event["kind"] == "checkpoint"]
        if checkpoint is not None and step not in saved:
            # The process before was killed between publishing the checkpoint and saying so.
            opened.append("checkpoint", {"time": time.time(), **self._published(checkpoint)})
        if self._resumed:
            self._alerts = replayed(self._alerts, opened.path, step)
        self._log = opened  # only now: a watchdog's ``tick`` must not meet alerts that have forgotten the log
        starts = [event for event in past if event["kind"] in ("run_start", "resume")]
        self.event(
            "resume" if self._resumed else "run_start",
            step=step,
            name=self._config.name,
            seed=self._config.seed,
            steps=self._config.steps,
            config_hash=known_by,
            prompts=self._prompts,
            versions=versions(),
            attempt=len(starts) + 1,
            host=platform.node(),
        )
        if self._config.monitoring.progress:
            schedule = self._config.entropy.band.schedule
            self._progress = Progress(self._config.name, self._config.steps, schedule, first=step)

    def event(self, kind: str, **values: Any) -> None:
        """Append an event, with the time, and the alerts that it raises. Raises ``RuntimeError`` before ``start``."""
        event = {"time": time.time(), **values}
        with self._writing:
            if self._log is None:
                raise RuntimeError("Recorder.start must come before events")
            self._log.append(kind, event)
            self._raise(self._alerts.observe({"kind": kind, **event}))

    def step(self, outcome: StepOutcome) -> None:
        """Record one step: its event, the samples to keep, the progress line. ``clock`` has counted its seconds."""
        started = time.perf_counter()
        record = step_record(outcome, self._config.entropy, self._clock, self._own_seconds)
        self.event("step", **record.to_dict())
        self._done = outcome.step + 1
        write_samples(self.run_dir / "samples", outcome.step, outcome.kept, self._tokenizer)
        if self._progress is not None:
            self._progress.step(record)
        self._own_seconds = time.perf_counter() - started

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        """Record an evaluation after ``step`` updates; ``result`` is ``EvaluationResult.to_dict()``."""
        self.event("evaluation", step=step, **result)

    def band(self, step: int, edges: tuple[float, float], why: str) -> None:
        """Record and say that the evaluation after ``step`` updates gave the run its band, in nats per token."""
        low, high = edges
        self.event("band", step=step, low=low, high=high, reason=why)
        if self._progress is not None:
            self._progress.say(f"the band is {low:.3g} to {high:.3g} nats from here on: {why}")

    def fault(self, description: str) -> None:
        """Record something that broke and was mended, e.g. an engine started again."""
        log.warning(description)
        self.event("fault", step=self._done, description=description)

    def snapshot(self, step: int) -> None:
        """Record that what a run was after ``step`` updates is being written; ``checkpoint`` follows, with luck."""
        self.event("snapshot", step=step)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Record a published checkpoint, and flush the log to the disk with it."""
        self.event("checkpoint", **self._published(checkpoint))
        if self._log is not None:
            self._log.sync()

    def finish(self, *, completed: bool) -> dict[str, Any]:
        """End the log, write report.html, and return the run's summary."""
        self.begin("finish")
        self._end("completed" if completed else "stopped", "")
        from pipeline.monitoring.report import build_report  # loads matplotlib, which training has no use for

        return build_report([self.run_dir], self.run_dir / "report.html")["runs"][0]

    def stall(self, values: Mapping[str, Any], ended: str) -> None:
        """Record that the run stands still; where ``values["action"]`` is restart, end the log because of ``ended``."""
        with self._writing:
            if self._log is not None:  # at the very beginning and end there is no log, but there may be a stall
                self.event("stall", **values)
                if values["action"] == "restart":
                    self._end("failed", ended)

    def _end(self, status: str, error: str) -> None:
        with self._writing:
            self.event("run_end", status=status, error=error)
            if self._progress is not None:
                self._progress.close()
            if self._log is not None:
                self._log.close()
                self._log = None

    def _write_config(self, known_by: str) -> None:
        header = f"# Resolved configuration. Hash (without name and run_dir): {known_by}\n"
        with replacing(self.run_dir / "config.yaml") as partial:
            partial.write_text(header + to_yaml(self._config))

    def _published(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The fields of its event."""
        return {"step": checkpoint.step, "path": str(checkpoint.path.relative_to(self.run_dir))}

    def _raise(self, alerts: Sequence[Alert]) -> None:
        """Each alert that begins or ends as an event and a line in the log; who else is told follows the events."""
        for alert in alerts:
            log.log(
                LEVELS[alert.severity], "alert %s, step %d: %s: %s", alert.state, alert.step, alert.rule, alert.reason
            )
            if self._log is not None:
                self._log.append("alert", alert.to_dict())


def _lock(run_dir: Path) -> IO[str]:
    """An open file whose lock says that a process writes this run; it goes with the process. Raises ``ConfigError``."""
    file = (run_dir / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        remedy = "wait for it to end or stop it; two processes cannot write one run"
        raise ConfigError("run_dir", str(run_dir), "another process is writing this run", remedy) from None
    return file


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
