"""The one place where the text of a command leaves for the terminal, cleaned."""

from __future__ import annotations

import typer

from pipeline.monitoring.console import clean


def say(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """``text`` without control characters on standard output, or with ``err`` on standard error; then a new line."""
    typer.echo(clean(text), err=err, nl=nl)
