"""Reading an event log while it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.monitoring.events import EventLogError, parse_event


class EventReader:
    """The complete events of a log, once each, in the order written; superseded ones included, as nobody can know yet.

    Holds no file open between polls. Memory and time of a poll go with what is new.
    """

    def __init__(self, path: Path, position: tuple[int, int] = (0, 0)) -> None:
        self.path = path
        self._offset, self._lines = position  # the offset is always the start of a line

    @property
    def position(self) -> tuple[int, int]:
        """Bytes and lines read: give it to another reader, which goes on from here."""
        return self._offset, self._lines

    def poll(self, limit_bytes: int = 1 << 26) -> list[dict[str, Any]]:
        """Events appended since the last poll; at most ``limit_bytes`` of them are read, so poll until nothing comes.

        Raises ``EventLogError`` for a missing file, a damaged line, a newer schema, or a log that became shorter than what was read.
        """
        if not self.path.is_file():
            raise EventLogError(f"{self.path} does not exist: give the folder of a run that was started")
        with self.path.open("rb") as file:
            if file.seek(0, 2) < self._offset:
                raise EventLogError(f"{self.path} became shorter while it was read: was it replaced? Start again")
            file.seek(self._offset)
            content = file.read(limit_bytes)
            if content and b"\n" not in content:
                content += file.readline()  # a line longer than the limit
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        first, lines = self._lines + 1, complete.split(b"\n")[:-1]
        self._lines += len(lines)
        return [parse_event(line, number, self.path) for number, line in enumerate(lines, start=first)]
