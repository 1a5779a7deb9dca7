"""A run on this machine that survives its own crashes: the attempts of ``launchers.slurm``, without Slurm."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launchers.slurm.attempts import LAUNCH, AttemptLog, gives_up, progress
from launchers.slurm.node import DRIVER, train
from pipeline.config.load import to_yaml
from pipeline.config.schema import RunConfig


def supervise(config: RunConfig, run_dir: Path, limit: int) -> tuple[str, str]:
    """Train until done, stopped by a signal, or ``limit`` attempts in a row got nowhere; verdict and reason as in ``slurm.node``."""
    folder = run_dir / LAUNCH
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    log = AttemptLog(run_dir)
    while True:
        step = progress(run_dir).step
        reason = gives_up(log.read(), step, limit)
        if reason:
            return "failed", reason
        attempt = log.start(f"local-{os.getpid()}", 0, [os.uname().nodename], step)
        with _signals_for(folder / DRIVER):
            verdict, reason = train(run_dir, folder, folder / "config.yaml")
        log.end(attempt, verdict, progress(run_dir).step, reason)
        if verdict != "again":
            return verdict, reason


@contextmanager
def _signals_for(pid: Path) -> Iterator[None]:
    """Hand SIGTERM and SIGUSR1 to the training process, which saves; ctrl-C reaches it by itself."""

    def hand_on(number: int, frame: object) -> None:
        with suppress(OSError, ValueError):  # not started yet, or over
            os.kill(int(pid.read_text()), number)

    pid.unlink(missing_ok=True)
    handlers = {signal.SIGTERM: hand_on, signal.SIGUSR1: hand_on, signal.SIGINT: lambda number, frame: None}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
