"""Reading an event log while it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.monitoring.events import EventLogError, parse_event


class EventReader:
    """The complete events of a log, once each, in the order written; superseded ones included, as nobody can know yet.

    Holds no file open between polls. Memory and time of a poll go with what is new. Starts behind the first ``lines`` lines,
    which are ``offset`` bytes.
    """

    def __init__(self, path: Path, offset: int = 0, lines: int = 0) -> None:
        self.path = path
        self.offset = offset  # bytes read, always the start of a line
        self.lines = lines

    def poll(self, limit_bytes: int = 1 << 26) -> list[dict[str, Any]]:
        """Events appended since the last poll; at most ``limit_bytes`` of them are read, so poll until nothing comes.

        Raises ``EventLogError`` for a missing file, a damaged line, a newer schema, or a log that became shorter than what was read.
        """
        first = self.lines + 1
        return [parse_event(line, i, self.path) for i, line in enumerate(self.poll_lines(limit_bytes), start=first)]

    def poll_lines(self, limit_bytes: int = 1 << 26) -> list[bytes]:
        """As ``poll``, not parsed and without their newlines."""
        if not self.path.is_file():
            raise EventLogError(f"{self.path} does not exist: give the folder of a run that was started")
        with self.path.open("rb") as file:
            if file.seek(0, 2) < self.offset:
                raise EventLogError(f"{self.path} became shorter while it was read: was it replaced? Start again")
            file.seek(self.offset)
            content = file.read(limit_bytes)
            if content and b"\n" not in content:
                content += file.readline()  # a line longer than the limit
        complete = content[: content.rfind(b"\n") + 1]
        self.offset += len(complete)
        lines = complete.split(b"\n")[:-1]
        self.lines += len(lines)
        return lines
