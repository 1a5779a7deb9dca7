"""``isentrope report``."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from launchers.cli.arguments import JSON, print_result

SHOWN = ("method", "seed", "steps", "status", "final_entropy", "time_in_band", "rms_error", "pass_at_1", "pass_at_16")


def report(
    runs: list[Path] = typer.Argument(..., metavar="RUN...", help="Run folders, finished or still running."),
    out: Path = typer.Option(Path("report.html"), "--out", "-o", help="HTML file to write."),
    png: bool = typer.Option(False, "--png", help="Also write the pictures beside it as one PNG."),
    as_json: bool = JSON,
) -> None:
    """Write one self-contained HTML page that draws runs together.

    Example:

      isentrope report runs/quickstart/grpo runs/quickstart/pi -o report.html --png
    """
    from pipeline.monitoring.report import build_report  # loads matplotlib

    result = build_report(runs, out, out.with_suffix(".png") if png else None)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for summary in result["runs"]:
        print_result({name: summary[name] for name in SHOWN}, as_json=False)
        typer.echo()
    for sentence in result["cost"]:
        typer.echo(sentence)
    typer.echo(f"wrote {out}")
