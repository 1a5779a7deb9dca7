"""Draws the charts of a report with matplotlib: as one PNG, and as inline SVGs that follow the page's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.disk import replacing
from pipeline.entropy.actuator import actuator_of
from pipeline.monitoring.summary import RunHistory, pass_at, totals
from pipeline.monitoring.tracking import filtered

INK, MUTED, GRID, BAND = "#1f2328", "#6e7781", "#dde1e6", "#2f9e63"
SERIES = ("#2563c9", "#d9660a", "#8250c4", "#c2325b", "#0f8b8d", "#9a7200")
BASELINE = "#7d8590"  # the run without control is the grey one
PHASES = {
    "sample": "#4c78a8",
    "verify": "#b279a2",
    "batch": "#72b7b2",
    "train": "#e8963a",
    "sync": "#d8605f",
    "other": "#a8a29e",
}
DARK = {  # lighter partners of the chart colours
    "#1f2328": "#e6e8eb",
    "#6e7781": "#9aa4af",
    "#dde1e6": "#343a42",
    "#2f9e63": "#4cc38a",
    "#2563c9": "#6ea8fe",
    "#d9660a": "#f4a261",
    "#8250c4": "#b794f6",
    "#c2325b": "#f07c9c",
    "#0f8b8d": "#4fc4c6",
    "#9a7200": "#d9b44a",
    "#7d8590": "#a3acb6",
    "#4c78a8": "#7ba3cf",
    "#b279a2": "#cf9fc2",
    "#72b7b2": "#8fd0cb",
    "#e8963a": "#f2ad61",
    "#d8605f": "#ea8685",
    "#a8a29e": "#8c8782",
}
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "isentrope",
}
Chart = Callable[[Axes, Sequence[RunHistory]], None]


def theme_variables() -> dict[str, str]:
    """CSS variable of each colour that the charts use, by hex code."""
    colours = dict.fromkeys([INK, MUTED, GRID, BAND, *SERIES, BASELINE, *PHASES.values()])
    return {colour: f"--chart-{colour[1:]}" for colour in colours}


def theme() -> str:
    """CSS of a page with charts in it: what their colours are, by day and by night."""
    light = "".join(f"{variable}:{colour};" for colour, variable in theme_variables().items())
    dark = "".join(f"{variable}:{DARK[colour]};" for colour, variable in theme_variables().items())
    return f":root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"


def colour_of(run: RunHistory, runs: Sequence[RunHistory]) -> str:
    """One colour per method, the same in every chart; seeds of a method share it."""
    if run.is_baseline:
        return BASELINE
    methods = list(dict.fromkeys(other.label for other in runs if not other.is_baseline))
    return SERIES[methods.index(run.label) % len(SERIES)]


def entropy_chart(axes: Axes, runs: Sequence[RunHistory]) -> None:
    """Entropy of every run against the band: thin as measured, bold filtered."""
    for run, colour, label in _bands(runs):
        band = run.series.read(["entropy/band_low", "entropy/band_high"])
        edges = (band[name]["mean"] for name in ("entropy/band_low", "entropy/band_high"))
        axes.fill_between(band["step"], *edges, color=colour, alpha=0.2, linewidth=0, label=label)
    for run in runs:
        chart, colour = run.series.read(["entropy/controlled"]), colour_of(run, runs)
        raw = chart["entropy/controlled"]
        axes.plot(chart["step"], raw["mean"], color=colour, linewidth=0.7, alpha=0.35)
        axes.fill_between(chart["step"], raw["low"], raw["high"], color=colour, alpha=0.1, linewidth=0)
        axes.plot(*_filtered(run, "entropy/controlled"), color=colour, linewidth=2, label=_label(run, runs))
    repeated = sorted({run.label for run in runs if run.config.entropy.band_of == "repeated"})
    whose = f" (of the repeated prompts: {', '.join(repeated)})" if repeated else ""
    axes.set(title=f"Policy entropy{whose}", ylabel="nats per token, T=1", xlabel="step")
    axes.set_ylim(bottom=0)
    _legend(axes)


def _bands(runs: Sequence[RunHistory]) -> list[tuple[RunHistory, str, str]]:
    """For each band that runs steer to: the longest run with it, its colour and its legend.

    A run without control steers to none.
    """
    steering = [run for run in runs if not run.is_baseline] or list(runs)
    longest: dict[str, RunHistory] = {}
    for run in sorted(steering, key=lambda run: run.steps):
        longest[repr(run.config.entropy.band)] = run
    if len(longest) == 1:
        return [(run, BAND, "target band") for run in longest.values()]
    return [
        (
            run,
            colour_of(run, runs),
            "band of " + ", ".join(dict.fromkeys(r.label for r in steering if repr(r.config.entropy.band) == key)),
        )
        for key, run in longest.items()
    ]


def command_chart(axes: Axes, runs: Sequence[RunHistory]) -> None:
    """What the controllers did: T+, or the coefficient of actuators that are no temperature.

    Saturated steps are dotted.
    """
    controlled = [run for run in runs if not run.is_baseline]
    for run in controlled:
        colour, chart = colour_of(run, runs), run.series.read(["control/command"])
        steps, command = chart["step"], chart["control/command"]["mean"]
        actuator = actuator_of(run.config.entropy)
        unit = "T+" if actuator.temperature else actuator.name
        axes.plot(steps, command, color=colour, linewidth=1.4, label=f"{_label(run, runs) or run.label} ({unit})")
        axes.plot(
            steps, np.where(run.series.in_state("saturated")[steps], command, np.nan), ".", color=colour, markersize=5
        )
    axes.set(title="Command of the controller", ylabel="T+ or coefficient", xlabel="step")
    if controlled:
        _legend(axes)
    else:
        axes.text(0.5, 0.5, "no run with control", transform=axes.transAxes, ha="center", color=MUTED)


def reward_chart(axes: Axes, runs: Sequence[RunHistory]) -> None:
    """Mean training reward, filtered like the entropy."""
    for run in runs:
        curve = _filtered(run, "reward/mean")
        axes.plot(*curve, color=colour_of(run, runs), linewidth=1.6, label=_label(run, runs))
    axes.set(title="Training reward (EMA 0.8)", ylabel="mean reward", xlabel="step")
    _legend(axes)


def pass_chart(axes: Axes, runs: Sequence[RunHistory]) -> None:
    """pass@k on held-out prompts with 95 % intervals: the smallest k solid, the largest dashed."""
    for run in runs:
        ks = sorted({int(k) for event in run.evaluations for k in event["pass_at_k"]})
        for k in dict.fromkeys(ks[:1] + ks[-1:]):
            points = [(event["step"], *pass_at(event, k)) for event in run.evaluations]
            at, value, low, high = zip(*points, strict=True)
            style, colour = ("-" if k == ks[0] else "--"), colour_of(run, runs)
            label = f"{run.label} pass@{k}" if _label(run, runs) else None
            axes.plot(at, value, style, marker="o", markersize=4, color=colour, linewidth=1.5, label=label)
            axes.vlines(at, low, high, color=colour, linewidth=1, alpha=0.6)
    axes.set(title="Held-out pass@k", ylabel="share of questions", xlabel="step")
    if any(run.evaluations for run in runs):
        _legend(axes)
    else:
        axes.text(0.5, 0.5, "no evaluation yet", transform=axes.transAxes, ha="center", color=MUTED)


def time_chart(axes: Axes, runs: Sequence[RunHistory]) -> None:
    """Where a step's time goes: mean seconds per step by phase, one bar per run."""
    for row, run in enumerate(runs):
        spent, left = totals(run, "time/"), 0.0
        for phase, colour in PHASES.items():
            seconds = spent.get(phase, 0.0) / max(1, run.steps)
            axes.barh(row, seconds, left=left, color=colour, height=0.6, label=phase if row == 0 else None)
            left += seconds
        axes.text(left, row, f" {left:.3g} s", va="center", color=INK)
    axes.set(title="Mean time of a step", xlabel="seconds")
    axes.set_yticks(range(len(runs)), [run.title for run in runs])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="y")
    axes.legend(ncols=6, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22), columnspacing=1, handlelength=1)


