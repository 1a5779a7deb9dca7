"""Lists the jobs that were launched from here, shows what Slurm and the run folder say of each, and stops them.

The list is ``isentrope_jobs.jsonl`` in nemo-run's home. Slurm is asked with ``scontrol``, which knows jobs that are
waiting, running or just over, then with ``sacct``, where accounting is kept; nemo-run itself asks only the latter.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from launchers import environment
from launchers.slurm.cluster import SshConfig
from launchers.supervise.attempts import FILE, LAUNCH, Attempt, read_attempts
from launchers.supervise.watchdog import HEARTBEAT, parse_heartbeat
from pipeline.config.errors import ConfigError
from pipeline.monitoring.console import CleanConsole
from pipeline.monitoring.event_kinds import DamagedLineError, decoded, parse_event

if TYPE_CHECKING:
    from nemo_run import SSHTunnel

log = logging.getLogger(__name__)

SPARE_LINES = 20  # fetched of a kind of event where one is wanted: the others are for where it is damaged
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

Shell = Callable[[str], str]  # a command line -> its standard output; raises CommandError


class CommandError(RuntimeError):
    """A command on the cluster failed; the message is what it said."""


@dataclass(frozen=True)
class Job:
    """One submitted job."""

    job_id: str
    job_name: str
    run_dir: str
    experiment: str  # nemo-run's
    launched: float  # Unix seconds: the launch began to ship the code
    submitted: float  # sbatch had returned
    ssh: SshConfig

    @property
    def log(self) -> str:
        """Path of the job's log, on the cluster."""
        return f"{self.run_dir}/{LAUNCH}/sbatch_{self.job_name}_{self.job_id}.out"


_JOB = msgspec.json.Decoder(Job)


def remember(
    job_ids: tuple[str, ...], job_name: str, run_dir: Path, experiment: str, ssh: SshConfig, launched: float
) -> list[Job]:
    """Add jobs to the list."""
    jobs = [Job(job_id, job_name, str(run_dir), experiment, launched, time.time(), ssh) for job_id in job_ids]
    with _file().open("a") as file:
        file.writelines(json.dumps(asdict(job)) + "\n" for job in jobs)
    return jobs


def known() -> list[Job]:
    """Every job launched from here, oldest first."""
    found = []
    for number, line in enumerate(_file().read_bytes().splitlines() if _file().exists() else [], start=1):
        try:
            found.append(decoded(_JOB, line))
        except DamagedLineError as error:
            log.warning("%s, line %d is no job: %s; it is skipped", _file(), number, error)
    return found


def find(name: str | None) -> Job:
    """The newest job with this id, or whose run folder has this name or path; None: the newest of all.

    Raises ``ConfigError``.
    """
    jobs = known()
    fits = [job for job in jobs if name is None or name in (job.job_id, job.run_dir, Path(job.run_dir).name)]
    if not fits:
        remedy = "`isentrope jobs list` shows the jobs launched from here"
        raise ConfigError("job", name, "no such job", remedy)
    return fits[-1]


def shell(ssh: SshConfig) -> Shell:
    """Where the cluster is reached: this machine, or its login node.

    Raises ``ConfigError`` where that does not let us in.
    """
    if not ssh.host:
        return local
    tunnel = ssh_tunnel(ssh)
    tunnel.console = CleanConsole(stderr=True)
    try:
        tunnel.connect()
    except (OSError, SystemExit) as error:  # nemo-run exits where the login is refused
        reason = "the login was refused" if isinstance(error, SystemExit) else str(error)
        remedy = f"try `ssh {ssh.user}@{ssh.host}` and correct `ssh` in the cluster file"
        raise ConfigError("cluster.ssh.host", f"{ssh.user}@{ssh.host}", reason, remedy) from error

    def run(command: str) -> str:
        done = tunnel.run(command, warn=True)
        if not done.ok:
            raise CommandError((done.stderr or done.stdout).strip())
        return done.stdout

    return run


def ssh_tunnel(ssh: SshConfig) -> SSHTunnel:
    """nemo-run's connection to the login node, not yet made."""
    from nemo_run import SSHTunnel

    identity = str(Path(ssh.identity).expanduser()) if ssh.identity else None
    return SSHTunnel(host=ssh.host, user=ssh.user, port=ssh.port or None, identity=identity, job_dir=ssh.job_dir)


# Where scontrol writes each figure of a job. Each pattern names the fields beside its own: a comment may hold any
# words, and a reason spaces.
_FIELDS = {
    "state": r"^ *JobState=(\S*) Reason=",
    "reason": r"^ *JobState=\S* Reason=(.*) Dependency=",
    "nodes": r"^ *NodeList=(\S*)$",
    "elapsed": r"^ *RunTime=(\S*) TimeLimit=",
    "limit": r"^ *RunTime=\S* TimeLimit=(\S*)",
    "restarts": r"^ *Requeue=\d+ Restarts=(\d+)",
}


def state(job: Job, run: Shell) -> dict[str, str]:
    """``state``, ``reason``, ``nodes``, ``elapsed``, ``limit`` and ``restarts`` of the job.

    ``state`` is UNKNOWN where Slurm has forgotten the job.
    """
    try:
        text = run(f"scontrol show job {job.job_id}")
    except CommandError:
        return _from_accounting(job, run)
    found = {name: match[1] if (match := re.search(pattern, text, re.M)) else "" for name, pattern in _FIELDS.items()}
    return {name: "" if value in ("None", "(null)") else value for name, value in found.items()}


