"""Code that the benchmarks over gloo share: the processes of one layout, and the command line that prints a table."""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipeline.ports import free_port


def run(name: str, world: int, measure: Callable[..., None], case: Any) -> dict[str, Any]:
    """``measure(rank, case, world, port, out)`` in ``world`` processes; what one of them puts into ``out``."""
    port = free_port()
    context = mp.get_context("forkserver")  # each process is a copy of one that has imported what it measures
    context.set_forkserver_preload([measure.__module__])
    out = context.SimpleQueue()
    processes = [context.Process(target=measure, args=(rank, case, world, port, out)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"{name}: a process failed")
    return out.get()


def parser(doc: str | None) -> argparse.ArgumentParser:
    """What every such benchmark takes on its command line."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="print JSON, and write it to FILE if given"
    )
    options.add_argument("--only", default="", metavar="WORD", help="cases whose name contains this")
    return options


def show(result: dict[str, Any], file: str) -> None:
    """Print ``result`` as JSON, and write it to ``file`` unless that is "-"."""
    text = json.dumps(result, indent=1)
    print(text)
    if file != "-":
        Path(file).write_text(text + "\n")


def main(options: argparse.ArgumentParser, names: Iterable[str], bench: Callable[[str], dict[str, Any]]) -> None:
    """Every case, then print."""
    given = options.parse_args()
    chosen = [name for name in names if given.only in name]
    if not chosen:
        options.error(f"--only {given.only}: in no case's name; cases: {', '.join(names)}")
    table = {name: bench(name) for name in chosen}
    if given.json:
        show(table, given.json)
        return
    columns = list(next(iter(table.values())))
    print("| layout | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(str(row[column]) for column in columns) + " |")
