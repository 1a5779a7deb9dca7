"""Measures where a training step's time goes, and our overhead outside sampling and training.

    python tools/bench/step_time.py                        # runs the quickstart for 60 steps, then reads its event log
    python tools/bench/step_time.py runs/quickstart/scope  # reads an existing run

Prints a table and, with --json, the same as JSON. Medians over the steps after the fifth.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 5
CONFIGS = {"grpo": "recipe/pm4_grpo.yaml", "pi": "quickstart.yaml", "scope": "recipe/pm4_scope.yaml"}


def split(run_dir: Path) -> dict[str, float]:
    """Median milliseconds per phase, and the share outside sampling and training."""
    lines = (json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines())
    seconds = [event["seconds"] for event in lines if event["kind"] == "step"][WARM_UP:]
    medians = {phase: 1e3 * statistics.median(s[phase] for s in seconds) for phase in seconds[0]}
    outside = statistics.median(1 - (s["sample"] + s["train"]) / s["total"] for s in seconds)
    return {**{k: round(v, 2) for k, v in medians.items()}, "overhead": round(outside, 4), "steps": len(seconds)}


def main() -> None:
    """Run if asked to, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run directories; none: run the quickstart recipe now")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    runs = arguments.runs
    if not runs:
        runs = [ROOT / "runs" / "bench" / method for method in CONFIGS]
        for run_dir in runs:
            shutil.rmtree(run_dir, ignore_errors=True)
            config = ["--config", CONFIGS[run_dir.name]]
            overrides = [f"run_dir={run_dir}", "steps=60", "evaluation.at_start=false", "evaluation.at_end=false"]
            subprocess.run(
                [sys.executable, "-m", "launchers.cli.main", "train", *config, *overrides], check=True, cwd=ROOT
            )
    table = {run.name: split(run) for run in runs}
    if arguments.json:
        print(json.dumps(table, indent=1))
        return
    columns = list(next(iter(table.values())))
    print("| run | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(str(row.get(c, "-")) for c in columns) + " |")


if __name__ == "__main__":
    main()
