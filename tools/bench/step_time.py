"""Compares the quickstart's step with the same step in plain torch and in TRL, and says where its time goes.

    python -m tools.bench.step_time                      # all sides, by turns
    python -m tools.bench.step_time runs/quickstart/pi   # measures nothing: where the time of this run's steps went

Every side is a process of its own. It makes its model, takes a few steps, and then takes one whenever it is its turn:
other work on the machine so meets all sides alike. The sides: ``torch``, plain torch with transformers' model in one
process; ``inline``, the loop in one process; ``ray``, under Ray with a learner of one rank; ``quickstart``, of two; and
``trl``, where TRL is installed.

``ms`` are medians over rounds. ``CPU ms`` is the mean that all processes of a side compute in its steps; other work
changes it less. ``over torch`` and ``over limit`` are medians of the ratio within a round. The limit is what the matrix
products of plain torch's step take at the rate that this machine reaches, in the same round, in the product of two
large matrices.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.monitoring.events import read_events
from pipeline.monitoring.recorder import Recorder
from tools.bench.overlap import computed_s

Times = tuple[float, float]  # seconds that passed, and in which processes computed
PEERS = ("torch", "trl")
WARM_UP = 5  # steps
LARGE = 1024  # rows and columns of the matrices that the limit's rate is measured with
QUIET = (
    "evaluation.every=0",
    "evaluation.at_start=false",
    "evaluation.at_end=false",
    "checkpoint.every=0",
    "monitoring.progress=false",
)
ONE_RANK = "learner.tensor_model_parallel_size=1"
SIDES = {
    "torch": (),
    "inline": ("runtime=inline", ONE_RANK),
    "ray": (ONE_RANK,),
    "quickstart": (),
    "trl": (),
}


def our_loop(config: RunConfig, turns: Iterator[bool]) -> None:
    """A run of its own, a step for each turn."""
    from launchers.run import assemble  # imports megatron

    with ExitStack() as stack:
        recorder = stack.enter_context(Recorder(Path(config.run_dir), config))
        loop = assemble.build_loop(config, recorder, stack)
        loop.learner.load(assemble.hf_path(config))
        recorder.start(0)
        loop.run(lambda: next(turns, None) is None)
        recorder.finish(completed=True)


def take_part(side: str, config: RunConfig, rounds: int, threads: int, connection: Connection) -> None:
    """The process of a side: told when it is its turn, it answers with the seconds of its step."""
    torch.set_num_threads(threads)
    if side in PEERS:
        from tools.bench import step_peers

        run = step_peers.trl if side == "trl" else step_peers.plain_torch
    else:
        run = our_loop
    run(config, turns_of(connection, rounds))


def turns_of(connection: Connection, rounds: int) -> Iterator[bool]:
    """An item for every turn; what is done until the next is asked for is its step."""
    for _ in range(1 + WARM_UP + rounds):
        connection.recv()
        began = time.perf_counter()
        yield True
        connection.send(time.perf_counter() - began)


def products_of(config: RunConfig) -> int:
    """Floating-point operations of the matrix products in plain torch's step."""
    from tools.bench.step_peers import PlainStep

    step = PlainStep(config)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def limit(operations: int, matrix: torch.Tensor) -> Times:
    """What so many operations take in products of large matrices."""
    share = operations / (2 * LARGE**3)
    began, before = time.perf_counter(), time.process_time()
    matrix @ matrix
    return share * (time.perf_counter() - began), share * (time.process_time() - before)


def by_turns(sides: Sequence[str], configs: Mapping[str, RunConfig], rounds: int) -> dict[str, list[Times]]:
    """Every side's steps and the ``limit``, by round. Raises ``SystemExit`` when a side fails."""
    operations, matrix = products_of(configs["torch"]), torch.randn(LARGE, LARGE)
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[Times]] = {side: [] for side in (*sides, "limit")}
    with ExitStack() as stack:
        taking_part = {}
        for side in sides:
            connection, other = context.Pipe()
            stack.enter_context(connection)  # a side whose connection is closed ends
            arguments = (side, configs[side], rounds, torch.get_num_threads(), other)
            taking_part[side] = context.Process(target=take_part, args=arguments), connection
            taking_part[side][0].start()
            other.close()
            turn(side, *taking_part[side])  # one after the other: to start two Ray clusters at once takes too long
        for _ in range(WARM_UP + rounds):
            for side, others in taking_part.items():
                found[side].append(turn(side, *others))
            found["limit"].append(limit(operations, matrix))
        for process, _ in taking_part.values():
            process.join()
    return {side: times[WARM_UP:] for side, times in found.items()}


