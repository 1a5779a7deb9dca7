"""Records beside a checkpoint which model it is of, and compares that with a ``config.json``. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.model.architecture import Architecture

FILE = "architecture.json"


def record(directory: Path, model: Architecture) -> None:
    """Write the model's architecture into a checkpoint's folder."""
    (directory / FILE).write_text(json.dumps(model.record(), indent=1))


def check(directory: Path, model: Architecture, config: str) -> None:
    """Refuse a checkpoint of another model: raises ``ValueError`` that names every field in which the two differ.

    ``model`` was read from ``config``.

    A checkpoint without a record, from elsewhere, passes: its tensors' names and shapes are checked when they are read.
    """
    path = directory / FILE
    if not path.is_file():
        return
    recorded, given = dict(_fields(json.loads(path.read_text()))), dict(_fields(model.record()))
    names = [name for name in sorted(recorded | given) if recorded.get(name) != given.get(name)]
    if names:
        lines = (f"  {name}: checkpoint {recorded.get(name)!r}, config.json {given.get(name)!r}" for name in names)
        raise ValueError(
            f"{config} does not describe the model of the checkpoint {directory}:\n"
            + "\n".join(lines)
            + "\nuse the config.json with which the checkpoint was made"
        )


def _fields(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
