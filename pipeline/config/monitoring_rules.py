"""Rules between keys of ``monitoring``: sinks and their addresses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from pipeline.config.errors import Problem
from pipeline.config.schema import RunConfig


def sink_problems(config: RunConfig) -> Iterator[Problem]:
    """What is wrong with the choice of sinks on any machine."""
    chosen, uri = config.monitoring.sinks, config.monitoring.mlflow.tracking_uri
    if len(set(chosen)) < len(chosen):
        yield Problem("monitoring.sinks", chosen, "a sink is named twice", "name each once")
    if urlsplit(uri).password:
        what = "holds a password, which the run folder and every sink would show"
        remedy = "remove it and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        yield Problem("monitoring.mlflow.tracking_uri", re.sub(r"//.*@", "//...@", uri), what, remedy)