def turn(side: str, process: BaseProcess, connection: Connection) -> Times:
    """Have a side take its step. Raises ``SystemExit`` when it has failed."""
    before = computed_s(process.pid or 0)
    try:
        connection.send(None)
        return connection.recv(), computed_s(process.pid or 0) - before
    except (EOFError, OSError) as error:
        raise SystemExit(f"{side}: failed") from error


def compared(times: Mapping[str, Sequence[Times]]) -> dict[str, dict[str, float]]:
    """Milliseconds of every side, and its ratios."""
    elapsed = {side: [each for each, _ in found] for side, found in times.items()}

    def over(side: str, other: str) -> float:
        return round(statistics.median(map(float.__truediv__, elapsed[side], elapsed[other])), 2)

    return {
        side: {
            "ms": round(1e3 * statistics.median(elapsed[side]), 1),
            "CPU ms": round(1e3 * statistics.mean(computed for _, computed in found), 1),
            "over torch": over(side, "torch"),
            "over limit": over(side, "limit"),
        }
        for side, found in times.items()
    }


def split(run_dir: Path) -> dict[str, float]:
    """Median milliseconds of each phase of a run's steps, and the share outside sampling and training."""
    seconds = [event["seconds"] for event in read_events(run_dir / "events.jsonl") if event["kind"] == "step"]
    counted = seconds[WARM_UP:] or seconds
    medians = {phase: round(1e3 * statistics.median(s[phase] for s in counted), 2) for phase in counted[0]}
    outside = statistics.median(1 - (s["sample"] + s["train"]) / s["total"] for s in counted)
    return medians | {"outside sampling and training": round(outside, 4), "steps": len(counted)}


def table(first: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Rows of a Markdown table by name."""
    columns = list(next(iter(rows.values())))
    lines = [f"| {first} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | " + " | ".join(map(str, row.values())) + " |" for name, row in rows.items()])


def main() -> None:
    """Measure or read, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders to read")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=40)
    threads = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=threads, help="of what is one process; 1 where other work runs")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    figures = {"phases": {run.name: split(run) for run in arguments.runs}}
    if not arguments.runs:
        figures = measured(arguments.sides, arguments.rounds, arguments.threads)
        print(table("side", figures["sides"]) + "\n")
    if figures["phases"]:
        print(table("run", figures["phases"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def measured(sides: list[str], rounds: int, threads: int) -> dict[str, dict[str, dict[str, float]]]:
    """The figures of the ``sides``, and the ``phases`` of those that are ours."""
    if "trl" in sides and not find_spec("trl"):
        sides = [side for side in sides if side != "trl"]
        print("TRL is not installed and left out")
    sides = list(dict.fromkeys(["torch", *sides]))
    os.environ.pop("OMP_NUM_THREADS", None)  # an engine under Ray has one thread unless it is told otherwise
    torch.set_num_threads(threads)
    with TemporaryDirectory() as scratch:
        words = [*QUIET, f"steps={WARM_UP + rounds + 2}"]
        configs = {
            side: load_config(Path("quickstart.yaml"), [*words, *SIDES[side], f"run_dir={scratch}/{side}"])
            for side in sides
        }
        found = {"sides": compared(by_turns(sides, configs, rounds))}
        found["phases"] = {side: split(Path(scratch) / side) for side in sides if side not in PEERS}
    machine = f"{os.cpu_count()} cores, {threads} threads, load {os.getloadavg()[0]:.1f}"
    print(f"{time.strftime('%Y-%m-%d')}, {machine}, torch {torch.__version__}\n")
    return found


if __name__ == "__main__":
    main()
