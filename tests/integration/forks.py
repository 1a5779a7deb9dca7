"""The command line in a copy of a process that has imported everything: a run starts in no time.

As a program it is such a process, for ``Elsewhere``: it reads commands, one a line, and answers how each ended.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["launchers.cli.main", "launchers.run.assemble", "megatron_ext.learner"])


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def isentrope(*words: str, cwd: Path, timeout: float = 240) -> Done:
    """``isentrope`` with these words, in ``cwd``; what it leaves there beside its own files is two with its output."""
    streams = cwd / f"{os.getpid()}.stdout", cwd / f"{os.getpid()}.stderr"
    process = FORKS.Process(target=command, args=(words, cwd, *streams))
    process.start()
    process.join(timeout)
    ended = process.exitcode
    process.kill()
    process.join()
    out, err = (path.read_text() for path in streams)
    for path in streams:
        path.unlink()
    assert ended is not None, f"it did not end in {timeout} s: {err[-3000:]}"
    return Done(ended, out, err)


def command(words: Sequence[str], cwd: Path, out: Path, err: Path) -> None:
    """``isentrope`` in this process, which is a copy; ``out`` and ``err`` may be one file."""
    os.chdir(cwd)
    for number, path in enumerate((out, err), start=1):
        with path.open("a") as file:
            os.dup2(file.fileno(), number)
    from launchers.cli.main import run

    run(words)


class Background:
    """``isentrope`` while the test goes on; what it says goes to one file."""

    def __init__(self, *words: str, cwd: Path, log: Path) -> None:
        self._log, self._process = log, FORKS.Process(target=command, args=(words, cwd, log, log))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        """As ``subprocess.Popen`` does."""
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for its end; what it said."""
        self._process.join(timeout)
        assert self.returncode is not None, f"it did not end in {timeout} s: {self._log.read_text()[-3000:]}"
        return self._log.read_text(), None


class Elsewhere:
    """``isentrope`` in surroundings of its own: a working folder, variables, and what ``enter`` puts a program into.

    ``enter`` makes of a command one that runs it in namespaces of its own.
    """

    def __init__(self, enter: Sequence[str], cwd: Path, variables: Mapping[str, str]) -> None:
        words = [*enter, sys.executable, "-m", "tests.integration.forks"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(words, cwd=cwd, env=dict(variables), **pipes)

    def isentrope(self, *words: str, timeout: int = 600) -> Done:
        """Run it to its end; after ``timeout`` seconds SIGALRM ends it."""
        self._process.stdin.write(json.dumps([timeout, words]) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve() -> None:
    """Answer commands until the input ends."""
    for name in ("launchers.cli.main", "launchers.slurm.submit", "nemo_run"):
        import_module(name)
    for line in sys.stdin:
        timeout, words = json.loads(line)
        with TemporaryFile() as out, TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                with Path(os.devnull).open() as nothing:
                    os.dup2(nothing.fileno(), 0)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                signal.alarm(timeout)
                sys.modules["launchers.cli.main"].run(words)
                sys.exit(0)
            _, status = os.waitpid(child, 0)
            said = (os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode() for file in (out, err))
            print(json.dumps(asdict(Done(os.waitstatus_to_exitcode(status), *said))), flush=True)


if __name__ == "__main__":
    serve()
