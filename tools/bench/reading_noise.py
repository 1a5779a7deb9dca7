"""Measures how much readings of the entropy vary, and how much of that comes from the draw of prompts and samples.

Reads the runs of a laboratory folder.

    python -m tools.bench.reading_noise runs/lab/cd3          # after: isentrope lab run --suite cd3 --out runs/lab/cd3
    python -m tools.bench.reading_noise runs/lab/cd3 --json

Noise: standard deviation of the step-to-step change of ln H over sqrt 2, of a step's own readings and of repeated ones
(``entropy.repeated_prompts``). Shared: mean correlation between runs of *different* methods, of ln H less its mean over
20 steps. Such runs have nothing in common but the prompts and seeds that each step draws, and nothing at all where the
run's seed differs. Then, for each method with repeated readings, the share of the steps in the band from the first one
on, over its runs: by the filtered readings, as everywhere, and by what the controller acted on.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np

from pipeline.monitoring.summary import RunHistory, read_run
from pipeline.monitoring.tracking import track

WINDOW = 20


def noise(runs: list[RunHistory], figure: str) -> float:
    """Mean over the runs that have ``figure``; NaN where none has."""
    logs = [np.log(run.column(figure)) for run in runs]
    spreads = [float(np.std(np.diff(log))) / math.sqrt(2) for log in logs if np.isfinite(log).all()]
    return float(np.mean(spreads)) if spreads else math.nan


def shared(runs: list[RunHistory], same_seed: bool) -> float:
    """Mean correlation over the pairs of runs of different methods with the same seed, or with different ones."""
    rest = {run.run_dir: _less_its_mean(np.log(run.column("entropy/mean"))) for run in runs}
    found = []
    for one, two in combinations(runs, 2):
        if one.config.name != two.config.name and (one.config.seed == two.config.seed) is same_seed:
            steps = min(len(rest[one.run_dir]), len(rest[two.run_dir]))
            found.append(np.corrcoef(rest[one.run_dir][:steps], rest[two.run_dir][:steps])[0, 1])
    return float(np.mean(found)) if found else math.nan


def in_band(run: RunHistory) -> tuple[float, float]:
    """Shares of the steps: by the filtered readings, and by what the controller acted on."""
    edges = run.column("entropy/band_low"), run.column("entropy/band_high")
    acted = run.column("entropy/filtered")
    inside = (acted >= edges[0]) & (acted <= edges[1])
    later = inside[int(np.argmax(inside)) :] if inside.any() else inside
    return track(run.column("entropy/controlled"), *edges).time_in_band, float(later.mean())


def _less_its_mean(log: np.ndarray) -> np.ndarray:
    smooth = np.convolve(log, np.ones(WINDOW) / WINDOW, "same")
    return (log - smooth)[WINDOW:-WINDOW]


def main() -> None:
    """Read, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    runs = [read_run(path.parent) for path in sorted(arguments.folder.glob("*/events.jsonl"))]
    if not runs:
        parser.error(f"{arguments.folder}: no run in it; make some with isentrope lab run --out {arguments.folder}")
    row = {
        "runs": len(runs),
        "own readings": round(noise(runs, "entropy/mean"), 4),
        "repeated readings": round(noise(runs, "entropy/repeated"), 4),
        "shared, same seed": round(shared(runs, True), 2),
        "shared, other seed": round(shared(runs, False), 2),
    }
    repeated = [run for run in runs if np.isfinite(run.column("entropy/repeated")).any()]
    methods = {run.config.name: [in_band(r) for r in repeated if r.config.name == run.config.name] for run in repeated}
    if arguments.json:
        print(json.dumps(row | {"in_band": methods}))
        return
    print("| " + " | ".join(row) + " |\n|" + "---|" * len(row) + "\n| " + " | ".join(map(str, row.values())) + " |")
    print("\n| method | in band, filtered readings | in band, what the controller acted on |\n|---|---|---|")
    for method, shares in methods.items():
        print(f"| {method} | " + " | ".join(f"{np.mean(column):.1%}" for column in zip(*shares, strict=True)) + " |")


if __name__ == "__main__":
    main()
