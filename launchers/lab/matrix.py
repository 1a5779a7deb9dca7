"""Runs the cells of a comparison: each in its own process, several at a time, complete ones not again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from launchers import environment
from launchers.lab.suite import Cell
from launchers.supervise.attempts import begun, progress
from pipeline.config.load import to_yaml
from pipeline.monitoring.events import EventLogError

LOG = "lab.log"  # what the training process said, in the run's folder
CONFIG = "lab.yaml"


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    cell: Cell
    computed: bool  # False: it was complete already
    error: str = ""  # the last line that the training process said


def run_matrix(cells: Sequence[Cell], workers: int, done: Callable[[Outcome], None]) -> list[Outcome]:
    """Run what is missing, ``workers`` at a time; ``done`` is told as each cell ends.

    One that fails does not stop the others.

    A cell that was broken off goes on from its checkpoint, so the matrix may be stopped and started again at any time.
    """
    outcomes = []
    with ThreadPoolExecutor(workers) as pool:
        for future in as_completed([pool.submit(_run, cell) for cell in cells]):
            outcomes.append(future.result())
            done(outcomes[-1])
    return outcomes


def is_complete(run_dir: Path) -> bool:
    """Whether the run there has done all its steps."""
    try:
        return progress(run_dir).status == "completed"
    except EventLogError:
        return False


def _run(cell: Cell) -> Outcome:
    run_dir = Path(cell.config.run_dir)
    if is_complete(run_dir):
        return Outcome(cell, computed=False)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / CONFIG).write_text(to_yaml(cell.config))
    source = ["--resume", str(run_dir)] if begun(run_dir) else ["--config", str(run_dir / CONFIG)]
    command = [sys.executable, "-m", "launchers.cli.main", "train", *source]
    with (run_dir / LOG).open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=environment.child(OMP_NUM_THREADS="1")).returncode
    return Outcome(cell, computed=True, error="" if code == 0 else _last_words(run_dir / LOG, code))


def _last_words(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1] if lines else 'no output'} ({log})"
