"""``isentrope doctor``: checks whether this machine can train."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import typer

from launchers.cli.arguments import JSON
from launchers.cli.terminal import say


def doctor(
    folder: Path = typer.Option(Path(), "--folder", help="Where runs would be written."), as_json: bool = JSON
) -> None:
    """Look at this machine: versions that fit together, GPUs, shared memory, ports, disk.

    Exits with 1 if something is bad.

    Runs on a laptop, a login node, or inside a job. Example:

      srun --jobid 4711 isentrope doctor
    """
    from launchers.doctor import BAD, examine  # torch: only now

    findings = examine(folder)
    if as_json:
        say(json.dumps([asdict(finding) for finding in findings]))
    else:
        say("\n".join(finding.render() for finding in findings))
    if any(finding.level == BAD for finding in findings):
        raise typer.Exit(1)
