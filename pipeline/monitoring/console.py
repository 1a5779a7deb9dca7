"""Writes text to a terminal without control characters, which could move the cursor or retitle the window."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def clean(text: str) -> str:
    """``text`` without control characters but tabs and newlines.

    Run names, reasons and errors may come from strangers.
    """
    return _CONTROL.sub("", text)


class CleanConsole(Console):
    """A console that cleans every text that it draws; the codes of its own colours are added after that."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See ``Console.render``."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(clean(segment.text), segment.style)
