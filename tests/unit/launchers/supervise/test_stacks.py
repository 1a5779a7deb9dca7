"""Stacks of processes, whatever they hang in."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from launchers.supervise.stacks import children, listens, seen_from_outside, stack_of

ROOT = Path(__file__).resolve().parents[4]
LISTENER = """
import ctypes, subprocess, sys, threading, time
from launchers.supervise.stacks import listen

def beside():
    time.sleep(600)

def stuck():
    print(listen(), child.pid, flush=True)
    while True:
        {stuck}

threading.Thread(target=beside, daemon=True).start()
child = subprocess.Popen(["sleep", "600"])
stuck()
"""


@contextmanager
def listener(stuck):
    """A process that listens and then does ``stuck``; its pid, its descriptor and its child's pid."""
    words = [sys.executable, "-c", LISTENER.format(stuck=stuck)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    descriptor, child = map(int, process.stdout.readline().split())
    try:
        yield process.pid, descriptor, child
    finally:
        os.kill(child, signal.SIGKILL)
        process.kill()
        process.communicate()


@pytest.mark.parametrize("stuck", ["time.sleep(600)", "ctypes.PyDLL(None).sleep(600)"], ids=["idle", "holds the GIL"])
def test_every_thread_shows_also_when_the_interpreter_is_held(stuck):
    with listener(stuck) as (pid, descriptor, child):
        for _ in range(2):  # asked again, it answers anew
            text = stack_of(pid, descriptor)
            assert text.startswith(f"pid {pid} on {os.uname().nodename}\n")
            assert text.count("in stuck") == text.count("in beside") == 1
        assert children(pid) == [child]


def test_a_stopped_process_does_not_answer_but_shows_from_outside():
    with listener("time.sleep(600)") as (pid, descriptor, _):
        os.kill(pid, signal.SIGSTOP)
        assert listens(pid, descriptor)
        assert stack_of(pid, descriptor) == ""
        seen = seen_from_outside(pid)
        assert "State:\tT (stopped)" in seen
        assert sys.executable in seen


def test_who_does_not_listen_gets_no_signal():
    with listener("time.sleep(600)") as (pid, descriptor, child):
        for who, which in [(child, 1), (pid, descriptor + 1), (2**22 + 1, 3)]:
            assert not listens(who, which)
            assert stack_of(who, which) == ""
        os.kill(child, 0)  # SIGUSR2 would have ended it
        assert "gone" in seen_from_outside(2**22 + 1)
