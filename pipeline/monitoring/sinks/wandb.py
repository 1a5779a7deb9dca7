"""Sends events to Weights & Biases, online or offline; every attempt of a run continues the same W&B run.

The API key is W&B's own affair: ``WANDB_API_KEY`` or ``wandb login``. Once a run is open the library keeps what it
cannot send yet.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import wandb
from wandb.errors import AuthenticationError, CommError
from wandb.sdk.lib import wbauth

from pipeline.config.errors import Problem
from pipeline.config.schema import RunConfig
from pipeline.monitoring.alerts.alert import Alert
from pipeline.monitoring.events import run_id
from pipeline.monitoring.metrics import scalars

LEVELS = {"info": "INFO", "warning": "WARN", "critical": "ERROR"}
LONGEST_TAG = 64


def problems(config: RunConfig) -> list[Problem]:
    """What would keep an online run from working, found without the network: it needs a key."""
    settings = wandb.setup().settings
    known = settings.api_key or settings.identity_token_file or wbauth.read_netrc_auth(host=settings.base_url)
    if known:
        return []
    what = f"no API key for {settings.base_url} in WANDB_API_KEY or in the netrc file"
    return [Problem("monitoring.wandb.mode", "online", what, "run `wandb login`, set WANDB_API_KEY, or use offline")]


class WandbSink:
    """Metrics over their own axis ``step``, configuration, tags and alerts.

    W&B takes nothing back: steps that a resume superseded stay beside the ones that came after it, which are the later
    rows.
    """

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        """Open the run. Raises ``ConnectionError`` when the server cannot be reached."""
        chosen, tags = config.monitoring.wandb, [config.entropy.controller, Path(config.model.hf_path).name]
        if config.entropy.controller != "none":
            tags.append(config.entropy.actuator)
        try:
            self._run = wandb.init(
                project=chosen.project,
                entity=chosen.entity or None,
                group=chosen.group or None,
                name=config.name,
                id=run_id(run_dir),
                resume="allow",
                dir=run_dir,
                mode="offline" if chosen.mode == "offline" else "online",
                config=asdict(config),
                allow_val_change=True,
                tags=[tag[:LONGEST_TAG] for tag in tags],
                # Console, git and machine belong to this process, not to the run: everything shown comes from the log.
                settings=wandb.Settings(
                    console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True
                ),
            )
        except AuthenticationError:
            raise
        except CommError as error:
            raise ConnectionError(str(error)) from error
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._exit_code = 1  # until the log says how the run ended

    def event(self, event: dict[str, Any]) -> None:
        """Hand one event to the library, which sends it in its own time."""
        values = scalars(event)
        if values:
            self._run.log({"step": event["step"], **values})
        elif event["kind"] == "alert" and Alert.of(event).begins:
            alert = Alert.of(event)
            self._run.alert(alert.rule, alert.reason, level=LEVELS[alert.severity], wait_duration=0)
        elif event["kind"] == "run_end":
            self._run.summary["status"] = event["status"]
            self._exit_code = int(event["status"] == "failed")

    def close(self) -> None:
        """Send the rest and end the run; one whose driver vanished counts as failed."""
        self._run.finish(exit_code=self._exit_code)
