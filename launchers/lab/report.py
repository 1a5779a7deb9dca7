"""Writes the report of a comparison: one HTML page with curves and a table, and the same as Markdown, PNG and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launchers.lab.figures import (
    Row,
    differences,
    main_table,
    markdown_table,
    rows_of,
)
from launchers.lab.matrix import Outcome, is_complete
from launchers.lab.suite import Cell, SuiteConfig
from pipeline.disk import replacing, telling
from pipeline.monitoring.charts import BAND, BASELINE, MUTED, SERIES, STYLE, inline_svg, save_png
from pipeline.monitoring.page import document, html_list, html_table
from pipeline.monitoring.summary import RunHistory, pass_at, read_run
from pipeline.monitoring.tracking import filtered

COLUMNS = 4
START_AGAIN = "start again"  # what to do with a laboratory once there is room on the disk
NOTE = (
    "Mean ± half of the 95 % interval over seeds (Student's t). Bold: better than every other method, the interval of "
    "the difference by seed excluding 0. All methods get the budget of the baseline of the same seed, in generated "
    "response tokens. Reward cost: share of the baseline's reward area lost over those tokens. Time in band, RMS error "
    "and overshoot: filtered entropy, from its first step in the band on, methods that steer to it only; settled: the "
    "first step from which 20 lie in the band (never: the last step)."
)
CSS = "body { max-width: 1240px; } table { font-size: 13.5px; }"  # a wide table


class NoBaselineError(Exception):
    """No run of the baseline is complete; the message has every failure and the remedy."""

    def __init__(self, baseline: str, failed: Sequence[Mapping[str, Any]]) -> None:
        nothing = f"no run of the baseline {baseline!r} is complete: there is nothing to compare with, and no report"
        remedy = "mend what failed, then start again to resume the runs"
        super().__init__("\n".join(["Failed:\n", *map(_lost, failed), "", f"{nothing}; {remedy}"]))


def write_report(suite: SuiteConfig, cells: Sequence[Cell], outcomes: Sequence[Outcome], out: Path) -> dict[str, Any]:
    """Write ``lab.html``, ``lab.md``, ``lab.png``, ``lab_price.png`` and ``lab.json`` of the complete ``cells``.

    Returns what the JSON holds.

    Raises ``NoBaselineError`` when not one run of the baseline is complete, ``DiskFullError``.
    """
    runs: dict[str, list[RunHistory]] = {method: [] for method in suite.methods}
    for cell in cells:
        if is_complete(Path(cell.config.run_dir)):
            runs[cell.method].append(read_run(Path(cell.config.run_dir)))
    runs = {method: histories for method, histories in runs.items() if histories}
    failed = [{"method": o.cell.method, "seed": o.cell.seed, "error": o.error} for o in outcomes if o.error]
    if suite.baseline not in runs:
        raise NoBaselineError(suite.baseline, failed)
    rows = rows_of(runs, suite.baseline, suite.stopped_at, suite.reach, suite.mean_of_last)
    result = {"title": suite.title, "rows": [row.to_dict() for row in rows], "failed": failed}
    with telling(out, START_AGAIN):
        _write(suite, runs, rows, result, out)
    return result


def _write(
    suite: SuiteConfig,
    runs: Mapping[str, Sequence[RunHistory]],
    rows: Sequence[Row],
    result: Mapping[str, Any],
    out: Path,
) -> None:
    """The files of ``write_report``; ``result`` is what the JSON holds."""
    failed = result["failed"]
    lost = "\n".join(["Failed, and not in the table:\n", *map(_lost, failed), ""]) if failed else ""
    heading, gains = differences(rows, suite.baseline)
    against = f"Difference to {suite.baseline}, by seed"
    paired = f"{against}:\n\n{markdown_table(heading, gains)}\n\n" if gains else ""
    text = f"{markdown_table(*main_table(rows, '**{}**'))}\n\n{_note(suite)}\n\n{paired}{lost}"
    with mpl.rc_context(STYLE | {"font.size": 8, "axes.titlesize": 9}):
        figure = draw(runs, suite.baseline)
        save_png(figure, out / "lab.png")
        curves = inline_svg(figure, "curves")
        price = draw_price(rows, suite.baseline)
        save_png(price, out / "lab_price.png")
        prices = inline_svg(price, "price")
    second = _html(heading, gains)
    second = f"<h2>{escape(against)}</h2>{second}" if gains else ""
    page = _page(suite, rows, second, failed, curves, prices)
    texts = {"lab.json": json.dumps(result, indent=1), "lab.md": text.rstrip() + "\n", "lab.html": page}
    for name, whole in texts.items():
        with replacing(out / name) as partial:
            partial.write_text(whole, encoding="utf-8")


def _lost(failed: Mapping[str, Any]) -> str:
    return f"- {failed['method']}, seed {failed['seed']}: {failed['error']}"


def draw(runs: Mapping[str, Sequence[RunHistory]], baseline: str) -> Figure:
    """Draw one panel per method: the entropy of every seed in the band, with pass@16 below.

    The baseline stands in grey behind each method.
    """
    height = math.ceil(len(runs) / COLUMNS)
    figure = Figure(figsize=(3.1 * COLUMNS, 2.9 * height), layout="constrained")
    grid = figure.add_gridspec(2 * height, COLUMNS, height_ratios=[2, 1] * height)
    for index, (method, histories) in enumerate(runs.items()):
        row, column = divmod(index, COLUMNS)
        upper = figure.add_subplot(grid[2 * row, column])
        lower = figure.add_subplot(grid[2 * row + 1, column], sharex=upper)
        _entropy(upper, histories, runs[baseline])
        _pass(lower, histories, runs[baseline])
        upper.set_title(method)
        if column == 0:
            upper.set_ylabel("entropy, nats")
            lower.set_ylabel("pass@16")
    return figure


def draw_price(rows: Sequence[Row], baseline: str) -> Figure:
    """Draw pass@1, pass@4 and pass@16 of every row against the entropy at its end; bars are 95 % intervals."""
    figure = Figure(figsize=(3.1 * COLUMNS, 3.4), layout="constrained")
    for axes, k in zip(figure.subplots(1, 3, sharex=True), (1, 4, 16), strict=True):
        for row in rows:
            (entropy, across), (value, up) = row.estimate("final_entropy"), row.estimate(f"pass_at_{k}")
            colour = BASELINE if row.method.startswith(baseline) else SERIES[0]
            bars = {"xerr": across, "yerr": up} if row.seeds > 2 else {}  # of two seeds they hide all else
            axes.errorbar(entropy, value, **bars, color=colour, marker="o", markersize=3, linewidth=0.8)
            axes.annotate(row.method, (entropy, value), xytext=(3, 3), textcoords="offset points", fontsize=6)
        axes.set(title=f"pass@{k}", xlabel="entropy at the end, nats")
        axes.set_xlim(left=0)
    return figure


def _entropy(axes: Axes, runs: Sequence[RunHistory], baseline: Sequence[RunHistory]) -> None:
    for run in baseline:
        axes.plot(filtered(run.column("entropy/controlled")), color=BASELINE, linewidth=0.8, alpha=0.5)
    first = runs[0]
    if not first.is_baseline:
        low, high = first.column("entropy/band_low"), first.column("entropy/band_high")
        axes.fill_between(range(first.steps), low, high, color=BAND, alpha=0.2, linewidth=0)
    for run in runs:
        axes.plot(filtered(run.column("entropy/controlled")), color=SERIES[0], linewidth=1.3)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelbottom=False)


def _pass(axes: Axes, runs: Sequence[RunHistory], baseline: Sequence[RunHistory]) -> None:
    for histories, colour in ((baseline, BASELINE), (runs, SERIES[1])):
        curves = [[(e["step"], pass_at(e, 16)[0]) for e in run.evaluations] for run in histories]
        steps = sorted({step for curve in curves for step, _ in curve})
        means = [np.mean([value for curve in curves for at, value in curve if at == step]) for step in steps]
        axes.plot(steps, means, color=colour, marker="o", markersize=2.5, linewidth=1.2)
    axes.tick_params(colors=MUTED)


def _page(
    suite: SuiteConfig, rows: Sequence[Row], second: str, failed: Sequence[Mapping[str, Any]], curves: str, prices: str
) -> str:
    title = suite.title or "Methods side by side"
    lost = html_list(f"{escape(f['method'])}, seed {f['seed']}: {escape(f['error'])}" for f in failed)
    legend = "Filtered entropy of every seed (blue) in its band, mean pass@16 (orange); the baseline in grey."
    sections = [
        f"<h1>{escape(title)}</h1>{_html(*main_table(rows, '<b>{}</b>'))}",
        f'<p class="muted">{escape(_note(suite))}</p>',
        f"<h2>Failed</h2>{lost}" if failed else "",
        second,
        '<h2>What entropy buys and costs</h2><p class="muted">pass@k at equal tokens; bars: 95 % intervals, of three '
        "seeds or more.</p>"
        f"<figure>{prices}</figure>",
        f'<h2>Curves</h2><p class="muted">{legend}</p><figure>{curves}</figure>',
    ]
    return document(title, "".join(sections), CSS)


def _note(suite: SuiteConfig) -> str:
    if suite.mean_of_last == 1:
        how = "interpolated between evaluations to the end of the budget."
    else:
        how = f"the mean of the last {suite.mean_of_last} evaluations within the budget."
    note = f"{NOTE} pass@k and distinct answers: held-out prompts, {how}"
    if suite.reach:
        note += f" Reached: the step at which pass@1 is {suite.reach:g}, between evaluations (never: the last step)."
    return note


def _html(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return html_table(heading, [[escape(method), *cells] for method, *cells in lines])
