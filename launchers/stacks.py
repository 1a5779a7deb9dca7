"""Where the processes of a run stand, as text files."""

from __future__ import annotations

import faulthandler
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

PYSPY_S = 10.0


def dump(path: Path, *, children: bool) -> None:
    """Write the Python stack of every thread of this process to ``path``; with ``children`` (an SGLang server's processes, say) theirs too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.write(f"pid {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        if children and (found := _descendants(os.getpid())):
            with ThreadPoolExecutor(len(found)) as threads:
                file.writelines(f"\n{text}" for text in threads.map(seen_from_outside, found))


def seen_from_outside(pid: int) -> str:
    """What shows of another process of this machine: its state, and its stack where py-spy is installed and may look."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
        state = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("State"))
    except OSError:
        return f"pid {pid}: gone\n"
    head = f"pid {pid}: {command}\n{state}\n"
    program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if not program:
        return f"{head}its stack would be here if py-spy were installed\n"
    words = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PYSPY_S, check=False)
    except subprocess.TimeoutExpired:
        return f"{head}py-spy got no stack within {PYSPY_S:g} s\n"
    return f"{head}{done.stdout or done.stderr}"


def _descendants(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # that thread has just ended
            for child in map(int, path.read_text().split()):
                found += [child, *_descendants(child)]
    return found
