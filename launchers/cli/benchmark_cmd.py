"""``isentrope benchmark``: answers and grades public benchmarks with a model or a run's checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from launchers.cli.arguments import CONFIG, JSON, either
from launchers.cli.terminal import say
from pipeline.monitoring.console import CleanConsole

app = typer.Typer(help="Public benchmarks: AIME, MATH-500, GPQA, MMLU-Pro and others.", no_args_is_help=True)
NAMES = typer.Argument(..., metavar="NAME...", help="Benchmarks, see `isentrope benchmark list`.")
OUT = typer.Option(Path("runs/benchmark"), "--out", "-o", help="Folder of answers and figures.")


@app.command("list")
def list_benchmarks(as_json: bool = JSON) -> None:
    """Show every benchmark: questions, source, licence, grader.

    Example:

      isentrope benchmark list
    """
    from pipeline.evaluation.benchmarks import BENCHMARKS

    rows = [
        {
            "name": name,
            "title": found.title,
            "questions": found.size,
            "source": f"{found.dataset or 'shipped'} {found.subset}".strip(),
            "licence": found.licence,
            "grader": found.verifier,
        }
        for name, found in BENCHMARKS.items()
    ]
    if as_json:
        say(json.dumps(rows))
        return
    table = Table(*rows[0], box=None, header_style="bold")
    for row in rows:
        table.add_row(*map(str, row.values()))
    CleanConsole().print(table)
    say("Licences as known to us; read the source's own page before you use or pass data on.")


@app.command("fetch")
def fetch(names: list[str] = NAMES, data: Path = typer.Option(..., "--data", help="Folder to write to.")) -> None:
    """Save benchmarks as local files, for machines without a network (through the datasets library).

    Example:

      isentrope benchmark fetch aime24 aime25 math500 --data benchmarks
    """
    from pipeline.evaluation import benchmarks

    for name in names:
        say(f"wrote {benchmarks.fetch(name, data)}")


@app.command("run")
def run(
    names: list[str] = NAMES,
    config: Path | None = CONFIG,
    overrides: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Overrides of the configuration."),
    of_run: Path | None = typer.Option(None, "--run", metavar="RUN", help="Run folder: its newest checkpoint."),
    data: Path | None = typer.Option(None, "--data", help="Folder with <name>.jsonl; default: the datasets library."),
    offline: bool = typer.Option(
        False, "--offline", help="Only the small shipped samples, no network: sample_math, sample_choice."
    ),
    out: Path = OUT,
    decoding: str = typer.Option(
        "avg", "--decoding", help="avg (T 0.6, top_p 0.95, 32 samples) | pass (T 1, untruncated, 64)."
    ),
    samples: int | None = typer.Option(None, "--samples", min=1, help="Samples per question; default: the decoding's."),
    shard: str = typer.Option(
        "0/1", "--shard", metavar="I/N", help="Part I (from 0) of N of every benchmark's questions."
    ),
    as_json: bool = JSON,
) -> None:
    """Answer benchmarks and print avg@n, pass@k and maj@k with 95 % intervals, beside what papers report.

    May be stopped and started again: answered questions are kept. Shards may run on different machines with one --out.

    Examples:

      isentrope benchmark run aime24 math500 --config recipe/qwen3-32b.yaml \\
        --data benchmarks

      isentrope benchmark run gpqa_diamond --run runs/pi --decoding pass \\
        --samples 128 --shard 0/4

      isentrope benchmark run sample_math sample_choice --offline \\
        --config recipe/smollm2_135m_cpu.yaml --samples 4
    """
    from pipeline.config.load import load_config
    from pipeline.evaluation.benchmark_run import DECODINGS
    from pipeline.evaluation.benchmarks import benchmark

    either(config, of_run)
    if decoding not in DECODINGS:
        raise typer.BadParameter(f"--decoding {decoding}: use {' or '.join(DECODINGS)}")
    for name in names:
        if benchmark(name).dataset and offline:
            raise typer.BadParameter(
                f"{name} is not shipped: with --offline use sample_math or sample_choice, "
                "or give --data without --offline"
            )
    resolved = load_config(of_run / "config.yaml" if of_run else config, overrides)
    from launchers.run.benchmark import Shard, answer_benchmarks, results  # torch, Ray

    try:
        part = Shard.parse(shard)
    except ValueError:
        raise typer.BadParameter(f"--shard {shard}: must read I/N with 0 <= I < N, e.g. 0/4") from None
    with _bars() as show:
        answer_benchmarks(names, resolved, of_run, data, out, decoding, samples, part, show)
    _print([entry for entry in results(out) if entry["benchmark"] in names], as_json)


@app.command("report")
def report(out: Path = OUT, as_json: bool = JSON) -> None:
    """Print the figures of everything answered under a folder, all shards together.

    Example:

      isentrope benchmark report --out runs/benchmark --json
    """
    from launchers.run.benchmark import results

    _print(results(out), as_json)


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """One bar per benchmark, on stderr; the function is told the name, how many questions are answered, and of how
    many.
    """
    from rich.progress import Progress

    with Progress(console=CleanConsole(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(name: str, done: int, count: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=count)
            bars.update(tasks[name], completed=done)

        yield show


def _print(entries: list[dict[str, Any]], as_json: bool) -> None:
    from launchers.run.benchmark import published

    if as_json:
        say(json.dumps([{**entry, "published": published(entry["benchmark"])} for entry in entries]))
        return
    table = Table("benchmark", "questions", "avg@n", "pass@k", "maj@k", "length", box=None, header_style="bold")
    for entry in entries:
        top = max(entry["pass_at_k"], key=int)
        table.add_row(
            entry["benchmark"],
            str(entry["questions"]),
            f"@{entry['samples']} {_percent(entry['avg'])}",
            f"@{top} {_percent(entry['pass_at_k'][top])}",
            f"@{top} {100 * entry['maj_at_k'][top]:.1f}",
            f"{entry['mean_length']:.0f}",
        )
    CleanConsole().print(table)
    say("percent, [95 % interval over questions and samples]")
    for entry in entries:
        _print_published(published(entry["benchmark"]), entry["benchmark"])
    _print_published(published(""), "averages")


def _print_published(entries: list[dict[str, Any]], title: str) -> None:
    for entry in entries:
        figures = ", ".join(f"{method} {value:g}" for method, value in entry["results"].items())
        say(f"published, {title}, {entry['model']}: {figures} ({entry['paper']}; {entry['measure']})")


def _percent(estimate: dict[str, float]) -> str:
    return f"{100 * estimate['value']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"
