"""``isentrope report``: writes one HTML page about one or several runs."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from launchers.cli.arguments import JSON, print_result
from launchers.cli.terminal import say

SHOWN = ("method", "seed", "steps", "status", "final_entropy", "time_in_band", "rms_error", "pass_at_1", "pass_at_16")


def report(
    runs: list[Path] = typer.Argument(..., metavar="RUN...", help="Run folders, finished or still running."),
    out: Path = typer.Option(Path("report.html"), "--out", "-o", help="HTML file to write."),
    png: bool = typer.Option(False, "--png", help="Also write the pictures beside it as one PNG."),
    csv: bool = typer.Option(
        False, "--csv", help="Also write every step's figures beside it as CSV, a row per step and run."
    ),
    as_json: bool = JSON,
) -> None:
    """Write one self-contained HTML page that draws runs together.

    It shows their figures, differences, events, configuration and versions.

    Example:

      isentrope report runs/grpo runs/pi -o report.html --png --csv
    """
    from pipeline.monitoring.report import build_report  # loads matplotlib

    beside = {kind: out.with_suffix(f".{kind}") if asked else None for kind, asked in (("png", png), ("csv", csv))}
    result = build_report(runs, out, **beside)
    if as_json:
        say(json.dumps(result))
        return
    for summary in result["runs"]:
        print_result({name: summary[name] for name in SHOWN}, as_json=False)
        say()
    for sentence in result["cost"]:
        say(sentence)
    say(f"wrote {', '.join(str(path) for path in (out, *beside.values()) if path)}")
