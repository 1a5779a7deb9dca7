"""Command-line arguments that several commands share, and how the commands print their results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from launchers.cli.terminal import say

USAGE_ERROR = 2  # wrong command line, configuration, data or checkpoint; anything else that fails exits with 1
INTERRUPTED = 130  # ctrl-C, as of every command that does not end it otherwise (typer's own)
CONFIG = typer.Option(
    None,
    "--config",
    "-c",
    help="YAML file; looked up here, then among the packaged configs. Paths in it start at its own folder.",
)
OVERRIDES = typer.Argument(
    default_factory=list,
    show_default=False,
    metavar="KEY=VALUE",
    help="Overrides, e.g. learner.optimizer.lr=1e-4. Paths start at the working directory.",
)
MEAN_RESPONSE = typer.Option(
    0,
    "--mean-response",
    min=0,
    help="Average response tokens, for the predicted times; 0: 0.3 x rollout.max_new_tokens.",
)
NODES = typer.Option(None, "--nodes", min=1, help="Nodes; default: the cluster file's, or as many as the run needs.")
JSON = typer.Option(False, "--json", help="Print one JSON document on stdout.")


def either(config: Path | None, run: Path | None, option: str = "--run RUN") -> None:
    """Raise ``BadParameter`` unless one of ``--config`` and ``option`` is given."""
    if (config is None) == (run is None):
        raise typer.BadParameter(f"give either --config FILE or {option}")


def print_result(result: Mapping[str, Any], as_json: bool) -> None:
    """A result on stdout: as JSON, or one ``key: value`` line per entry that is not empty."""
    if as_json:
        say(json.dumps(result))
        return
    for name, value in result.items():
        if value not in (None, [], {}, ""):
            say(f"{name}: {_plain(value)}")


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(entry)}" for name, entry in value.items() if entry is not None)
    if isinstance(value, list):
        return "; ".join(map(_plain, value))
    return str(value)
