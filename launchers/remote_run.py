"""Reads runs on another machine over SSH: keeps a local copy of the event log that grows as the log there does.

Uses the system's ``ssh`` with the user's own configuration. What was copied is kept (``environment.cache_home``), so
that the next look at the same run brings only what is new. Only whole lines travel: a torn last line, which a resume
cuts off, never gets here.
"""

from __future__ import annotations

import fcntl
import hashlib
import shlex
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from launchers import environment
from pipeline.monitoring.events import FILE_NAME, EventLogError, cut_torn_line

SSH = ("ssh", "-T", "-C", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15")
RETRY_S = 5.0  # before a lost connection is tried again
LOST = 255  # ssh's own exit status; others are the remote command's
# Send whole lines behind byte $o of $f; with $pause, look again after so many seconds until the other side hangs up.
SEND = """
[ -f "$f" ] || { echo "does not exist" >&2; exit 3; }
[ -z "$pause" ] || { exec 3<&0; (cat <&3 >/dev/null; kill $$) & }
while :; do
  n=$(tail -c +$((o + 1)) "$f" | wc -l)
  if [ "$n" -gt 0 ]; then
    b=$(tail -c +$((o + 1)) "$f" | head -n "$n" | wc -c)
    tail -c +$((o + 1)) "$f" | head -c "$b" && o=$((o + b))
  fi
  [ -n "$pause" ] || exit 0
  sleep "$pause"
done
"""


@contextmanager
def local_folders(runs: Sequence[str], *, follow: bool) -> Iterator[list[Path]]:
    """The folder of each run on this machine; of ``host:/path`` a copy, up to date, and with ``follow`` kept so.

    Raises ``EventLogError`` where a host or a run is not reached.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(_copy(*remote, follow)) if (remote := _remote(run)) else Path(run) for run in runs]


def _remote(run: str) -> tuple[str, str] | None:
    """Host and path of ``host:/path``; None for a folder here."""
    host, colon, path = run.partition(":")
    return (host, path) if colon and host and path and "/" not in host and not Path(run).exists() else None


@contextmanager
def _copy(host: str, path: str, follow: bool) -> Iterator[Path]:
    log = f"{path.rstrip('/')}/{FILE_NAME}"
    with ExitStack() as stack:
        folder = _folder(host, path, stack)
        copied = folder / FILE_NAME
        _begin(host, log, copied)
        _fetch(host, log, copied)
        if follow:
            stack.enter_context(_following(host, log, copied))
        yield folder


def _folder(host: str, path: str, stack: ExitStack) -> Path:
    """Where the copy is kept; a temporary one while another process uses that."""
    name = hashlib.sha256(f"{host}:{path}".encode()).hexdigest()[:16]
    folder = environment.cache_home() / "isentrope" / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    lock = stack.enter_context((folder / ".lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Path(stack.enter_context(TemporaryDirectory(prefix="isentrope-run-")))
    return folder


def _begin(host: str, log: str, copied: Path) -> None:
    """Keep what was copied only if it is the beginning of the log there; never a part of a line."""
    begun = copied.read_bytes() if copied.exists() else b""
    begun = begun[: begun.rfind(b"\n") + 1]
    sums = _ssh(host, f"head -c {len(begun)} {shlex.quote(log)} | cksum").split() if begun else []
    here = subprocess.run(["cksum"], input=begun, capture_output=True, check=True).stdout.split()
    copied.write_bytes(begun if sums == here else b"")


def _fetch(host: str, log: str, copied: Path) -> None:
    """Bring what is new."""
    with copied.open("ab") as file:
        done = subprocess.run(
            _command(host, log, copied, ""), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE
        )
    if done.returncode:
        raise _unreachable(host, log, done)


@contextmanager
def _following(host: str, log: str, copied: Path) -> Iterator[None]:
    """Within, a thread keeps the copy growing, and connects again after a loss."""
    over, running = threading.Event(), threading.Lock()
    process: list[subprocess.Popen[bytes]] = []

    def follow() -> None:
        while not over.is_set():
            cut_torn_line(copied)  # that a lost connection left
            with copied.open("ab") as file, running:
                if over.is_set():
                    return
                command = _command(host, log, copied, "1")
                process[:] = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.DEVNULL)]
            process[0].wait()
            over.wait(RETRY_S)

    thread = threading.Thread(target=follow, name=f"follow {host}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        with running:
            for started in process:
                started.terminate()
        thread.join()


def _command(host: str, log: str, copied: Path, pause: str) -> list[str]:
    setting = f"f={shlex.quote(log)} o={copied.stat().st_size} pause={pause}"
    return [*SSH, "--", host, f"{setting}; {SEND}"]


def _ssh(host: str, command: str) -> bytes:
    done = subprocess.run([*SSH, "--", host, command], stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        raise _unreachable(host, command, done)
    return done.stdout


def _unreachable(host: str, what: str, done: subprocess.CompletedProcess[bytes]) -> EventLogError:
    said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
    if done.returncode == LOST:
        return EventLogError(f"{host}: {said[-1]}: `ssh {host} true` must work without a password")
    return EventLogError(f"{host}:{what}: {said[-1]}: give the folder of a run that was started")
