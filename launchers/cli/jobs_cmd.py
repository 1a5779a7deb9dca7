"""``isentrope jobs``: lists and cancels the Slurm jobs that were launched from here."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from launchers.cli.arguments import JSON
from launchers.cli.terminal import say
from pipeline.config.errors import ConfigError
from pipeline.monitoring.console import CleanConsole

if TYPE_CHECKING:
    from launchers.slurm.jobs import Job

app = typer.Typer(help="Jobs launched from here: list, status, logs, cancel.", no_args_is_help=True)

JOB = typer.Argument(None, metavar="[JOB]", help="Job id, or name or path of its run folder; default: the newest.")
POLL_S = 2.0


@app.command("list")
def list_jobs(as_json: bool = JSON) -> None:
    """Every job launched from here and its state.

    Example:

      isentrope jobs list
    """
    from launchers.slurm import jobs

    known = [(job, jobs.state(job, jobs.shell(job.ssh))["state"]) for job in jobs.known()]
    if as_json:
        say(json.dumps([{**asdict(job), "state": state} for job, state in known]))
        return
    table = Table("job", "submitted", "state", "run folder")
    for job, state in known:
        table.add_row(job.job_id, f"{datetime.fromtimestamp(job.submitted):%Y-%m-%d %H:%M}", state, job.run_dir)
    CleanConsole().print(table)


@app.command()
def status(job: str | None = JOB, as_json: bool = JSON) -> None:
    """State of a job, what it is at and for how long it gave no heartbeat, its attempts so far, its newest stall.

    Example:

      isentrope jobs status 4711
    """
    from launchers.slurm import jobs

    found = jobs.find(job)
    result = jobs.details(found, jobs.shell(found.ssh))
    if as_json:
        say(json.dumps(result))
        return
    if result["stall"]:
        result["stall"]["time"] = f"{datetime.fromtimestamp(result['stall']['time']):%Y-%m-%d %H:%M:%S}"
    for name, value in result.items():
        if name != "attempts" and value not in ("", None, {}):
            parts = value.items() if isinstance(value, dict) else ()
            shown = ", ".join(f"{key} {part}" for key, part in parts if part not in ("", []))
            say(f"{name}: {shown or value}")
    for attempt in result["attempts"]:
        began = f"{datetime.fromtimestamp(attempt['started']):%Y-%m-%d %H:%M:%S}"
        ending = attempt.get("end") or "running, or lost"
        reason = f": {attempt['reason']}" if attempt.get("reason") else ""
        say(f"attempt {attempt['number']}: {began} from step {attempt['first_step']}, {ending}{reason}")


@app.command()
def logs(
    job: str | None = JOB, keep_on: bool = typer.Option(False, "--follow", "-f", help="Print on as it grows.")
) -> None:
    """The log of a job: every attempt of it, one behind the other.

    Example:

      isentrope jobs logs 4711 --follow
    """
    from launchers.slurm import jobs

    found = jobs.find(job)
    if keep_on:
        follow(found)
        return
    try:
        say(jobs.shell(found.ssh)(f"cat {shlex.quote(found.log)}"), nl=False)
    except jobs.CommandError as error:
        raise ConfigError("job", found.job_id, f"no log yet: {error}", "wait until the job has started") from error


@app.command()
def cancel(
    job: str | None = JOB,
    now: bool = typer.Option(False, "--now", help="Do not wait for a checkpoint."),
) -> None:
    """Stop a job: the step in progress is finished and a checkpoint saved. It is not requeued.

    Example:

      isentrope jobs cancel 4711
    """
    from launchers.slurm import jobs

    found = jobs.find(job)
    jobs.cancel(found, jobs.shell(found.ssh), now=now)
    how = "cancelled" if now else "asked to save and stop"
    say(
        f"job {found.job_id}: {how}; go on with: isentrope launch slurm --resume {shlex.quote(found.run_dir)} "
        "--cluster ..."
    )


def follow(job: Job) -> None:
    """Print a job's log and state until it is over. Ctrl-C leaves the job alone. Exits with 1 unless it completed."""
    from launchers.slurm import jobs

    run, shown, before = jobs.shell(job.ssh), 0, ""
    while True:
        state = jobs.state(job, run)
        words = f"{state['state']}{' (' + state['reason'] + ')' if state.get('reason') else ''}"
        if words != before:
            say(f"job {job.job_id}: {words}", err=True)
            before = words
        try:
            text = run(f"tail -c +{shown + 1} {shlex.quote(job.log)}")
        except jobs.CommandError:  # not started
            text = ""
        shown += len(text.encode())
        say(text, nl=False)
        if state["state"] in (*jobs.OVER, "UNKNOWN"):
            if state["state"] != "COMPLETED":
                raise typer.Exit(1)
            return
        time.sleep(POLL_S)
