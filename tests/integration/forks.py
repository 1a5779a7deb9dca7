"""The command line in a copy of a process that has imported everything: a run starts in no time."""

import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path

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
    process = FORKS.Process(target=_command, args=(words, cwd, streams))
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


def _command(words: tuple[str, ...], cwd: Path, streams: tuple[Path, Path]) -> None:
    os.chdir(cwd)
    for number, path in enumerate(streams, start=1):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    from launchers.cli.main import run

    run(words)
