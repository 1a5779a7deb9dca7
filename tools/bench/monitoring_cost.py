"""Measures what monitoring costs a training step: the quickstart's recipe with every sink on, and without.

    python tools/bench/monitoring_cost.py                       # 3 pairs of runs of 200 steps, in one process each
    python tools/bench/monitoring_cost.py --runtime ray --pairs 5
    python tools/bench/monitoring_cost.py --json runs/bench/monitoring_cost.json

Runs of a pair follow each other, the one with sinks first in every second pair, so that a machine that gets slower or
faster favours neither. The cost of a pair is the difference of the medians of its step times after the warm-up, in
which the sinks import their libraries. Besides: the CPU time that the sidecar, another process at nice 10, takes for a
step.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from pipeline.config.schema import SINKS  # noqa: E402
from pipeline.ports import free_port  # noqa: E402

WARM_UP = 50  # steps


def train(run_dir: Path, arguments: argparse.Namespace, *overrides: str) -> float:
    """Median milliseconds of a step of a new run."""
    shutil.rmtree(run_dir, ignore_errors=True)
    layout = ["runtime=inline", "learner.tensor_model_parallel_size=1"] if arguments.runtime == "inline" else []
    settings = [
        f"steps={arguments.steps}",
        "evaluation.every=0",
        "evaluation.at_start=false",
        "evaluation.at_end=false",
        "monitoring.progress=false",
    ]
    call(
        "launchers.cli.main",
        "train",
        "--config",
        "configs/quickstart.yaml",
        f"run_dir={run_dir}",
        *settings,
        *layout,
        *overrides,
    )
    events = (json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines())
    totals = [event["seconds"]["total"] for event in events if event["kind"] == "step"]
    return 1e3 * statistics.median(totals[min(WARM_UP, arguments.steps // 2) :])


def call(module: str, *arguments: str) -> None:
    """``python -m module arguments`` in the repository."""
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def cpu_per_step(run_dir: Path, steps: int) -> float:
    """Milliseconds of CPU time that the sidecar takes for a step when it delivers ``run_dir`` once more.

    Start-up is not counted.
    """
    used = []
    for length in (1, steps):
        again = run_dir.with_name("delivered-again")
        shutil.rmtree(again, ignore_errors=True)
        again.mkdir()
        shutil.copy(run_dir / "config.yaml", again)
        lines = (run_dir / "events.jsonl").read_text().splitlines(keepends=True)
        events = [line for line in lines if json.loads(line)["kind"] in ("run_start", "step", "run_end")]
        (again / "events.jsonl").write_text("".join([events[0], *events[1 : 1 + length], events[-1]]))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        call("pipeline.monitoring.deliver", str(again))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return 1e3 * (used[1] - used[0]) / (steps - 1)


def measure(arguments: argparse.Namespace) -> dict:
    """Every pair, and what they say together."""
    folder = (ROOT / "runs" / "bench" / "monitoring").resolve()
    with_sinks = [
        f"monitoring.sinks=[{arguments.sinks}]",
        "monitoring.wandb.mode=offline",
        f"monitoring.prometheus.port={free_port()}",
    ]
    pairs = []
    for index in range(arguments.pairs):
        order = {"none": [], "all": with_sinks} if index % 2 == 0 else {"all": with_sinks, "none": []}
        pairs.append({name: train(folder / name, arguments, *overrides) for name, overrides in order.items()})
    costs = [100 * (pair["all"] - pair["none"]) / pair["none"] for pair in pairs]
    return {
        "runtime": arguments.runtime,
        "steps": arguments.steps,
        "pairs": pairs,
        "cost_percent": costs,
        "median_cost_percent": statistics.median(costs),
        "sidecar_cpu_ms_per_step": cpu_per_step(folder / "all", arguments.steps),
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument("--sinks", default=",".join(SINKS), help="with commas between them")
    parser.add_argument("--runtime", choices=("inline", "ray"), default="inline")
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args()
    found = measure(arguments)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1))
    print("| pair | step without sinks, ms | with all sinks, ms | cost |\n|---|---|---|---|")
    for index, (pair, cost) in enumerate(zip(found["pairs"], found["cost_percent"], strict=True), start=1):
        print(f"| {index} | {pair['none']:.1f} | {pair['all']:.1f} | {cost:+.2f} % |")
    print(f"| median | | | {found['median_cost_percent']:+.2f} % |")
    print(f"\nThe sidecar takes {found['sidecar_cpu_ms_per_step']:.1f} ms of CPU time per step.")


if __name__ == "__main__":
    main()
