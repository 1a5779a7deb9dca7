"""Serves the newest figures to Prometheus at an endpoint on the driver's node; Prometheus keeps their history.

Every name of ``metrics`` is a gauge ``isentrope_<name>`` with ``/`` as ``_``. On a cluster nobody knows the driver's
node beforehand: a file in ``monitoring.prometheus.targets`` names the endpoint, in the form that Prometheus's
file_sd_configs reads.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, start_http_server

from pipeline.config.schema import RunConfig
from pipeline.monitoring.alerts.alert import Alert
from pipeline.monitoring.events import run_id
from pipeline.monitoring.metrics import scalars

LABELS = ("run", "seed")


def exported(name: str) -> str:
    """The name of a metric in Prometheus: ``entropy/mean`` is ``isentrope_entropy_mean``."""
    return "isentrope_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)


class PrometheusSink:
    """Listens from the start until it is closed; what depends on the clock or the disk is read when Prometheus asks."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        """Raises ``OSError`` when the port is taken."""
        host, port = config.monitoring.prometheus.host, config.monitoring.prometheus.port
        self._labels = (config.name, str(config.seed))
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._last_event = time.time()
        self._done = self._last_checkpoint = 0  # updates
        self._steps = self._counter("steps", "Training steps done by this attempt.").labels(*self._labels)
        self._faults = self._counter("faults", "What broke and was mended.").labels(*self._labels)
        self._alerts = self._counter("alerts", "Alerts that began.", "rule", "severity")
        self._alert_active = self._gauge("alert_active", "1 while an alert holds.", "rule", "severity")
        self._state = self._gauge("control_state", "1 for the state of the controller.", "state")
        self._set("steps_goal", config.steps)
        self._set("checkpoint_every_steps", config.checkpoint.every)
        self._about = Info("isentrope_run", "What this run is.", LABELS, registry=self._registry).labels(*self._labels)
        self._facts = {"run_dir": str(run_dir), "model": config.model.hf_path, "controller": config.entropy.controller}
        self._facts["actuator"] = config.entropy.actuator
        self._when_asked(run_dir)
        self._server, self._thread = start_http_server(port, host, self._registry)
        self._target = _announce(config, run_dir)
        self._ended_well = False

    def event(self, event: dict[str, Any]) -> None:
        """Bring the figures up to date."""
        self._last_event = event["time"]
        for name, value in scalars(event).items():
            self._set(name, value)
        match event["kind"]:
            case "run_start" | "resume":
                self._start(event)
            case "step":
                self._steps.inc()
                self._done = event["step"] + 1
                self._set("step", self._done)
                self._set("steps_since_checkpoint", self._done - self._last_checkpoint)
                self._in_state(event["state"])
            case "checkpoint":
                self._last_checkpoint = event["step"]
                self._set("steps_since_checkpoint", max(0, self._done - event["step"]))  # of a run that went on since
            case "fault":
                self._faults.inc()
            case "alert":
                self._alert(Alert.of(event))
            case "run_end":
                self._ended_well = event["status"] != "failed"

    def close(self) -> None:
        """Stop listening. The address of a run that broke off stays known, so that Prometheus misses it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        if self._target and self._ended_well:
            self._target.unlink(missing_ok=True)

    def _start(self, event: dict[str, Any]) -> None:
        self._done = self._last_checkpoint = event["step"]
        self._set("step", event["step"])
        self._set("steps_since_checkpoint", 0)
        self._alert_active.clear()  # what was lost is told again
        versions = {re.sub(r"\W", "_", package): version for package, version in event["versions"].items()}
        self._about.info({**self._facts, "config_hash": event["config_hash"], **versions})

    def _alert(self, alert: Alert) -> None:
        labels = (*self._labels, alert.rule, alert.severity)
        self._alert_active.labels(*labels).set(alert.begins)
        if alert.begins:
            self._alerts.labels(*labels).inc()

    def _in_state(self, state: str) -> None:
        self._state.clear()
        self._state.labels(*self._labels, state).set(1)

    def _when_asked(self, run_dir: Path) -> None:
        for name, read in {
            "seconds_since_last_event": lambda: time.time() - self._last_event,
            "disk_free_bytes": lambda: shutil.disk_usage(run_dir).free,
            "disk_size_bytes": lambda: shutil.disk_usage(run_dir).total,
        }.items():
            self._gauge(name, "").labels(*self._labels).set_function(read)

    def _set(self, name: str, value: float) -> None:
        if name not in self._gauges:
            self._gauges[name] = self._gauge(name, f"{name}, see docs/monitoring.md")
        self._gauges[name].labels(*self._labels).set(value)

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return Gauge(exported(name), help or name, (*LABELS, *labels), registry=self._registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(exported(name), help, (*LABELS, *labels), registry=self._registry)


def _announce(config: RunConfig, run_dir: Path) -> Path | None:
    """Write the file that tells Prometheus where to look, if one is wanted."""
    chosen = config.monitoring.prometheus
    if not chosen.targets:
        return None
    reached = socket.gethostname() if chosen.host in ("0.0.0.0", "::") else chosen.host
    folder = Path(chosen.targets)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{run_id(run_dir)}.json"
    target.write_text(json.dumps([{"targets": [f"{reached}:{chosen.port}"]}]))
    return target
