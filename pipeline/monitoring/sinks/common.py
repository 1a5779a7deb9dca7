"""Facts about a run that several sinks need."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.monitoring.events import FILE_NAME


def run_id(run_dir: Path) -> str:
    """16 hex digits that name this run only, made from the first event of the log.

    The same after every resume and wherever the folder goes.
    """
    with (run_dir / FILE_NAME).open("rb") as log:
        return hashlib.sha256(log.readline()).hexdigest()[:16]


def flat(config: RunConfig) -> dict[str, Any]:
    """The configuration by dotted keys; lists and free-form entries stay whole."""
    return dict(_leaves(asdict(config), ""))


def _leaves(values: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found += _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [(prefix + name, value)]
    return found
