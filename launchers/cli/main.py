"""The ``isentrope`` command."""

from __future__ import annotations

import importlib.metadata
import logging
import re
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import typer
import typer.main

from launchers.cli import (
    alerts_cmd,
    benchmark_cmd,
    config_cmd,
    convert_cmd,
    data_cmd,
    doctor_cmd,
    entropy_cmd,
    evaluate_cmd,
    init_cmd,
    jobs_cmd,
    lab_cmd,
    launch_cmd,
    monitor_cmd,
    plan_cmd,
    report_cmd,
    train_cmd,
)
from launchers.cli.arguments import USAGE_ERROR
from launchers.cli.terminal import say
from pipeline.config.errors import ConfigError
from pipeline.data import DataError
from pipeline.monitoring.console import DEBUG_HINT, log_to_terminal
from pipeline.monitoring.events import EventLogError

# Modules that an extra brings, by the extra's name.
EXTRAS = {"nemo_run": "launch", "leptonai": "launch", "sglang": "sglang", "transformer_engine": "gpu"}

app = typer.Typer(
    name="isentrope",
    help="RL post-training of large language models at a policy entropy you choose.",
    epilog="Add --debug anywhere to see the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("init")(init_cmd.init)
app.command("train")(train_cmd.train)
app.command("evaluate")(evaluate_cmd.evaluate)
app.add_typer(benchmark_cmd.app, name="benchmark")
app.command("monitor")(monitor_cmd.monitor)
app.command("report")(report_cmd.report)
app.add_typer(alerts_cmd.app, name="alerts")
app.add_typer(launch_cmd.app, name="launch")
app.add_typer(jobs_cmd.app, name="jobs")
app.add_typer(config_cmd.app, name="config")
app.add_typer(data_cmd.app, name="data")
app.add_typer(plan_cmd.app, name="plan")
app.add_typer(convert_cmd.app, name="convert")
app.add_typer(lab_cmd.app, name="lab")
app.add_typer(entropy_cmd.app, name="entropy")
app.command("doctor")(doctor_cmd.doctor)


def _show_version(asked: bool) -> None:
    if asked:
        say(f"isentrope {importlib.metadata.version('isentrope')}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    """RL post-training of large language models at a policy entropy you choose."""


def run(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exits with 0, 1 (failure), 2 (``USAGE_ERROR``) or 130 (``INTERRUPTED``).

    Errors are one block, no traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    log_to_terminal(logging.INFO if debug else logging.WARNING, "%(levelname)s %(name)s: %(message)s")
    sys.excepthook = _traceback if debug else _one_line
    command = typer.main.get_command(app)  # not ``app`` itself: that would install an exception hook of its own
    _flow(command)
    try:
        command(args=[word for word in words if word != "--debug"], prog_name="isentrope")
    except (ConfigError, DataError, EventLogError) as error:
        if debug:
            raise
        say(str(error), err=True)
        sys.exit(USAGE_ERROR)


def _flow(command: Any) -> None:
    """Paragraphs of help are as wide as the terminal, which would break them at a docstring's line ends too."""
    command.help = re.sub(r"(?<=\S)\n(?=\S)", " ", command.help or "")
    for child in getattr(command, "commands", {}).values():
        _flow(child)


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What an unexpected exception prints; Python then exits with 1."""
    extra = EXTRAS.get((error.name or "").partition(".")[0]) if isinstance(error, ModuleNotFoundError) else None
    remedy = f"(pip install 'isentrope[{extra}]')" if extra else DEBUG_HINT
    say(f"error: {kind.__name__}: {error}\n{remedy}", err=True)


def _traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What an unexpected exception prints with --debug."""
    say("".join(traceback.format_exception(kind, error, trace)), err=True, nl=False)


if __name__ == "__main__":
    run()
