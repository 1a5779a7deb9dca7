"""Runs the cells of a comparison: each in its own process, several at a time, complete ones not again."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from launchers import environment
from launchers.lab.suite import WEIGHTS, Cell, with_starts
from launchers.supervise.attempts import begun, progress
from launchers.supervise.signals import caught, hand_on
from pipeline.config.load import to_yaml
from pipeline.monitoring.console import DEBUG_HINT
from pipeline.monitoring.events import EventLogError

LOG = "lab.log"  # what the training process said, in the run's folder
CONFIG = "lab.yaml"
STOPPING = "no further run is started; those in progress save a checkpoint and end (once more to end them at once)"
_INTERRUPTED = (130, -signal.SIGINT)  # exit codes of a command of ours that ctrl-C ended before it could save
_ERROR = re.compile(r"error: \w+: ")  # how a command of ours begins to say what it did not expect
_converting = Lock()  # two runs that start from the same one write its weights once


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    cell: Cell
    computed: bool  # False: it was complete already
    error: str = ""  # the last message of the training process


class StoppedError(Exception):
    """A run was not started, or ended before its last step, because the matrix was asked to stop."""


def run_matrix(cells: Sequence[Cell], workers: int, done: Callable[[Outcome], None]) -> list[Outcome]:
    """Run what is missing, and the runs that cells start from, ``workers`` at a time; ``done`` hears as each one ends.

    One that fails does not stop the others, but for those that start from it: they fail too.

    A cell that was broken off goes on from its checkpoint, so the matrix may be stopped and started again at any time.

    After ctrl-C, SIGTERM or SIGUSR1 no further run is started, and those in progress save and end; those that are not
    complete then have no outcome, unless they failed. Raises what kept a run from being started, e.g. ``OSError``.
    """
    outcomes = []
    futures: dict[str, Future[Outcome]] = {}
    with caught(STOPPING) as signals, ThreadPoolExecutor(workers) as pool:
        for cell in with_starts(cells):  # the pool takes them in order: who waits for a start never keeps it waiting
            start = futures[cell.start.config.run_dir] if cell.start else None
            futures[cell.config.run_dir] = pool.submit(_run, cell, start, signals)
        try:
            for future in as_completed(futures.values()):
                with suppress(StoppedError):
                    outcomes.append(future.result())
                    done(outcomes[-1])
        finally:
            pool.shutdown(cancel_futures=True)  # of an error here the others would hear only once they are through
    return outcomes


def is_complete(run_dir: Path) -> bool:
    """Whether the run there has done all its steps."""
    try:
        return progress(run_dir).status == "completed"
    except EventLogError:
        return False


def _run(cell: Cell, start: Future[Outcome] | None, signals: Sequence[int]) -> Outcome:
    """Run one cell, unless it is complete; ``signals`` may grow. Raises ``StoppedError`` where they kept it from it."""
    run_dir = Path(cell.config.run_dir)
    if is_complete(run_dir):
        return Outcome(cell, computed=False)
    if signals:
        raise StoppedError
    run_dir.mkdir(parents=True, exist_ok=True)
    if start is not None:
        before = start.result()
        error = before.error or _write_weights(Path(before.cell.config.run_dir), run_dir / LOG, signals)
        if error:
            return Outcome(cell, computed=False, error=f"what it starts from is missing: {error}")
    (run_dir / CONFIG).write_text(to_yaml(cell.config))
    source = ["--resume", str(run_dir)] if begun(run_dir) else ["--config", str(run_dir / CONFIG)]
    error = _isentrope(["train", *source], run_dir / LOG, signals)
    if not error and not is_complete(run_dir):  # asked to stop, it saves its state and ends well
        if signals:
            raise StoppedError
        error = "it was stopped before its last step"
    return Outcome(cell, computed=True, error=error)


def _write_weights(run_dir: Path, log: Path, signals: Sequence[int]) -> str:
    """The last model of a complete run as a Hugging Face folder beside it, once; returns the error."""
    words = ["convert", "megatron-to-hf", "--checkpoint", str(run_dir), "--out", str(run_dir / WEIGHTS)]
    with _converting:
        return "" if (run_dir / WEIGHTS).is_dir() else _isentrope(words, log, signals)


def _isentrope(words: Sequence[str], log: Path, signals: Sequence[int]) -> str:
    """Run a command of ours in its own process, to which ``signals`` are handed on as they come in.

    Returns its last words where it failed; raises ``StoppedError`` where the signals ended it, or came before it.
    """
    if signals:
        raise StoppedError
    command = [sys.executable, "-m", "launchers.cli.main", *words]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment.child(OMP_NUM_THREADS="1"))
    code = _ended(process, signals)
    if code in _INTERRUPTED:
        time.sleep(0.5)  # it may be ahead of the main thread, which hears of the same ctrl-C
    if signals and (code < 0 or code in _INTERRUPTED):
        raise StoppedError
    return "" if code == 0 else _last_words(log, code)


def _ended(process: subprocess.Popen[bytes], signals: Sequence[int]) -> int:
    """Wait for the process, handing ``signals`` on to it; returns its exit code."""
    handed_on = len(signals)
    if handed_on:  # a ctrl-C of just now may have come before there was a process to hear it
        process.send_signal(signal.SIGTERM)
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=0.2)
        handed_on = hand_on(process, signals, handed_on)


def _last_words(log: Path, code: int) -> str:
    """What the command said of its failure: an error that it did not expect, whole, or else the last line that is not
    indented and those that belong to it.
    """
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"]
    begins = [i for i, line in enumerate(lines) if _ERROR.match(line)]
    begins = begins or [i for i, line in enumerate(lines) if not line[0].isspace()] or [0]
    said = lines[begins[-1] :]
    said = said[: said.index(DEBUG_HINT)] if DEBUG_HINT in said else said  # the hint is for who typed the command
    return f"exit code {code}: {'; '.join(' '.join(line.split()) for line in said)} ({log})"
