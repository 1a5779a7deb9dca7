"""Sends events to MLflow, a tracking server or a folder; every attempt of a run continues the same MLflow run.

Credentials are MLflow's own affair: ``MLFLOW_TRACKING_TOKEN``, or ``MLFLOW_TRACKING_USERNAME`` and
``MLFLOW_TRACKING_PASSWORD``.
"""
# ruff: noqa: E402 - MLflow reads its settings when it is imported

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SETTINGS = {
    "MLFLOW_ALLOW_FILE_STORE": "true",  # a folder needs no server, which is what a cluster without network has
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # fail soon, and say so: whoever calls a sink tries again
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}
for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline.config.keys import flat
from pipeline.config.load import config_hash
from pipeline.config.schema import RunConfig
from pipeline.monitoring.alerts.alert import Alert
from pipeline.monitoring.events import run_id
from pipeline.monitoring.metrics import scalars

ID_TAG = "isentrope.id"
PARAMS_AT_ONCE = 100  # what a server takes
LONGEST_PARAM = 6000  # characters
STATUS = {"completed": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowSink:
    """Metrics by step, the configuration as parameters, alerts as tags.

    Parameters are those of the first attempt: MLflow changes none.

    MLflow takes nothing back: of a step that a resume superseded both values stay, the newer with the later time.
    """

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        """Find or create the run. Raises ``ConnectionError`` when the server cannot be reached."""
        uri = config.monitoring.mlflow.tracking_uri or (run_dir / "mlruns").resolve().as_uri()
        self._config = config
        with _reachable():
            self._client = MlflowClient(uri)
            self._run = self._open(run_id(run_dir))

    def event(self, event: dict[str, Any]) -> None:
        """Write one event. Raises ``ConnectionError`` when the server cannot be reached."""
        kind, milliseconds = event["kind"], int(1000 * event["time"])
        with _reachable():
            values = scalars(event)
            if values:
                metrics = [Metric(name, value, milliseconds, event["step"]) for name, value in values.items()]
                self._client.log_batch(self._run, metrics=metrics)
            elif kind == "resume":
                self._client.set_tag(self._run, "config_hash", config_hash(self._config))
                self._client.update_run(self._run, status="RUNNING")
            elif kind == "alert":
                alert = Alert.of(event)
                text = f"step {event['step']}, {alert.severity}: {alert.reason}" if alert.begins else "over"
                self._client.set_tag(self._run, f"alert.{alert.rule}", text)
            elif kind == "run_end":
                self._client.set_terminated(self._run, STATUS[event["status"]])

    def close(self) -> None:
        """Nothing is held back."""

    def _open(self, identity: str) -> str:
        name = self._config.monitoring.mlflow.experiment
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        found = self._client.search_runs([experiment], f"tags.`{ID_TAG}` = '{identity}'", max_results=1)
        run: Run = found[0] if found else self._create(experiment, identity)
        return str(run.info.run_id)

    def _create(self, experiment: str, identity: str) -> Run:
        run = self._client.create_run(experiment, run_name=self._config.name)
        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in flat(self._config).items()]
        for first in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(run.info.run_id, params=params[first : first + PARAMS_AT_ONCE])
        # Last, so that a run which could be opened only in part is not found again but made anew.
        tags = {ID_TAG: identity, "config_hash": config_hash(self._config)}
        self._client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        return run


@contextmanager
def _reachable() -> Iterator[None]:
    """``ConnectionError`` for what another try may mend: no answer, too many requests, a fault of the server."""
    try:
        yield
    except MlflowException as error:
        if error.get_http_status_code() in (408, 429) or error.get_http_status_code() >= 500:
            raise ConnectionError(str(error)) from error
        raise
