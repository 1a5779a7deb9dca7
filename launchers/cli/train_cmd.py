"""``isentrope train``: trains, or resumes a run, in this process."""

from __future__ import annotations

from pathlib import Path

import typer

from launchers.cli.arguments import CONFIG, JSON, OVERRIDES, either, print_result
from launchers.cli.terminal import say
from launchers.supervise.signals import stop_requested


def train(
    config: Path | None = CONFIG,
    overrides: list[str] = OVERRIDES,
    resume: Path | None = typer.Option(
        None, "--resume", metavar="RUN", help="Run folder to continue from its newest checkpoint, with its own config."
    ),
    allow_change: bool = typer.Option(
        False, "--allow-change", help="With --resume: go on although model, data, seed or entropy control have changed."
    ),
    as_json: bool = JSON,
) -> None:
    """Train a model with GRPO while its policy entropy is held in a band.

    Examples:

      isentrope train --config configs/quickstart.yaml steps=50

      isentrope train --resume runs/pi-20260101-120000 steps=300
    """
    from pipeline.config.load import load_config

    either(config, resume, "--resume RUN")
    if resume is not None:
        from launchers.run.resume import resumption, run_to_resume

        resume = run_to_resume(resume)
    resolved = load_config(resume / "config.yaml" if resume else config, overrides)
    if resume is not None:
        found = resumption(resume, resolved, allow_change=allow_change)
        if found.complete:
            from pipeline.monitoring.report import build_report

            say(f"{resume}: already complete after {found.step} steps; give more steps to go on", err=True)
            print_result(build_report([resume], resume / "report.html")["runs"][0], as_json)
            return
        say(f"resuming {resume} {found}", err=True)
    with stop_requested() as asked:
        from launchers.run import assemble  # torch, Ray: only once the configuration is known to be good

        result = assemble.train(resolved, resume, asked, allow_change=allow_change)
    print_result(result, as_json)
    if result["status"] != "completed":
        done = f"stopped after {result['steps']} of {resolved.steps} steps, checkpoint saved"
        say(f"{done}; go on with: isentrope train --resume {result['run_dir']}", err=True)
