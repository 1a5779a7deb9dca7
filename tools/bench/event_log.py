"""Measures how long reading a long run's log for a chart takes, against TensorBoard loading the same scalars.

    python tools/bench/event_log.py --json out.json     # 100,000 steps; needs 0.5 GB in --out

Writes one log through the event log, and the same scalars as TensorBoard event files. Each reading is a new process:
seconds until the figures are there, those its processor worked, and its peak memory; what was just written is still in
the page cache. Also what one recorded step costs the training loop, and what one new step costs a viewer that follows.
Prints a table; with --json also a file. Needs tensorboard for the comparison.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.monitoring.event_kinds import StepRecord
from pipeline.monitoring.events import FILE_NAME, EventLog
from pipeline.monitoring.metrics import scalars
from pipeline.monitoring.series import Series

CHART = ("entropy/mean", "entropy/filtered", "entropy/band_low", "entropy/band_high", "control/temperature")
STEP_MS = 110.0  # of the quickstart, docs/benchmarks.md


def records(steps: int) -> Iterator[StepRecord]:
    """A plausible run: every field a quickstart step has."""
    noise = random.Random(0)
    for step in range(steps):
        entropy = 0.3 + 0.05 * math.sin(step / 500) + 0.02 * noise.random()
        metrics = ("tokens_per_micro_batch", "padding_fraction", "kl", "ratio", "clip_fraction", "mismatch_mean")
        metrics += ("mismatch_kl", "mismatch_kl_k1", "mismatch_p99", "mismatch_max", "policy_loss", "positive_term")
        phases = ("sample", "verify", "batch", "train", "sync", "other", "total", "learner")
        yield StepRecord(
            step=step,
            time=1.7e9 + step * STEP_MS / 1e3,
            entropy_sum=2048 * entropy,
            entropy_count=2048.0,
            entropy_filtered=entropy,
            band_low=0.27,
            band_high=0.33,
            target=0.2985,
            temperature=1.2 + 0.2 * noise.random(),
            command=1.2,
            actuator="reweight",
            state="tracking",
            reason=f"H={entropy:.3g} in band",
            reward=noise.random(),
            positives=137,
            all_equal_groups=0.0625,
            response_length=8.0,
            truncated=0.0,
            stale_samples=0,
            verifier_errors=0,
            loss=noise.random(),
            grad_norm=noise.random(),
            learning_rate=3e-4,
            weight_version=step,
            metrics={name: noise.random() for name in metrics},
            seconds={name: noise.random() for name in phases},
            tokens={"main": 2048, "auxiliary": 0},
            sync={"bytes": 4e5, "buckets": 1.0},
            memory={"driver": 0.5, "learner": 0.6},
            engines={"alive": 1.0, "total": 1.0},
            ages={"mean": 0.0, "max": 0.0, "share_0": 1.0},
            idle={"engines": noise.random(), "learner": noise.random()},
            began=1.7e9 + (step - 1) * STEP_MS / 1e3,
            timeline={"learner": [(0.0341, 0.1024)], "sync": [(0.1031, 0.1099)], "engine 0": [(0.0004, 0.0339)]},
        )


def write_log(run: Path, steps: int) -> float:
    """The log; milliseconds of computing that a step's event takes."""
    run.mkdir(parents=True)
    with EventLog(run / FILE_NAME) as log:
        log.append("run_start", {"time": 1.7e9, "step": 0, "steps": steps, "name": "long"})
        made, worked = list(records(steps)), time.process_time()
        for record in made:
            log.append("step", record.to_dict())
        return 1e3 * (time.process_time() - worked) / steps


def follow(run: Path, steps: int, more: int = 200) -> float:
    """Milliseconds of computing until a viewer that follows has a new step in its status, chart and marks."""
    from pipeline.monitoring.status import status_of

    series, spent = Series(run), 0.0
    with EventLog(run / FILE_NAME) as log:
        for number, record in enumerate(records(more)):
            log.append("step", record.to_dict() | {"step": steps + number})
            worked = time.process_time()
            series.update()
            status_of(series)
            series.read(CHART)
            spent += time.process_time() - worked
    return 1e3 * spent / more


