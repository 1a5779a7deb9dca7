"""Run a server so that nothing of it outlives its owner. A script, not a module to import: the owner starts it by path.

``python sglang_guard.py OWNER_PID SCRATCH_DIR COMMAND...`` runs COMMAND in a process group of its own with SCRATCH_DIR
as its TMPDIR. When the owner dies, when the guard gets SIGTERM, or when the command ends, it kills what is left of the
group and removes the scratch folder and the group's files in /dev/shm. PR_SET_PDEATHSIG in the owner would not do: it
fires when the *thread* that started the server ends, and owners start servers from thread pools.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.1

# SGLang's load slots (sglang/srt/managers/load_snapshot.py, named by a random id, never unlinked), the queues between
# its tensor-parallel ranks (distributed/device_communicators/shm_broadcast.py, 24 MiB each) and multiprocessing's
# semaphores, whose resource tracker is killed with the group.
_LOAD_SLOTS = "/dev/shm/sglang_loads_"
_SHARED_MEMORY = (_LOAD_SLOTS, "/dev/shm/sgl_shm_mq_", "/dev/shm/sem.mp-")


def main() -> int:
    """Guard until the end; returns the command's exit status."""
    owner, scratch, command = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    told_to_end: list[int] = []  # a handler that raised could cut the finally clause short
    signal.signal(signal.SIGTERM, lambda number, _: told_to_end.append(number))
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)  # the server's orphans become ours, so that we can wait for their end
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(scratch)},
        # Should the guard itself be killed outright. Safe here: the guard has one thread.
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    leftovers: set[str] = set()
    try:
        next_scan = 0.0
        while server.poll() is None and os.getppid() == owner and not told_to_end:
            if time.monotonic() >= next_scan:
                leftovers |= shared_memory(server.pid)
                up = any(path.startswith(_LOAD_SLOTS) for path in leftovers)
                next_scan = time.monotonic() + (10 if up else 1)  # seconds; nearly all is made at start-up
            time.sleep(_POLL_S)
        return 0 if told_to_end else server.poll() or 0
    finally:
        leftovers |= shared_memory(server.pid)
        with contextlib.suppress(ProcessLookupError):  # all of them may have ended already
            os.killpg(server.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-server.pid, 0)
        for path in leftovers:
            Path(path).unlink(missing_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)


def shared_memory(group: int) -> set[str]:
    """Files in /dev/shm of the kinds above that processes of the group have mapped.

    Compared by inode: glibc maps a semaphore under a temporary name before it links the final one.
    """
    mapped: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended, or belong to someone else
            if os.getpgid(int(process.name)) == group:
                lines = (line.split() for line in (process / "maps").read_text().splitlines() if " /dev/shm/" in line)
                mapped.update(int(fields[4]) for fields in lines)
    found: set[str] = set()
    for path in Path("/dev/shm").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if str(path).startswith(_SHARED_MEMORY) and path.stat().st_ino in mapped:
                found.add(str(path))
    return found


if __name__ == "__main__":
    sys.exit(main())
