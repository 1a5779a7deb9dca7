"""Runs the cells of a comparison: each in its own process, several at a time, complete ones not again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from launchers import environment
from launchers.lab.suite import WEIGHTS, Cell, with_starts
from launchers.supervise.attempts import begun, progress
from pipeline.config.load import to_yaml
from pipeline.monitoring.events import EventLogError

LOG = "lab.log"  # what the training process said, in the run's folder
CONFIG = "lab.yaml"
_converting = Lock()  # two runs that start from the same one write its weights once


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    cell: Cell
    computed: bool  # False: it was complete already
    error: str = ""  # the last message of the training process


def run_matrix(cells: Sequence[Cell], workers: int, done: Callable[[Outcome], None]) -> list[Outcome]:
    """Run what is missing, and the runs that cells start from, ``workers`` at a time; ``done`` hears as each one ends.

    One that fails does not stop the others, but for those that start from it: they fail too.

    A cell that was broken off goes on from its checkpoint, so the matrix may be stopped and started again at any time.
    """
    outcomes = []
    futures: dict[str, Future[Outcome]] = {}
    with ThreadPoolExecutor(workers) as pool:
        for cell in with_starts(cells):  # the pool takes them in order: who waits for a start never keeps it waiting
            start = futures[cell.start.config.run_dir] if cell.start else None
            futures[cell.config.run_dir] = pool.submit(_run, cell, start)
        for future in as_completed(futures.values()):
            outcomes.append(future.result())
            done(outcomes[-1])
    return outcomes


def is_complete(run_dir: Path) -> bool:
    """Whether the run there has done all its steps."""
    try:
        return progress(run_dir).status == "completed"
    except EventLogError:
        return False


def _run(cell: Cell, start: Future[Outcome] | None) -> Outcome:
    run_dir = Path(cell.config.run_dir)
    if is_complete(run_dir):
        return Outcome(cell, computed=False)
    run_dir.mkdir(parents=True, exist_ok=True)
    if start is not None:
        error = start.result().error or _write_weights(Path(start.result().cell.config.run_dir), run_dir / LOG)
        if error:
            return Outcome(cell, computed=False, error=f"what it starts from is missing: {error}")
    (run_dir / CONFIG).write_text(to_yaml(cell.config))
    source = ["--resume", str(run_dir)] if begun(run_dir) else ["--config", str(run_dir / CONFIG)]
    error = _isentrope(["train", *source], run_dir / LOG)
    if not error and not is_complete(run_dir):  # asked to stop, it saves its state and ends well
        error = "it was stopped before its last step"
    return Outcome(cell, computed=True, error=error)


def _write_weights(run_dir: Path, log: Path) -> str:
    """The last model of a complete run as a Hugging Face folder beside it, once; returns the error."""
    words = ["convert", "megatron-to-hf", "--checkpoint", str(run_dir), "--out", str(run_dir / WEIGHTS)]
    with _converting:
        return "" if (run_dir / WEIGHTS).is_dir() else _isentrope(words, log)


def _isentrope(words: Sequence[str], log: Path) -> str:
    """Run a command of ours in its own process; returns its last words where it failed."""
    command = [sys.executable, "-m", "launchers.cli.main", *words]
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=file, env=environment.child(OMP_NUM_THREADS="1")).returncode
    return "" if code == 0 else _last_words(log, code)


def _last_words(log: Path, code: int) -> str:
    """The last line that is not indented, and those that belong to it."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"]
    begin = max((i for i, line in enumerate(lines) if not line[0].isspace()), default=0)
    return f"exit code {code}: {'; '.join(' '.join(line.split()) for line in lines[begin:])} ({log})"