def details(job: Job, run: Shell) -> dict[str, Any]:
    """``state`` with the run's attempts, how many steps are done, what it is at, and its newest stall."""
    attempts = _attempts(job, run)
    steps = _output(run, f'grep -ac \'"kind":"step"\' {_quoted(job, "events.jsonl")}').strip()
    return {
        "job": job.job_id,
        "run_dir": job.run_dir,
        **(found := state(job, run)),
        "heartbeat": _heartbeat(job, run) if found["state"] == "RUNNING" else {},
        "stall": _newest_stall(job, run),
        "step_events": int(steps or 0),
        "seconds_to_first_step": _seconds_to_first_step(job, run, attempts),
        "attempts": [asdict(attempt) for attempt in attempts],
    }


def cancel(job: Job, run: Shell, *, now: bool) -> None:
    """Stop the job, after a checkpoint unless ``now``; jobs of the same run that wait behind it are cancelled too."""
    for other in known():
        if other.run_dir != job.run_dir:
            continue
        there = state(other, run)["state"]
        if there == "RUNNING" and not now:
            run(f"scancel --batch --signal=TERM {other.job_id}")  # to the job script, which tells the run
        elif there not in (*OVER, "UNKNOWN"):
            run(f"scancel {other.job_id}")


def _heartbeat(job: Job, run: Shell) -> dict[str, Any]:
    """How old the newest heartbeat is, by the cluster's clock, and what it says; empty before the first."""
    said, _, now = _output(run, f"cat {_quoted(job, HEARTBEAT)}; echo; date +%s.%N").strip().rpartition("\n")
    beat = parse_heartbeat(said.encode(), f"{job.run_dir}/{HEARTBEAT}") if said.strip() else {}
    return {"seconds_ago": round(float(now) - beat.pop("time"), 1), **beat} if beat else {}


def _newest_stall(job: Job, run: Shell) -> dict[str, Any]:
    """What the event of the newest stall says; empty if there was none."""
    wanted = ("time", "step", "activity", "phase", "seconds", "silent", "action")
    newest = list(_events(job, run, "stall", "tail"))[-1:]
    return {name: value for event in newest for name, value in event.items() if name in wanted}


def _events(job: Job, run: Shell, kind: str, end: str) -> Iterator[dict[str, Any]]:
    """The first (``end`` is "head") or the newest ("tail") events of a kind, at most ``SPARE_LINES``.

    Damaged lines are skipped.
    """
    command = f'grep -a \'"kind":"{kind}"\' {_quoted(job, "events.jsonl")} | {end} -n {SPARE_LINES}'
    for line in _output(run, command).split("\n"):
        try:
            if line:
                yield parse_event(line.encode())
        except DamagedLineError as error:
            log.warning("%s/events.jsonl, a line of kind %s is no event: %s; it is skipped", job.run_dir, kind, error)


def _seconds_to_first_step(job: Job, run: Shell, attempts: list[Attempt]) -> dict[str, float]:
    """Where the time from the launch to the end of the first step went.

    Empty before that step, and where the job resumed a run.
    """
    marks = [next(_events(job, run, kind, "head"), None) for kind in ("run_start", "step")]
    mine = [attempt.started for attempt in attempts if attempt.job_id == job.job_id]
    if not (mine and mine[0] == attempts[0].started and all(marks)):
        return {}
    times = [job.launched, job.submitted, mine[0], *(mark["time"] for mark in marks if mark)]
    parts = ("ship", "queue", "start", "step")  # start: Ray, the learner, the engines
    split = {name: round(b - a, 1) for name, a, b in zip(parts, times, times[1:], strict=False)}
    return split | {"total": round(times[-1] - times[0], 1)}


def _attempts(job: Job, run: Shell) -> list[Attempt]:
    lines = _output(run, f"cat {_quoted(job, LAUNCH, FILE)}").encode().split(b"\n")[:-1]
    return read_attempts(lines, Path(job.run_dir, LAUNCH, FILE))


def _from_accounting(job: Job, run: Shell) -> dict[str, str]:
    fields = "State,Reason,NodeList,Elapsed,Timelimit"
    line = _output(run, f"sacct -n -X -P -j {job.job_id} -o {fields}").strip().splitlines()
    if not line:
        return {"state": "UNKNOWN", "reason": "Slurm no longer knows this job"}
    values = ["" if value == "None" else value for value in line[-1].split("|")]
    values[0] = values[0].partition(" ")[0]  # CANCELLED by 1000
    return dict(zip(("state", "reason", "nodes", "elapsed", "limit"), values, strict=True))


def _output(run: Shell, command: str) -> str:
    """What a command says, nothing if it fails: a file that is not there yet, a cluster without accounting."""
    try:
        return run(command)
    except CommandError:
        return ""


def _quoted(job: Job, *parts: str) -> str:
    return shlex.quote("/".join((job.run_dir, *parts)))


def local(command: str) -> str:
    """Run a command line on this machine: the ``Shell`` of a cluster that this machine submits to."""
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise CommandError((done.stderr or done.stdout).strip())  # scontrol complains on both
    return done.stdout


def _file() -> Path:
    return environment.nemo_run_home() / "isentrope_jobs.jsonl"
