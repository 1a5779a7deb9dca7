"""``isentrope lab``: compares entropy methods on the same task."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launchers import environment
from launchers.cli.arguments import INTERRUPTED, JSON
from launchers.cli.terminal import say
from launchers.plan.words import duration
from pipeline.monitoring.console import CleanConsole

if TYPE_CHECKING:
    from launchers.lab.matrix import Outcome

app = typer.Typer(help="Compare entropy methods on the same loop.", no_args_is_help=True)


@app.command()
def methods(as_json: bool = JSON) -> None:
    """List the methods: what each does, its source, how well its rule is known, and the overrides that switch it on.

    Overrides are words for `isentrope train`, on top of any configuration; what is not offered says why.

    Example:

      isentrope lab methods --json |
        jq -r '.[] | select(.name == "gspo") | .overrides | join(" ")'
    """
    from pipeline.methods import EVIDENCE, all_methods  # imports torch

    if as_json:
        say(json.dumps([asdict(method) | {"offered": not method.missing} for method in all_methods().values()]))
        return
    for method in all_methods().values():
        say(f"{method.name}: {method.kind}, {method.source} ({method.evidence})")
        say(f"    {method.rule}")
        say(f"    {' '.join(method.overrides) or f'not offered: {method.missing}'}")
    say("; ".join(f"{name}: {meaning}" for name, meaning in EVIDENCE.items()))


@app.command("run")
def run(
    suite: str = typer.Option("", "--suite", "-s", help="Packaged suite (small is the first to try), or a YAML file."),
    methods: list[str] = typer.Option([], "--methods", "-m", help="Only these (the baseline is always among them)."),
    seeds: int | None = typer.Option(None, "--seeds", help="Runs of each method; default: the suite's."),
    out: Path = typer.Option(Path("runs/lab"), "--out", "-o", help="Folder of the runs and the report."),
    workers: int = typer.Option(0, "--workers", min=0, help="Runs at the same time; 0: as many as there are cores."),
    as_json: bool = JSON,
) -> None:
    """Run every method of a suite on every seed, then write one report (lab.html, lab.md, lab.json and two pictures).

    How many runs that is and about how long they take is said first; without --suite the suite `small` is proposed.

    May be stopped and started again: complete runs are kept, by the hash of their configuration, and broken ones
    resumed. After Ctrl-C or SIGTERM no further run starts, those in progress save and end; exit code 130, no report.

    Examples:

      isentrope lab run --suite small

      isentrope lab run -m isentrope_reweight -m clip_cov --seeds 5 --out runs/two
    """
    from launchers.lab.matrix import is_complete, run_matrix  # reads the runs' configurations
    from launchers.lab.report import START_AGAIN, NoBaselineError, write_report  # loads matplotlib
    from launchers.lab.suite import cells, chosen, load_suite, with_starts
    from pipeline.disk import telling
    from pipeline.methods import all_methods

    known = {name: method.overrides for name, method in all_methods().items() if not method.missing}
    wanted = chosen(load_suite(suite or "small", known), methods, seeds, known)
    matrix = cells(wanted, known, out)
    workers = workers or environment.cpus()
    needed = with_starts(matrix)
    missing = sum(not is_complete(Path(cell.config.run_dir)) for cell in needed)
    say(_announcement(wanted.title, len(needed), missing, workers, wanted.minutes_per_run), err=True)
    if missing and not (suite or methods):
        _confirm()
    with telling(out, START_AGAIN):
        out.mkdir(parents=True, exist_ok=True)
        with _bar(len(needed)) as done:
            outcomes = run_matrix(matrix, workers, done)
    if len(outcomes) < len(needed):
        complete = sum(not outcome.error for outcome in outcomes)
        say(f"stopped: {complete} of {len(needed)} runs are complete; go on with the same command", err=True)
        raise typer.Exit(INTERRUPTED)
    try:
        result = write_report(wanted, matrix, outcomes, out)
    except NoBaselineError as error:
        say(str(error), err=True)
        raise typer.Exit(1) from error
    say(json.dumps(result) if as_json else (out / "lab.md").read_text())
    if result["failed"]:
        say(f"{len(result['failed'])} of {len(needed)} runs failed; start again to resume them", err=True)
        raise typer.Exit(1)


def _announcement(title: str, runs: int, missing: int, workers: int, minutes_per_run: float) -> str:
    """What is about to be done, and about how long it takes."""
    busy = min(workers, environment.cpus())
    minutes = math.ceil(missing / busy) * minutes_per_run
    length = (
        f"about {duration(60 * minutes)} at {minutes_per_run:g} min a run and core" if minutes else "time not known"
    )
    what = f"{runs} runs, {missing} of them still to do" if missing < runs else f"{runs} runs"
    return f"{title}: {what}, {workers} at a time; {length}; may be stopped and started again"


def _confirm() -> None:
    """Ask whether the proposed suite is meant; whoever cannot be asked names it. Raises ``typer.Exit``."""
    hint = "--suite small (shorter: -m isentrope_reweight --seeds 1)"
    if not sys.stdin.isatty():
        raise typer.BadParameter(f"no suite is named; to run the one above give {hint}")
    if not typer.confirm(f"Run it? Another time: {hint}", err=True):
        raise typer.Exit


@contextmanager
def _bar(count: int) -> Iterator[Callable[[Outcome], None]]:
    """Runs done, on stderr, and a line for each that failed; the function is told of each that has ended."""
    from rich.progress import (  # takes as long to load as all else of the command line
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=CleanConsole(stderr=True)) as bar:
        task = bar.add_task("runs", total=count)

        def done(outcome: Outcome) -> None:
            if outcome.error:
                failed = f"{outcome.cell.method}, seed {outcome.cell.seed}: {outcome.error}"
                bar.console.print(failed, markup=False, soft_wrap=True)
            bar.advance(task)

        yield done
