"""The program on every node of a Slurm job: it starts Ray, and on the first node the training run itself.

``python -m launchers.slurm.node RUN_DIR ATTEMPT_DIR HEAD:PORT``, in the folder of the shipped code. The first node
leaves its verdict in ``ATTEMPT_DIR/verdict``: a word and a reason, from which the job script decides about another
attempt. The words are those of ``launchers.supervise.training``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launchers import environment
from launchers.supervise.attempts import LAUNCH, AttemptLog, gives_up, progress
from launchers.supervise.training import train
from pipeline.config.load import load_config
from pipeline.ports import own_address
from pipeline.units import GIB

SHIPPED = Path(".launch")  # beside the shipped code: config.yaml, cluster.yaml, code.json, code.patch, launch.json
VERDICT = "verdict"
HEAD_TIMEOUT_S = 300.0  # nodes of a large job start minutes apart
STOP_TIMEOUT_S = 3.0
VERDICT_GRACE_S = 15.0
RAY_STARTS = 3
RAY_RUNS = b"Ray runtime started."


def main(run_dir: Path, attempt_dir: Path, address: str) -> int:
    """This node's part, start to end; the exit code of its task."""
    if environment.node_index() != 0:
        return other_node(attempt_dir, address)
    verdict, reason = first_node(run_dir, attempt_dir, address)
    _leave(attempt_dir, verdict, reason)
    return 1 if verdict in ("again", "failed") else 0


def first_node(run_dir: Path, attempt_dir: Path, address: str) -> tuple[str, str]:
    """Decide, start Ray's head, train; verdict and reason."""
    settings = json.loads((SHIPPED / "launch.json").read_text())
    goal = load_config(SHIPPED / "config.yaml", check=False).steps
    before, log = progress(run_dir), AttemptLog(run_dir)
    done = before.status == "completed" and before.step >= goal
    _close_lost(log, run_dir, before.step, done)
    if done:
        return "completed", f"all {goal} steps were done already"
    reason = gives_up(log.read(), before.step, settings["attempts_without_progress"])
    if reason:
        return "failed", reason
    _record(run_dir)
    job = environment.slurm_job()
    attempt = log.start(job.id, job.restart, job.nodes, before.step)
    host, _, port = address.rpartition(":")
    options = ["--head", f"--node-ip-address={host}", f"--port={port}", "--include-dashboard=false"]
    with ray(options, attempt_dir / "ray-0.log", settings) as head:
        verdict, reason = train(run_dir, attempt_dir, SHIPPED / "config.yaml", head, address)
        log.end(attempt, verdict, progress(run_dir).step, reason)  # before Ray, which takes seconds to end
    return verdict, reason


def other_node(attempt_dir: Path, address: str) -> int:
    """Join the head until the verdict is there."""
    settings = json.loads((SHIPPED / "launch.json").read_text())
    host, _, port = address.rpartition(":")
    if not _answers(host, int(port), attempt_dir):
        return 0 if (attempt_dir / VERDICT).exists() else 1
    own = own_address(host)
    log = attempt_dir / f"ray-{environment.node_index()}.log"
    with ray([f"--address={address}", f"--node-ip-address={own}"], log, settings) as worker:
        while worker.poll() is None and not (attempt_dir / VERDICT).exists():
            time.sleep(0.5)
    deadline = time.monotonic() + VERDICT_GRACE_S  # Ray may have ended because the first node has just finished
    while time.monotonic() < deadline:
        if (attempt_dir / VERDICT).exists():
            return 0
        time.sleep(0.5)
    _leave(attempt_dir, "again", f"Ray ended by itself on {socket.gethostname()}; see {log}")
    return 1


@contextmanager
def ray(options: list[str], log: Path, settings: dict[str, float]) -> Iterator[subprocess.Popen[bytes]]:
    """Ray's processes of this node; none is left afterwards."""
    folder = Path("/tmp") / f"isentrope-{environment.slurm_job().id}-{os.getpid()}"  # short: it holds sockets
    common = ["--block", "--disable-usage-stats", f"--num-cpus={environment.cpus()}"]
    if "--head" in options:
        common.append(f"--temp-dir={folder}")
    if settings["object_store_gib"]:
        common.append(f"--object-store-memory={int(settings['object_store_gib'] * GIB)}")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, *common]
    process = _start(command, log)
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):  # Ray would drain its nodes for half a minute first
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
        if "--head" in options:
            shutil.rmtree(folder, ignore_errors=True)


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start Ray and wait until it runs.

    It allows itself half a minute, which a busy node may not meet at once: three tries.
    """
    for trial in range(1, RAY_STARTS + 1):
        begin = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        while process.poll() is None:
            if RAY_RUNS in log.read_bytes()[begin:]:
                return process
            time.sleep(0.2)
        logging.warning("Ray did not start (try %d of %d); see %s", trial, RAY_STARTS, log)
    return process


def _answers(host: str, port: int, attempt_dir: Path) -> bool:
    """Wait until the head listens; False when there is a verdict already, or no head in time."""
    deadline = time.monotonic() + HEAD_TIMEOUT_S
    while time.monotonic() < deadline and not (attempt_dir / VERDICT).exists():
        with suppress(OSError), socket.create_connection((host, port), timeout=2):
            return True
        time.sleep(0.5)
    return False


def _leave(attempt_dir: Path, verdict: str, reason: str) -> None:
    """Write the verdict, whole or not at all: other nodes and the job script wait for it."""
    written = attempt_dir / f".{VERDICT}-{environment.node_index()}"
    written.write_text(f"{verdict} {' '.join(reason.split())}\n")
    written.replace(attempt_dir / VERDICT)


def _close_lost(log: AttemptLog, run_dir: Path, step: int, done: bool) -> None:
    """Give the attempt before this one an end, if it found none itself, with what its other nodes may have left.

    If the run is ``done``, that attempt has completed it, and was ended before it could say so.
    """
    for attempt in log.read()[-1:]:
        if not attempt.end and done:
            log.end(attempt, "completed", step, f"{step} steps; ended before it could say so")
        elif not attempt.end:
            left = run_dir / LAUNCH / f"job-{attempt.job_id}-{attempt.restart}" / VERDICT
            reason = left.read_text().partition(" ")[2].strip() if left.exists() else ""
            log.end(attempt, "lost", step, reason or "without a word: node failure, kill or time limit")


def _record(run_dir: Path) -> None:
    """Leave what was launched in the run's folder."""
    (run_dir / LAUNCH).mkdir(parents=True, exist_ok=True)
    for path in SHIPPED.iterdir():
        shutil.copy(path, run_dir / LAUNCH / path.name)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # tidy up when Slurm ends the step
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
