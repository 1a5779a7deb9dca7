"""``isentrope monitor``: shows runs live in the terminal or in a browser."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.live import Live

from launchers.cli.terminal import say
from launchers.remote_run import local_folders

if TYPE_CHECKING:
    from pipeline.monitoring.series import Series

IDLE = 4  # times the seconds that a look at very long runs takes: what is waited at least until the next
JSON = typer.Option(False, "--json", help="Print one JSON document, a list with one object per run, and end.")


def monitor(
    runs: list[str] = typer.Argument(
        ..., metavar="RUN...", help="Run folders, finished or still running; host:/path over SSH."
    ),
    once: bool = typer.Option(False, "--once", help="Print the state once and end; so it is without a terminal."),
    as_json: bool = JSON,
    every: float = typer.Option(1.0, "--every", min=0.1, help="Seconds between two looks."),
    web: bool = typer.Option(False, "--web", help="Serve a page for the browser instead."),
    port: int = typer.Option(8421, "--port", min=0, max=65535, help="With --web: where it listens; 0: any free port."),
    host: str = typer.Option(
        "127.0.0.1", "--host", help="With --web: address to listen at; beyond this machine, by token."
    ),
    token: bool = typer.Option(
        False, "--token", help="With --web: ask for a token on this machine too, e.g. a shared login node."
    ),
) -> None:
    """Watch runs: entropy against its band, the controller, reward, times, alerts.

    Ctrl-C ends it; the runs do not notice.

    Examples:

      isentrope monitor runs/quickstart/grpo runs/quickstart/pi

      isentrope monitor login.cluster:/scratch/me/runs/long

      isentrope monitor runs/pi --json | jq '.[0].time_in_band'

      isentrope monitor runs/quickstart/grpo runs/quickstart/pi --web --port 8421
    """
    from pipeline.monitoring.console import CleanConsole
    from pipeline.monitoring.series import Series  # loads NumPy
    from pipeline.monitoring.status import status_of
    from pipeline.monitoring.terminal import view

    console = CleanConsole()
    live = not (once or as_json) and console.is_terminal
    with local_folders(runs, follow=live or web) as folders:
        if web:
            from pipeline.monitoring.web.server import serve

            serve(folders, host, port, with_token=token, announce=lambda url: say(f"{url}   (ctrl-C ends)"))
            return
        series = [Series(folder) for folder in folders]
        if as_json:
            found = [{**status_of(one), "run": run} for one, run in zip(series, runs, strict=True)]
            say(json.dumps(found, allow_nan=False))
        elif live:
            _watch(series, console, every)
        else:
            console.print(view(series, console))


def _watch(runs: Sequence[Series], console: Console, every: float) -> None:
    """Redraw until ctrl-C."""
    from pipeline.monitoring.terminal import view

    spent = 0.0
    asked: list[int] = []

    def end(number: int, frame: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt  # out of a sleep; an exception that falls into a destructor is lost, this list is not

    signal.signal(signal.SIGINT, end)
    with Live(view(runs, console), console=console, screen=True, auto_refresh=False) as shown:
        try:
            while not asked:
                time.sleep(max(every, IDLE * spent))
                started = time.perf_counter()
                for run in runs:
                    run.update()
                shown.update(view(runs, console), refresh=True)
                spent = time.perf_counter() - started
        except KeyboardInterrupt:
            pass
    console.print(view(runs, console))
