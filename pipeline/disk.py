"""Writes to a disk that may fill up: a full one is recognised, said, and survived with the last words of a run."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RESERVE = ".reserve"  # file in a run's folder
RESERVE_BYTES = 1 << 20  # for the end of the event log, of the job's log and of the attempts
RESUME = "resume the run"  # once there is room
_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(OSError):
    """There is no room for what a run must write; the message names the folder, the bytes and the remedy."""


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Keep ``RESERVE_BYTES`` of the disk while the block runs, so that whoever ends the run afterwards can still write
    why.

    A failure for lack of space, in this process or reported by another, leaves the block as ``DiskFullError``.
    """
    path = folder / RESERVE
    try:
        with telling(folder):
            with naming(path), path.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
            yield
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def telling(folder: Path, then: str = RESUME) -> Iterator[None]:
    """A failure for lack of space, in this process or reported by another, leaves the block as ``DiskFullError``.

    ``folder``: what is written to, which need not exist yet. ``then``: what to do once there is room.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise full(folder, f"a write failed ({error})", then) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A failure of the operating system that leaves the block names ``path``: those of read, write and fsync name
    nothing.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which becomes ``path`` when the block ends: readers see what was there before, or all of it.

    A block that fails leaves nothing of it. Of several writers at once the last to end is read.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def require(folder: Path, needed: int, what: str) -> None:
    """Raise ``DiskFullError`` unless ``folder``, which exists, has room for ``needed`` bytes.

    Quotas are not seen, only disks.
    """
    if shutil.disk_usage(folder).free < needed:
        raise full(folder, f"{what} needs about {needed:,} bytes")


def full(folder: Path, what: str, then: str = RESUME) -> DiskFullError:
    """What to raise when ``what`` went wrong for lack of space; ``then``: what to do once there is room."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    return DiskFullError(f"{folder}: no space left: {what}, {free:,} bytes are free; make room, then {then}")


def is_full(error: BaseException | None) -> bool:
    """Whether an exception, or what it came from, says that a disk or a quota is full."""
    while error is not None:
        said = str(error)
        if getattr(error, "errno", None) in _ERRNOS or any(os.strerror(number) in said for number in _ERRNOS):
            return True
        error = error.__cause__ or error.__context__
    return False
