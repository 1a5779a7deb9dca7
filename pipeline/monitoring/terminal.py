"""Draws a run in the terminal: the entropy in its band, the command below, and the run's main figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.entropy.actuator import temperatures
from pipeline.monitoring.naming import counted, titles
from pipeline.monitoring.progress import STATE_STYLES
from pipeline.monitoring.series import Series
from pipeline.monitoring.status import status_of
from pipeline.monitoring.text_chart import LABEL, Area, Line, TextChart
from pipeline.monitoring.tracking import filtered

SIDE_BY_SIDE = 58  # columns that a run needs beside another one
FIGURE = 24  # columns of a figure with its name
PLAIN_HEIGHT = 42  # rows, where the output is no terminal
SHOWN_ALERTS = 4
SEVERITIES = {"info": "cyan", "warning": "yellow", "critical": "bold red"}
LIFE = {"running": "green", "completed": "green", "silent": "bold red", "failed": "bold red", "stopped": "yellow"}
MARKS = {"restart": ("R", "cyan"), "fault": ("F", "yellow"), "stall": ("S", "bold red"), "alert": ("!", "bold red")}


def view(runs: Sequence[Series], console: Console) -> RenderableType:
    """The runs as of their last ``update``.

    Side by side where the terminal is wide enough, else one below the other.
    """
    across = max(1, min(len(runs), console.width // SIDE_BY_SIDE))
    down = -(-len(runs) // across)
    height = console.height if console.is_terminal else PLAIN_HEIGHT
    width, height = console.width // across, height // down
    table = Table.grid(expand=True)
    for _ in range(across):
        table.add_column(ratio=1)
    found = [status_of(run) for run in runs]
    named = titles([(one["name"], one["seed"], run.run_dir) for one, run in zip(found, runs, strict=True)])
    panels = [
        _panel(run, one, title, console, width, height) for run, one, title in zip(runs, found, named, strict=True)
    ]
    for row in range(down):
        table.add_row(*panels[row * across : (row + 1) * across])
    return table


def _panel(series: Series, found: Mapping[str, Any], name: str, console: Console, width: int, height: int) -> Panel:
    inner = width - 4
    figures = _figures(found, inner)
    alerts = _alerts(found)
    taken = len(figures.rows) + len(alerts) + 8
    rows = min(14, max(5, height - taken - 5))
    charts = _charts(series, found, console, inner - LABEL, rows)
    title = Text.assemble((name, "bold"), f" (seed {found['seed']}) " if found["seed"] is not None else " ")
    title.append(_life(found), LIFE.get(found["status"], ""))
    notes = [*alerts, *_damage(found)]
    return Panel(Group(_head(found, inner), *charts, _state(found), figures, *notes), title=title, title_align="left")


def _head(found: Mapping[str, Any], width: int) -> RenderableType:
    """Steps done, a bar, time per step, time left."""
    done, goal = _done(found), found["steps"]
    seconds = (found["seconds"] or {}).get("total")
    pace = f"{seconds:.3g} s/step" if seconds else ""
    left = f"{timedelta(seconds=round(found['eta_seconds']))} left" if found["eta_seconds"] is not None else ""
    head = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=max(1, goal), completed=done, width=max(5, min(30, width - 45)))
    head.add_row(f"step {done}/{goal}", bar, pace, left)
    return head


def _charts(
    series: Series, found: Mapping[str, Any], console: Console, columns: int, rows: int
) -> list[RenderableType]:
    """The entropy over its band, what happened, then the command."""
    first, last = 0, max(1, series.steps - 1)
    ascii_only, colour = console.options.ascii_only, console.color_system is not None and not console.no_color
    names = ["entropy/controlled", "entropy/band_low", "entropy/band_high", "control/command"]
    chart = series.read(names, points=max(8, 2 * columns))
    steps = chart["step"]
    if not len(steps):
        return [Text("no step yet", "dim")]
    entropy, low, high, command = (chart[name]["mean"] for name in names)
    smooth = filtered(series.column(names[0]))[steps]
    big = TextChart(columns, rows, first, last, ascii_only=ascii_only, colour=colour)
    raw = [Line(steps, entropy, "bright_black")] if colour else []  # without colours the two cannot be told apart
    band = Area(steps, low, high, "dark_green")
    whose = " of the repeated prompts" if found["band_of"] == "repeated" else ""
    parts: list[RenderableType] = [
        Text(f"entropy{whose}, nats per token; band shaded", "dim"),
        *big.draw([*raw, Line(steps, smooth, "bold bright_white" if colour else "")], band),
        _marks(series, big),
    ]
    if found["actuator"] not in (None, "none"):
        small = TextChart(columns, max(3, rows // 3), first, last, ascii_only=ascii_only, colour=colour)
        parts += [Text(_unit(found), "dim"), *small.draw([Line(steps, command, "bright_blue")])]
    ends = Text(" " * LABEL + str(first).ljust(max(1, columns - len(str(last)))) + str(last), "dim", no_wrap=True)
    return [*parts, ends]


def _marks(series: Series, chart: TextChart) -> Text:
    """A line below a chart: restarts, faults, stalls and alerts where they happened, saturated steps underlined."""
    cells = [(" ", "")] * chart.columns
    saturated = np.flatnonzero(series.in_state("saturated"))
    for column in np.unique(chart.place(saturated)).tolist():
        cells[column] = ("~", "yellow")
    for mark in series.marks():
        if mark["kind"] in MARKS:
            column = int(chart.place(np.array([mark["step"]]))[0])  # may stand behind the last step
            cells[min(column, chart.columns - 1)] = MARKS[mark["kind"]]
    return Text.assemble(" " * LABEL, *cells, no_wrap=True)


def _state(found: Mapping[str, Any]) -> Text:
    """What the controller does, in words."""
    if found["state"] is None:
        return Text("no step yet", "dim")
    command = "no control" if found["actuator"] == "none" else f"{_unit(found)} not recorded"
    if found["actuator"] != "none" and found["command"] is not None:
        command = f"{_unit(found)} {found['command']:.4g}"
    return Text.assemble(
        (found["state"], STATE_STYLES.get(found["state"], "dim")),
        f": {found['reason']}" if found["reason"] else "",
        f"; {command}",
    )


def _figures(found: Mapping[str, Any], width: int) -> Table:
    """Name and value, as many beside each other as fit."""
    shown = [(name, value) for name, value in figures(found) if value]
    across = max(1, width // FIGURE)
    table = Table.grid(expand=True, padding=(0, 1))
    for _ in range(across):
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    cells = [Text.assemble((f"{name} ", "dim"), value) for name, value in shown]
    for row in range(0, len(cells), across):
        table.add_row(*cells[row : row + across])
    return table


def figures(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the panel lists, in words; an empty value: not known."""
    seconds, sync, memory = found["seconds"] or {}, found["sync"] or {}, found["memory"] or {}
    alive, total = ((found["engines"] or {}).get(name) for name in ("alive", "total"))
    phases = ("sample", "verify", "batch", "train", "sync", "other")
    split = ((phase, f"{seconds[phase]:.3g} s") for phase in phases if phase in seconds)
    band = f"{found['band_low']:.3g}-{found['band_high']:.3g}" if found["band_low"] is not None else ""
    return [
        ("entropy", _number(found["entropy"])),
        ("repeated", _number(found["entropy_controlled"]) if found["band_of"] == "repeated" else ""),
        ("filtered", _number(found["entropy_filtered"])),
        ("band", band),
        ("in band", _percent(found["time_in_band"] if _done(found) else None)),
        ("RMS error", _percent(found["rms_error"])),
        ("reward", _number(found["reward_recent"])),
        *((f"pass@{k}", f"{value:.3f}") for k, value in (found["pass_at_k"] or {}).items()),
        ("length", _number(found["response_length_recent"])),
        ("ACR", _percent(found["all_equal_groups_recent"])),
        ("not judged", str(found["verifier_errors"] or "")),
        ("mismatch KL", _number(found["mismatch_kl"])),
        *split,
        ("sync bytes", size(sync["bytes"]) if sync.get("bytes") is not None else ""),
        *((f"{name} memory", f"{gib:.2f} GiB") for name, gib in memory.items() if gib is not None),
        ("engines", f"{alive:.0f} of {total:.0f}" if alive is not None and total is not None else ""),
        ("restarts", str(len(found["restarts"]) or "")),
        ("faults", str(found["faults"] or "")),
    ]