def write_tensorboard(folder: Path, steps: int) -> None:
    """The same scalars, one tag each."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder), max_queue_size=1000)
    for record in records(steps):
        values = scalars({"kind": "step", **record.to_dict()})
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        writer.add_event(Event(step=record.step, wall_time=record.time, summary=summary))
    writer.close()


def read_series(run: str) -> int:
    """What a chart draws: five figures of all steps, in 2000 points."""
    chart = Series(Path(run)).read(CHART)
    return len(chart["step"])


def read_status(run: str) -> int:
    """What ``isentrope monitor --json`` prints: band tracking over all steps."""
    from pipeline.monitoring.status import status_of

    return int(status_of(Series(Path(run)))["step"])


def _accumulate(folder: str, size: int) -> int:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    accumulator = EventAccumulator(folder, size_guidance={SCALARS: size})
    accumulator.Reload()
    return sum(len(accumulator.Scalars(name)) for name in CHART)


def read_tensorboard(folder: str) -> int:
    """TensorBoard's loader as its server uses it: a sample of 1000 points of each tag."""
    return _accumulate(folder, 1000)


def read_tensorboard_all(folder: str) -> int:
    """TensorBoard's loader, every point kept."""
    return _accumulate(folder, 0)


READERS = {f.__name__: f for f in (read_series, read_status, read_tensorboard, read_tensorboard_all)}


def measure(reader: str, what: Path) -> dict[str, Any]:
    """Seconds and MiB of one reading in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--read", reader, str(what)], capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"signal {-done.returncode}"])[-1]}
    return json.loads(done.stdout)


def _read(reader: str, what: str) -> None:
    start, worked = time.perf_counter(), time.process_time()
    found = READERS[reader](what)
    seconds, cpu = time.perf_counter() - start, time.process_time() - worked
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))  # KiB
    print(
        json.dumps({"seconds": round(seconds, 3), "cpu": round(cpu, 3), "mib": round(peak / 1024, 1), "found": found})
    )


def main() -> None:
    """Write, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/event_log"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-tensorboard", action="store_true", help="only our own")
    parser.add_argument("--every-point", action="store_true", help="let TensorBoard keep every point too: 10 kB a step")
    parser.add_argument("--read", nargs=2, metavar=("READER", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        _read(*arguments.read)
        return
    shutil.rmtree(arguments.out, ignore_errors=True)
    run, board = arguments.out / "run", arguments.out / "tensorboard"
    result: dict[str, Any] = {"steps": arguments.steps, "append_ms": write_log(run, arguments.steps)}
    result["share"] = result["append_ms"] / STEP_MS
    result["log_bytes"] = (run / FILE_NAME).stat().st_size
    rows = {"chart": measure("read_series", run), "status": measure("read_status", run)}
    if not arguments.no_tensorboard:
        write_tensorboard(board, arguments.steps)
        rows["TensorBoard, 1000 points a tag"] = measure("read_tensorboard", board)
        if arguments.every_point:
            rows["TensorBoard, every point"] = measure("read_tensorboard_all", board)
    result["readings"] = rows
    result["follow_ms"] = follow(run, arguments.steps)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    print(f"{arguments.steps} steps: log {result['log_bytes'] / 1e6:.0f} MB")
    print(f"a recorded step: {result['append_ms']:.3f} ms of computing, {result['share']:.2%} of {STEP_MS:g} ms")
    print(f"a new step seen by a viewer (status, chart): {result['follow_ms']:.1f} ms of computing")
    print("| reading | seconds | of them computing | MiB |\n|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row.get('seconds', row.get('failed'))} | {row.get('cpu', '-')} | {row.get('mib', '-')} |")


if __name__ == "__main__":
    main()
