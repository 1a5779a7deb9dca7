"""``isentrope monitor`` in a terminal of its own: it redraws as the run goes on, and ctrl-C ends it."""

import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from launchers.cli import monitor_cmd
from pipeline.monitoring.events import FILE_NAME, EventLog
from pipeline.monitoring.series import Series

ROOT = Path(__file__).resolve().parents[2]
STEP = {
    "time": 1.0,
    "entropy": 0.3,
    "entropy_filtered": 0.3,
    "band_low": 0.2,
    "band_high": 0.4,
    "state": "off",
    "actuator": "none",
}


def read_until(terminal, *words, seconds=60):
    """What the terminal is sent until all of ``words`` are in it."""
    text, deadline = "", time.monotonic() + seconds
    while not all(word in text for word in words):
        assert time.monotonic() < deadline, text[-2000:]
        text += os.read(terminal, 1 << 16).decode(errors="replace")
    return text


def test_it_redraws_until_ctrl_c(tmp_path):
    terminal, end = pty.openpty()
    words = [sys.executable, "-m", "launchers.cli.main", "monitor", str(tmp_path), "--every", "0.2"]
    surroundings = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    with EventLog(tmp_path / FILE_NAME) as log:
        log.append("run_start", {"time": 1.0, "step": 0, "steps": 50, "name": "live"})
        log.append("step", {"step": 0, "reason": "first", **STEP})
        shown = subprocess.Popen(words, stdin=end, stdout=end, stderr=end, cwd=ROOT, env=surroundings)
        os.close(end)
        read_until(terminal, "step 1/50", "in band", "first")
        log.append("step", {"step": 1, "reason": "second", **STEP})
        read_until(terminal, "step 2/50")
        shown.send_signal(signal.SIGINT)
        read_until(terminal, "\x1b[?1049l")  # the screen as it was before
    with contextlib.suppress(OSError):  # the other end is closed: it has ended
        while os.read(terminal, 1 << 16):
            pass
    assert shown.wait(30) == 0
    os.close(terminal)


def test_a_line_that_is_damaged_while_it_is_watched_is_told(tmp_path):
    terminal, end = pty.openpty()
    words = [sys.executable, "-m", "launchers.cli.main", "monitor", str(tmp_path), "--every", "0.2"]
    with EventLog(tmp_path / FILE_NAME) as log:
        log.append("run_start", {"time": 1.0, "step": 0, "steps": 50, "name": "live"})
    shown = subprocess.Popen(words, stdin=end, stdout=end, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(end)
    read_until(terminal, "no step yet")
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(b"nonsense\n")
    read_until(terminal, "damaged")
    shown.send_signal(signal.SIGINT)
    read_until(terminal, "\x1b[?1049l")
    with contextlib.suppress(OSError):  # the other end is closed: it has ended
        while os.read(terminal, 1 << 16):
            pass
    assert shown.wait(30) == 0
    os.close(terminal)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(60)
def test_an_interrupt_that_falls_into_a_destructor_ends_it_too(tmp_path, monkeypatch):
    """Python drops exceptions there; so may have gone the one ctrl-C that was lost in many runs of this file."""

    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    with EventLog(tmp_path / FILE_NAME) as log:
        log.append("run_start", {"time": 1.0, "step": 0, "steps": 50, "name": "live"})
    series = Series(tmp_path)
    monkeypatch.setattr(series, "update", lambda: Dying() and None)
    before = signal.getsignal(signal.SIGINT)
    try:
        monitor_cmd._watch([series], Console(file=io.StringIO(), force_terminal=True), 0.01)
    finally:
        signal.signal(signal.SIGINT, before)