def _alerts(found: Mapping[str, Any]) -> list[Text]:
    """Those that hold, then the newest of the others."""
    known = sorted(found["alerts"], key=lambda alert: (alert["active"], alert["step"]), reverse=True)[:SHOWN_ALERTS]
    return [
        Text.assemble(
            (f"{alert['severity']} ", SEVERITIES.get(alert["severity"], "yellow") if alert["active"] else "dim"),
            f"step {alert['step']}{'' if alert['active'] else ' (past)'}: {alert['rule']}: {alert['reason']}",
        )
        for alert in known
    ]


def _damage(found: Mapping[str, Any]) -> list[Text]:
    """What of the log could not be read."""
    count = found["damaged_lines"]
    said = f"{counted(count, 'damaged line')} of the log skipped: {found['damage']}"
    return [Text(said, "yellow")] if count else []


def _life(found: Mapping[str, Any]) -> str:
    silent = timedelta(seconds=round(found["silent_seconds"] or 0))
    if found["status"] == "silent":
        return f"silent for {silent}: stalled, or killed"
    return f"{found['status']}{': ' + found['error'] if found['error'] else ''}"


def _done(found: Mapping[str, Any]) -> int:
    return 0 if found["step"] is None else int(found["step"]) + 1


def _unit(found: Mapping[str, Any]) -> str:
    """What the command is called."""
    return f"T+ ({found['actuator']})" if found["actuator"] in temperatures() else str(found["actuator"])


def size(count: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
