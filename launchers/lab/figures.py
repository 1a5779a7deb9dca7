"""The table of a comparison: one row per method, each figure with its mean and confidence interval over seeds.

All methods get the budget of the baseline of the same seed, in generated response tokens: pass@k and distinct answers
are interpolated between the evaluations before and after that, or are the mean of the last few up to that, and the
reward is compared over that many tokens. Methods that draw further samples thus stop earlier, not later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, stdev
from typing import Any

import numpy as np

from pipeline.monitoring.price import generated, reward_cost
from pipeline.monitoring.series import LAST_STEPS
from pipeline.monitoring.summary import RunHistory, pass_at
from pipeline.monitoring.tracking import track
from pipeline.student import t95


@dataclass(frozen=True)
class Figure:
    """One column of the table."""

    title: str
    better: int = 0  # 1: higher is better, -1: lower, 0: neither
    percent: bool = False
    digits: int = 3


FIGURES = {
    "pass_at_1": Figure("pass@1", 1),
    "pass_at_4": Figure("pass@4", 1),
    "pass_at_16": Figure("pass@16", 1),
    "distinct_correct": Figure("distinct answers", 1),
    "reached": Figure("reached at step", -1, digits=0),
    "final_entropy": Figure("H at the end"),
    "time_in_band": Figure("time in band", 1, percent=True),
    "rms_error": Figure("RMS error", -1, percent=True),
    "overshoot": Figure("overshoot", -1, percent=True),
    "settled": Figure("settled at step", -1, digits=0),
    "reward_cost": Figure("reward cost", -1, percent=True),
    "extra_tokens": Figure("extra tokens", -1, percent=True),
    "seconds": Figure("wall time, s", -1, digits=1),
}
GAINS = ("pass_at_1", "pass_at_4", "pass_at_16", "distinct_correct")


@dataclass(frozen=True)
class Row:
    """One row of the table: a method and its figures over seeds."""

    method: str
    seeds: int
    values: Mapping[str, Mapping[int, float]]  # figure -> seed -> number, where it exists
    best: frozenset[str] = field(default_factory=frozenset)  # figures in which it beats every other method

    def estimate(self, figure: str) -> tuple[float, float]:
        """Mean over seeds and half-width of its 95 % interval; NaN where there are too few values."""
        values = list(self.values[figure].values())
        return (mean(values) if values else math.nan), half_width(values)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self) | {"best": sorted(self.best)}


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean, by Student's t; NaN below two values."""
    if len(values) < 2:
        return math.nan
    return t95(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def rows_of(
    runs: Mapping[str, Sequence[RunHistory]],
    baseline: str,
    stopped_at: Sequence[int] = (),
    reach: float = 0.0,
    mean_of_last: int = 1,
) -> list[Row]:
    """The rows of the table: the baseline as if it had stopped early, then the methods in the order of ``runs``.

    ``runs`` holds complete runs only, seed by seed. ``reach``: the pass@1 whose first step is shown; 0: none.
    ``mean_of_last``: evaluations that are averaged; 1: none, they are interpolated.

    A method is *best* in a figure where the 95 % interval of the difference to every other, over the seeds that both
    have, excludes 0.
    """
    budgets = {run.config.seed: run for run in runs[baseline]}
    table = []
    for method, histories in runs.items():
        if method == baseline:
            for steps in stopped_at:
                early = {run.config.seed: measure(run, run, steps, reach, mean_of_last) for run in histories}
                table.append(_row(f"{baseline}, {steps} steps", early))
        found = {
            run.config.seed: measure(run, budgets.get(run.config.seed), None, reach, mean_of_last) for run in histories
        }
        table.append(_row(method, found))
    return _with_best(table)


def measure(
    run: RunHistory,
    baseline: RunHistory | None,
    steps: int | None = None,
    reach: float = 0.0,
    mean_of_last: int = 1,
) -> dict[str, float]:
    """The figures of one run; NaN where one does not exist. ``steps``: as if it had been stopped after so many."""
    last = run.steps if steps is None else min(steps, run.steps)
    tokens_before = generated(run)
    theirs = generated(baseline) if baseline else np.array([math.inf])
    seen = [e for e in run.evaluations if e["step"] <= last]
    tokens = [tokens_before[e["step"]] for e in seen]

    def within_budget(values: Sequence[float]) -> float:
        if not seen:
            return math.nan
        if mean_of_last == 1:
            return float(np.interp(theirs[-1], tokens, values))
        return float(np.mean(values[: max(1, np.searchsorted(tokens, theirs[-1], "right"))][-mean_of_last:]))

    main = float(np.nansum(run.column("tokens/main")[:last]))
    entropies = run.column("entropy/controlled")[max(0, last - LAST_STEPS) : last]
    bands = (run.column(name)[:last] for name in ("entropy/controlled", "entropy/band_low", "entropy/band_high"))
    tracking = track(*bands)
    steered = not run.is_baseline
    return {
        **{f"pass_at_{k}": within_budget([pass_at(e, k)[0] for e in seen]) for k in (1, 4, 16)},
        "distinct_correct": within_budget([e.get("distinct_correct", math.nan) for e in seen]),
        "reached": _reached(seen, reach, last) if reach else math.nan,
        "final_entropy": float(np.nanmean(entropies)) if np.isfinite(entropies).any() else math.nan,
        "time_in_band": tracking.time_in_band if steered else math.nan,
        "rms_error": tracking.rms_error if steered else math.nan,
        "overshoot": tracking.overshoot if steered else math.nan,
        "settled": float(last if tracking.settling_step is None else tracking.settling_step) if steered else math.nan,
        "reward_cost": reward_cost(run, baseline) if baseline and baseline is not run else math.nan,
        "extra_tokens": float(tokens_before[last]) / main - 1 if main else math.nan,
        "seconds": float(np.nansum(run.column("time/total")[:last])),
    }


def _reached(evaluations: Sequence[dict[str, Any]], reach: float, last: int) -> float:
    """The first step, interpolated between evaluations, at which pass@1 is ``reach``; never: the last step."""
    before: tuple[int, float] | None = None
    for evaluation in evaluations:
        step, value = evaluation["step"], pass_at(evaluation, 1)[0]
        if value >= reach:
            return float(step) if before is None else float(np.interp(reach, (before[1], value), (before[0], step)))
        before = step, value
    return float(last)


def _row(method: str, found: Mapping[int, Mapping[str, float]]) -> Row:
    values = {name: {seed: each[name] for seed, each in found.items() if math.isfinite(each[name])} for name in FIGURES}
    return Row(method, len(found), values)


def _with_best(table: Sequence[Row]) -> list[Row]:
    return [
        Row(row.method, row.seeds, row.values, frozenset(name for name in FIGURES if _beats_all(row, table, name)))
        for row in table
    ]


def _beats_all(row: Row, table: Sequence[Row], name: str) -> bool:
    others = [other for other in table if other is not row and other.values[name]]
    better = FIGURES[name].better
    return bool(better and others and row.values[name]) and all(
        _difference_excludes_zero(row.values[name], other.values[name], better) for other in others
    )


def _difference_excludes_zero(ours: Mapping[int, float], theirs: Mapping[int, float], better: int) -> bool:
    """Whether the 95 % interval of the difference, paired by seed, excludes 0."""
    found = _paired(ours, theirs)
    width = half_width(found)
    return math.isfinite(width) and better * mean(found) > width


def _paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """The differences of the seeds that both have."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def cell_text(name: str, value: float, width: float, sign: str = "-") -> str:
    """One cell: mean and half-width, in the figure's own unit; ``sign="+"``: a difference, always with its sign."""
    if not math.isfinite(value):
        return "-"
    figure = FIGURES[name]
    digits, factor, unit = (1, 100, " %") if figure.percent else (figure.digits, 1, "")
    spread = f" ± {width * factor:.{digits}f}" if math.isfinite(width) else ""
    return f"{value * factor:{sign}.{digits}f}{spread}{unit}"


def differences(table: Sequence[Row], baseline: str) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of a second table: what each method's answers are worth less the baseline's, by seed.

    A method has a row if it has two seeds beside the baseline's.
    """
    base = next(row for row in table if row.method == baseline)
    shown = [name for name in GAINS if base.values[name]]
    lines = []
    for row in (row for row in table if row is not base):
        paired = {name: _paired(row.values[name], base.values[name]) for name in shown}
        seeds = max(map(len, paired.values()), default=0)
        if seeds > 1:
            cells = [cell_text(name, mean(each or [math.nan]), half_width(each), "+") for name, each in paired.items()]
            lines.append([row.method, str(seeds), *cells])
    return ["method", "seeds", *(FIGURES[name].title for name in shown)], lines


def main_table(table: Sequence[Row], best: str) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the first table; ``best`` is the pattern of a cell that beats all others: ``**{}**``."""
    shown = [name for name in FIGURES if any(row.values[name] for row in table)]
    lines = []
    for row in table:
        texts = [(name, cell_text(name, *row.estimate(name))) for name in shown]
        cells = [best.format(text) if name in row.best else text for name, text in texts]
        lines.append([row.method, str(row.seeds), *cells])
    return ["method", "seeds", *(FIGURES[name].title for name in shown)], lines


def markdown_table(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *lines))
