"""Runs training on this machine and starts it again from its newest checkpoint when it crashes."""

from __future__ import annotations

import os
from pathlib import Path

from launchers.supervise.attempts import LAUNCH, AttemptLog, gives_up, progress
from launchers.supervise.signals import caught
from launchers.supervise.training import train
from pipeline.config.load import to_yaml
from pipeline.config.schema import RunConfig


def supervise(config: RunConfig, run_dir: Path, limit: int) -> tuple[str, str]:
    """Train until done, stopped by a signal, or ``limit`` attempts in a row got nowhere.

    Verdict and reason are those of ``training``.

    After a signal there is no further attempt: ``saved``, or ``cancelled`` if a second one came before the checkpoint.
    """
    folder = run_dir / LAUNCH
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    log = AttemptLog(run_dir)
    with caught() as signals:
        while True:
            step = progress(run_dir).step
            reason = gives_up(log.read(), step, limit)
            if reason:
                return "failed", reason
            attempt = log.start(f"local-{os.getpid()}", 0, [os.uname().nodename], step)
            verdict, reason = train(run_dir, folder, folder / "config.yaml", signals=signals)
            if verdict == "again" and signals:
                verdict = "cancelled"
            log.end(attempt, verdict, progress(run_dir).step, reason)
            if verdict != "again":
                return verdict, reason
