import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.rollout.sglang import guard as sglang_guard

GUARD = str(Path(sglang_guard.__file__))
# A "server" with a child, which keeps a file in /dev/shm mapped that is named as SGLang names its own.
SERVER = """
import mmap, os, subprocess, sys, time
child = subprocess.Popen(["sleep", "60"])
slot = f"/dev/shm/sglang_loads_test_{os.getpid()}.shm"
with open(slot, "wb+") as file:
    file.truncate(4096)
    mapped = mmap.mmap(file.fileno(), 4096)
print(os.getpid(), child.pid, slot, os.environ["TMPDIR"], flush=True)
time.sleep(float(sys.argv[1]))
"""


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def eventually(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def all_gone(line):
    server, child, slot, scratch = line.split()
    return gone(server) and gone(child) and not Path(slot).exists() and not Path(scratch).exists()


def guard_command(owner, scratch, seconds):
    return [sys.executable, "-I", GUARD, str(owner), str(scratch), sys.executable, "-c", SERVER, str(seconds)]


@pytest.fixture
def scratch(tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    (folder / "socket").touch()
    return folder


def test_terminate_ends_the_whole_group_and_removes_its_files(scratch):
    with subprocess.Popen(guard_command(os.getpid(), scratch, 60), stdout=subprocess.PIPE, text=True) as guard:
        line = guard.stdout.readline()
        assert Path(line.split()[2]).exists()
        assert line.split()[3] == str(scratch)
        guard.terminate()
        guard.wait(60)
    assert eventually(lambda: all_gone(line))


def test_the_death_of_the_owner_ends_it(scratch):
    # The owner is a process that starts the guard and then waits to be killed.
    program = f"import subprocess, os; subprocess.run({guard_command('OWNER', scratch, 60)!r}"
    program = program.replace("'OWNER'", "str(os.getpid())") + ")"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        line = owner.stdout.readline()
        os.kill(owner.pid, signal.SIGKILL)
        assert eventually(lambda: all_gone(line))


def test_the_end_of_the_server_ends_the_guard_with_its_children(scratch):
    with subprocess.Popen(guard_command(os.getpid(), scratch, 2), stdout=subprocess.PIPE, text=True) as guard:
        line = guard.stdout.readline()
        assert guard.wait(60) == 0
    assert eventually(lambda: all_gone(line))


def test_being_told_to_end_while_it_cleans_up_does_not_stop_the_cleaning(scratch):
    with subprocess.Popen(guard_command(os.getpid(), scratch, 60), stdout=subprocess.PIPE, text=True) as guard:
        line = guard.stdout.readline()
        time.sleep(1.3)  # it looks for files of the group once a second
        os.kill(int(line.split()[0]), signal.SIGKILL)  # the guard begins to clean up, and its owner closes the server
        while guard.poll() is None:
            guard.terminate()
            time.sleep(0.001)
    assert all_gone(line)


def test_the_death_of_the_guard_ends_the_server(scratch):
    with subprocess.Popen(guard_command(os.getpid(), scratch, 60), stdout=subprocess.PIPE, text=True) as guard:
        server, child, slot, _ = guard.stdout.readline().split()
        guard.kill()
        assert eventually(lambda: gone(server))
    os.kill(int(child), signal.SIGKILL)
    Path(slot).unlink()
