"""The report of a matrix: one page with curves and table, the same as Markdown, PNG and JSON."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from launchers.lab.figures import FIGURES, Row, cell_text, markdown, rows_of
from launchers.lab.matrix import Outcome, is_complete
from launchers.lab.suite import Cell, SuiteConfig
from pipeline.monitoring.charts import BAND, BASELINE, MUTED, SERIES, STYLE
from pipeline.monitoring.summary import RunHistory, pass_at, read_run
from pipeline.monitoring.tracking import filtered

COLUMNS = 4
NOTE = (
    "Mean ± half of the 95 % interval over seeds (Student's t). Bold: better than every other method, the interval of the difference by seed "
    "excluding 0. pass@k and distinct answers: held-out prompts, last evaluation within the response tokens that the baseline of the same seed "
    "generated. Reward cost: share of the baseline's reward area lost over those tokens. Time in band and RMS error: filtered entropy, from its "
    "first step in the band on, methods that steer to it only."
)
CSS = """
:root { color-scheme: light dark; --page: #fff; --ink: #1f2328; --muted: #5b646e; --line: #dde1e6; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e6e8eb; --muted: #9aa4af; --line: #343a42; } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } .muted { color: var(--muted); max-width: 60rem; } svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--muted); font-weight: 600; }
@media (prefers-color-scheme: dark) { .curves { background: #fff; border-radius: 6px; } }
"""


def write_report(suite: SuiteConfig, cells: Sequence[Cell], outcomes: Sequence[Outcome], out: Path) -> dict[str, Any]:
    """Write ``lab.html``, ``lab.md``, ``lab.png`` and ``lab.json`` of the complete runs among ``cells``; returns what the JSON holds.

    Raises ``ValueError`` when not one run of the baseline is complete.
    """
    runs: dict[str, list[RunHistory]] = {method: [] for method in suite.methods}
    for cell in cells:
        if is_complete(Path(cell.config.run_dir)):
            runs[cell.method].append(read_run(Path(cell.config.run_dir)))
    runs = {method: histories for method, histories in runs.items() if histories}
    if suite.baseline not in runs:
        raise ValueError(f"no run of the baseline {suite.baseline!r} is complete: there is nothing to compare with")
    rows = rows_of(runs, suite.baseline, suite.stopped_at)
    failed = [{"method": o.cell.method, "seed": o.cell.seed, "error": o.error} for o in outcomes if o.error]
    result = {"title": suite.title, "rows": [row.to_dict() for row in rows], "failed": failed}
    (out / "lab.json").write_text(json.dumps(result, indent=1))
    (out / "lab.md").write_text(f"{markdown(rows)}\n\n{NOTE}\n")
    figure = draw(runs, suite.baseline)
    figure.savefig(out / "lab.png", dpi=110)
    (out / "lab.html").write_text(_page(suite, rows, failed, _svg(figure)), encoding="utf-8")
    return result


def draw(runs: Mapping[str, Sequence[RunHistory]], baseline: str) -> Figure:
    """One panel per method: entropy of every seed and the band, with pass@16 below it; the baseline in grey behind each."""
    height = math.ceil(len(runs) / COLUMNS)
    with mpl.rc_context(STYLE | {"font.size": 8, "axes.titlesize": 9}):
        figure = Figure(figsize=(3.1 * COLUMNS, 2.9 * height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(2 * height, COLUMNS, height_ratios=[2, 1] * height)
        for index, (method, histories) in enumerate(runs.items()):
            row, column = divmod(index, COLUMNS)
            upper, lower = (figure.add_subplot(grid[2 * row + part, column]) for part in (0, 1))
            _entropy(upper, histories, runs[baseline])
            _pass(lower, histories, runs[baseline])
            upper.set_title(method)
            if column == 0:
                upper.set_ylabel("entropy, nats")
                lower.set_ylabel("pass@16")
    return figure


def _entropy(axes: Axes, runs: Sequence[RunHistory], baseline: Sequence[RunHistory]) -> None:
    for run in baseline:
        axes.plot(filtered(run.column("entropy/mean")), color=BASELINE, linewidth=0.8, alpha=0.5)
    first = runs[0]
    if not first.is_baseline:
        low, high = first.column("entropy/band_low"), first.column("entropy/band_high")
        axes.fill_between(range(first.steps), low, high, color=BAND, alpha=0.2, linewidth=0)
    for run in runs:
        axes.plot(filtered(run.column("entropy/mean")), color=SERIES[0], linewidth=1.3)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelbottom=False)


def _pass(axes: Axes, runs: Sequence[RunHistory], baseline: Sequence[RunHistory]) -> None:
    for histories, colour in ((baseline, BASELINE), (runs, SERIES[1])):
        curves = [[(e["step"], pass_at(e, 16)[0]) for e in run.evaluations] for run in histories]
        steps = sorted({step for curve in curves for step, _ in curve})
        means = [np.mean([value for curve in curves for at, value in curve if at == step]) for step in steps]
        axes.plot(steps, means, color=colour, marker="o", markersize=2.5, linewidth=1.2)
    axes.tick_params(colors=MUTED)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _page(suite: SuiteConfig, rows: Sequence[Row], failed: Sequence[Mapping[str, Any]], curves: str) -> str:
    head = "".join(f"<th>{escape(figure.title)}</th>" for figure in FIGURES.values())
    body = "".join(f"<tr><td>{escape(row.method)}</td><td>{row.seeds}</td>{_cells(row)}</tr>" for row in rows)
    lost = "".join(f"<li>{escape(f['method'])}, seed {f['seed']}: {escape(f['error'])}</li>" for f in failed)
    title = escape(suite.title or "Methods side by side")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>\n'
        f"<body><h1>{title}</h1>"
        f'<div class="scroll"><table><thead><tr><th>method</th><th>seeds</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="muted">{escape(NOTE)}</p>'
        + (f"<h2>Failed</h2><ul>{lost}</ul>" if lost else "")
        + '<p class="muted">Below: filtered entropy of every seed (blue) in its band, mean pass@16 (orange); the baseline in grey.</p>'
        f'<div class="curves">{curves}</div></body></html>\n'
    )


def _cells(row: Row) -> str:
    texts = [(name, cell_text(name, *row.estimate(name))) for name in FIGURES]
    return "".join(f"<td>{f'<b>{text}</b>' if name in row.best else text}</td>" for name, text in texts)
