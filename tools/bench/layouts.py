"""Code that the benchmarks over gloo share: the processes of one layout, and the command line that prints a table."""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
from collections.abc import Callable, Iterable
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


def main(doc: str | None, names: Iterable[str], bench: Callable[[str], dict[str, Any]]) -> None:
    """Every case, then print."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", help="cases whose name contains this")
    arguments = parser.parse_args()
    chosen = [name for name in names if not arguments.only or arguments.only in name]
    if not chosen:
        parser.error(f"--only {arguments.only}: in no case's name; cases: {', '.join(names)}")
    table = {name: bench(name) for name in chosen}
    if arguments.json:
        print(json.dumps(table, indent=1))
        return
    columns = list(next(iter(table.values())))
    print("| layout | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(str(row[column]) for column in columns) + " |")
