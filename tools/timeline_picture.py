"""Draws who was at work when in a few steps of runs, from their event logs: one row of lanes for each run.

    python -m tools.timeline_picture in_turns=runs/s0 ahead=runs/s1 --first 10 --steps 5 --out docs/rollouts.png

Lanes are every engine, the learner and the weight sync; where a lane is empty, it waits. A run may have a title.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.monitoring.charts import GRID, INK, MUTED, PHASES, STYLE
from pipeline.monitoring.series import Series
from pipeline.monitoring.timeline import timed

COLOURS = {"learner": PHASES["train"], "sync": PHASES["sync"], "engine": PHASES["sample"]}
ORDER = ("engine", "learner", "sync")


def draw(axes: Axes, title: str, steps: Sequence[Mapping[str, Any]]) -> None:
    """The lanes of one run; seconds since the first of these steps began."""
    names = sorted(steps[0]["lanes"], key=lambda name: (ORDER.index(name.split()[0]), len(name), name))
    start, whole = steps[0]["began"], sum(step["seconds"] for step in steps)
    for row, name in enumerate(names):
        axes.axhspan(row - 0.32, row + 0.32, color=GRID, alpha=0.35, linewidth=0)
        spans = [
            (step["began"] - start + begin, end - begin) for step in steps for begin, end in step["lanes"].get(name, [])
        ]
        axes.broken_barh(spans, (row - 0.32, 0.64), color=COLOURS[name.split()[0]])
        share = sum(seconds for _, seconds in spans) / whole
        axes.text(1.01, row, f"{share:.0%}", transform=axes.get_yaxis_transform(), va="center", color=INK)
    for step in steps:
        axes.axvline(step["began"] - start, color=MUTED, linewidth=0.8, linestyle=":")
        axes.text(step["began"] - start, -0.62, f" {step['step']}", color=MUTED, fontsize=8)
    seconds = sum(step["seconds"] for step in steps) / len(steps)
    axes.set_title(f"{title}: {seconds:.3g} s a step; steps and share of time at work", pad=14)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False)


def picture(runs: Mapping[str, Path], first: int, count: int) -> Figure:
    """All runs on one scale of seconds. Raises ``SystemExit`` where a run has none of these steps."""
    found = {}
    for title, run_dir in runs.items():
        series = Series(run_dir)
        found[title] = timed(series.event(step) for step in range(first, first + count))
        if not found[title]:
            raise SystemExit(f"{run_dir}: none of the steps {first} to {first + count - 1} tells who was at work")
    with mpl.rc_context(STYLE):
        lanes = [1 + len(steps[0]["lanes"]) for steps in found.values()]
        figure = Figure(figsize=(10, 0.34 * sum(lanes) + 0.6), layout="constrained", facecolor="white")
        rows = figure.subplots(len(found), 1, squeeze=False, sharex=True, height_ratios=lanes)
        for axes, (title, steps) in zip(rows.flat, found.items(), strict=True):
            draw(axes, title, steps)
        rows[-1, 0].set_xlabel("seconds")
    return figure


def main() -> None:
    """Draw, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders, or title=folder")
    parser.add_argument("--first", type=int, default=10, help="step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    given = [run.rpartition("=") for run in arguments.runs]
    runs = {title.replace("_", " ") or Path(folder).name: Path(folder) for title, _, folder in given}
    with mpl.rc_context(STYLE):
        picture(runs, arguments.first, arguments.steps).savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    main()
