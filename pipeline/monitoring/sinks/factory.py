"""Checks and builds the sinks that a configuration asks for."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from pipeline.config.check import key_problems
from pipeline.config.errors import Problem
from pipeline.config.monitoring_rules import sink_problems
from pipeline.config.schema import SINKS, PrometheusConfig, RunConfig
from pipeline.monitoring.sinks import Sink
from pipeline.monitoring.sinks.alert_delivery import alert_sinks, delivery_problems

PORT_WAIT_S = 5.0  # an attempt that was killed lets go of its port within a second


def build_sinks(config: RunConfig, run_dir: Path) -> dict[str, Callable[[], Sink]]:
    """Builders of the sinks by name, channels of alerts among them.

    The sink ``wandb`` is the class ``WandbSink`` of ``pipeline.monitoring.sinks.wandb``. A builder imports its library
    and connects, so call it where that may take long or fail.
    """

    def builder(name: str) -> Callable[[], Sink]:
        def build() -> Sink:
            module = import_module(f"pipeline.monitoring.sinks.{name}")
            sink: Sink = getattr(module, f"{name.capitalize()}Sink")(config, run_dir)
            return sink

        return build

    return {name: builder(name) for name in config.monitoring.sinks} | alert_sinks(config, run_dir)


def problems(config: RunConfig) -> list[Problem]:
    """Why the configured sinks could not work on this machine; reaches no server."""
    impossible = [*key_problems(config)] or [*sink_problems(config)]
    if impossible:
        return impossible
    chosen = config.monitoring.sinks
    missing = [library for name in chosen if not _installed(library := SINKS[name])]
    if missing:
        what = f"not installed: {', '.join(missing)}"
        return [Problem("monitoring.sinks", chosen, what, "pip install 'isentrope[monitor]', or remove the sink")]
    found = delivery_problems(config)
    found += _port_problems(config.monitoring.prometheus) if "prometheus" in chosen else []
    if "wandb" in chosen and config.monitoring.wandb.mode == "online":
        found += import_module("pipeline.monitoring.sinks.wandb").problems(config)
    return found


def _installed(library: str) -> bool:
    """A folder of that name in the working directory, such as W&B's own, is no library."""
    spec = find_spec(library)
    return spec is not None and spec.origin is not None


def _port_problems(chosen: PrometheusConfig) -> list[Problem]:
    """Try the endpoint's address as the endpoint will."""
    deadline = time.monotonic() + PORT_WAIT_S
    while True:
        try:
            with socket.create_server((chosen.host, chosen.port)):
                return []
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                remedy = "use an address of this machine, 127.0.0.1 or 0.0.0.0"
                return [Problem("monitoring.prometheus.host", chosen.host, f"cannot listen there: {error}", remedy)]
            if time.monotonic() > deadline:
                remedy = "choose another port (every run on a machine needs its own), or stop what listens there"
                return [Problem("monitoring.prometheus.port", chosen.port, f"in use on {chosen.host}", remedy)]
        time.sleep(0.2)
