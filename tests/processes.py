"""Processes that a test looks for by their command line."""

from contextlib import suppress
from pathlib import Path

from launchers.supervise.stacks import children


def title(pid: int) -> str:
    """Command line of a process; empty when it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def descendants(pid: int, begins: str) -> list[int]:
    """Processes below ``pid`` whose command line begins so."""
    return [child for child in children(pid) if title(child).startswith(begins)]
