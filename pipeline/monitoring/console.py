"""Text on its way to a terminal, without control characters: they could move the cursor or retitle the window.

Commands write with ``launchers/cli/terminal.say``, tables and bars with ``CleanConsole``, the log with
``CleanFormatter``; a test holds them to it.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

DEBUG_HINT = "(run again with --debug to see where)"  # the line after an error that was not expected
# Whole sequences first (ECMA-48: colours and movements, then titles and links), so that their tails do not stay.
_SEQUENCE = re.compile("(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b\\]|\x9d)[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\\\|\x9c)")
# All but tab and newline; what overrides the direction of reading; half a character, which no terminal takes.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """``text`` without control characters but tabs and newlines.

    Run names, reasons and errors may come from strangers.
    """
    return _CONTROL.sub("", _SEQUENCE.sub("", text))


class CleanFormatter(logging.Formatter):
    """A log line, and the traceback under it, cleaned."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter.format``."""
        return clean(super().format(record))


def log_to_terminal(level: int, form: str) -> None:
    """Write the log of this process to standard error, from ``level`` on, in the ``form`` of ``logging.Formatter``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(CleanFormatter(form))
    logging.basicConfig(level=level, handlers=[handler])


class CleanConsole(Console):
    """A console that cleans every text that it draws; the codes of its own colours are added after that.

    Brackets in a text are text, no markup of rich's.
    """

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See ``Console.render``."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(clean(segment.text), segment.style)
