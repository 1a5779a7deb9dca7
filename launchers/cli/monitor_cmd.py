"""``isentrope monitor``."""

from __future__ import annotations

from pathlib import Path

import typer


def monitor(
    runs: list[Path] = typer.Argument(..., metavar="RUN...", help="Run folders, finished or still running."),
    web: bool = typer.Option(False, "--web", help="Serve a page for the browser."),
    port: int = typer.Option(8421, "--port", min=0, max=65535, help="With --web: where it listens; 0: any free port."),
    host: str = typer.Option(
        "127.0.0.1", "--host", help="With --web: address to listen at; beyond this machine, by token."
    ),
    token: bool = typer.Option(
        False, "--token", help="With --web: ask for a token on this machine too, e.g. a shared login node."
    ),
) -> None:
    """Watch runs live.

    Example:

      isentrope monitor runs/quickstart/grpo runs/quickstart/pi --web --port 8421
    """
    if web:
        from pipeline.monitoring.web.server import serve

        serve(runs, host, port, with_token=token, announce=lambda url: typer.echo(f"{url}   (ctrl-C ends)"))