CHARTS: dict[str, Chart] = {
    "entropy": entropy_chart,
    "command": command_chart,
    "pass": pass_chart,
    "reward": reward_chart,
    "time": time_chart,
}


def write_png(runs: Sequence[RunHistory], path: Path) -> None:
    """Every chart on one sheet: the entropy large on top, the others below."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 12.5), layout="constrained", facecolor="white")
        grid = figure.add_gridspec(3, 2, height_ratios=[1.35, 1, 1])
        for name, cell in zip(CHARTS, (grid[0, :], grid[1, 0], grid[1, 1], grid[2, 0], grid[2, 1]), strict=True):
            CHARTS[name](figure.add_subplot(cell), runs)
        save_png(figure, path)


def save_png(figure: Figure, path: Path) -> None:
    """Write ``figure`` as a PNG, which readers see whole or not at all. To be called where ``STYLE`` holds."""
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def svg(name: str, runs: Sequence[RunHistory]) -> str:
    """One chart as an inline SVG element."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4) if name == "entropy" else (5.6, 3.4), layout="constrained")
        CHARTS[name](figure.add_subplot(), runs)
        return inline_svg(figure, name)


def inline_svg(figure: Figure, label: str) -> str:
    """A figure as an SVG element of a page with ``theme``, its colours as CSS variables.

    To be called where ``STYLE`` holds.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', text, count=1
    )
    for colour, variable in theme_variables().items():
        text = text.replace(colour, f"var({variable})")
    return text


def _filtered(run: RunHistory, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps of a chart and the filtered figure at them: the filter sees every step, the chart a part of them."""
    steps = run.series.read([name])["step"]
    return steps, filtered(run.column(name))[steps]


def _label(run: RunHistory, runs: Sequence[RunHistory]) -> str | None:
    """A legend entry per method: its first run carries it."""
    first = next(other for other in runs if other.label == run.label)
    return run.label if run is first else None


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, loc="best")
