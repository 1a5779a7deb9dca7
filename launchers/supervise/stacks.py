"""Writes as text where the processes of a run stand: their Python stacks.

A process that ``listen``s writes the Python stacks of its threads when it gets ``SIGNAL``, whatever it hangs in:
faulthandler's handler needs neither the interpreter's lock nor a thread that is free. It writes into a file in memory,
which goes with the process.
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SIGNAL = signal.SIGUSR2
ANSWER_S = 3.0
PYSPY_S = 10.0
_MEMORY = "isentrope-stacks"


def listen() -> int:
    """Answer ``SIGNAL`` from now on; the file descriptor that ``stack_of`` wants."""
    descriptor = os.memfd_create(_MEMORY)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
    faulthandler.register(SIGNAL, file=descriptor, all_threads=True)
    return descriptor


def listens(pid: int, descriptor: int) -> bool:
    """Whether this is (still) a process of this machine that listens with this descriptor."""
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/fd/{descriptor}").startswith(f"/memfd:{_MEMORY}")
    return False


def stack_of(pid: int, descriptor: int) -> str:
    """The stacks of a process of this machine that listens; "" if it does not answer: it is stopped, or gone."""
    answer, text = Path(f"/proc/{pid}/fd/{descriptor}"), ""
    if not listens(pid, descriptor):
        return ""
    with suppress(OSError):
        os.truncate(answer, 0)
        os.kill(pid, SIGNAL)
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            before, text = text, answer.read_text(errors="replace")
            if text and text == before:  # all of it
                return f"pid {pid} on {os.uname().nodename}\n{text}"
            time.sleep(0.1)
    return ""


def seen_from_outside(pid: int) -> str:
    """What shows of any process of this machine: its state, and its stack where py-spy is installed and may look."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
        state = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("State"))
    except OSError:
        return f"pid {pid}: gone\n"
    head = f"pid {pid} on {os.uname().nodename}: {command}\n{state}\n"
    program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if not program:
        return f"{head}its stack would be here if py-spy were installed\n"
    words = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PYSPY_S, check=False)
    except subprocess.TimeoutExpired:
        return f"{head}py-spy got no stack within {PYSPY_S:g} s\n"
    return f"{head}{done.stdout or done.stderr}"


def children(pid: int) -> list[int]:
    """Processes below ``pid``, of all generations: an SGLang server's, say."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # that thread has just ended
            for child in map(int, path.read_text().split()):
                found += [child, *children(child)]
    return found
