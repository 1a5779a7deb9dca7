"""Reads a run back from its folder and computes the figures of reports and comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from pipeline.config.load import config_hash, load_config
from pipeline.config.schema import RunConfig
from pipeline.monitoring.metrics import learner_metric, none_if_not_finite
from pipeline.monitoring.naming import counted, titles
from pipeline.monitoring.series import Series
from pipeline.monitoring.tracking import of_series

# Metrics of engine against learner, and of its correction: what a run's figure is made of its steps' by.
MISMATCH: dict[str, Callable[[np.ndarray], Any]] = {
    "mismatch_mean": np.mean,
    "mismatch_p99": np.mean,
    "mismatch_max": np.max,
    "mismatch_kl": np.mean,
    "correction_weight": np.mean,
    "correction_outside": np.mean,
    "correction_ess": np.mean,
}
COMPARED = ("final_entropy", "time_in_band", "rms_error", "pass_at_1", "pass_at_16", "distinct_correct")


@dataclass(frozen=True)
class RunHistory:
    """Configuration and figures of one run, finished or still running. Figures by the names of ``metrics.py``."""

    run_dir: Path
    config: RunConfig
    series: Series
    label: str  # its method: the run's name, unless another run of that name does something else
    title: str  # tells it from every run beside it

    @property
    def is_baseline(self) -> bool:
        """Whether it ran without entropy control: what the others' cost is measured against."""
        return self.config.entropy.controller == "none"

    @property
    def steps(self) -> int:
        """Steps in force."""
        return self.series.steps

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluation events in force, in order."""
        return self.of_kind("evaluation")

    @property
    def restarts(self) -> list[dict[str, Any]]:
        """Every resume event."""
        return self.of_kind("resume")

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Events in force of one kind that is not ``step``, in order."""
        return [event for event in self.series.events if event["kind"] == kind]

    def column(self, name: str, first: int = 0) -> np.ndarray:
        """One number per step from ``first`` on; NaN where there is none."""
        return self.series.column(name, first)

    @property
    def status(self) -> str:
        """``completed``, ``stopped``, ``failed`` or ``unfinished`` (running, or killed)."""
        ends = self.of_kind("run_end")
        return ends[-1]["status"] if ends else "unfinished"


def read_run(run_dir: Path) -> RunHistory:
    """Read a run folder. Raises ``EventLogError`` (no events) and ``ConfigError`` (no or bad config.yaml)."""
    series = Series(run_dir)
    config = load_config(run_dir / "config.yaml", check=False)
    return RunHistory(run_dir, config, series, config.name, config.name)


def named(runs: Sequence[RunHistory]) -> list[RunHistory]:
    """Runs to be shown together, with labels and titles that tell them apart.

    Seeds of one configuration share their label.
    """
    found = titles([(run.config.name, run.config.seed, run.run_dir) for run in runs])
    return [
        replace(run, title=title, label=run.config.name if _one_method(run, runs) else title)
        for run, title in zip(runs, found, strict=True)
    ]


def _one_method(run: RunHistory, runs: Sequence[RunHistory]) -> bool:
    """Whether runs of this name differ in nothing but their seeds."""
    return len({config_hash(replace(r.config, seed=0)) for r in runs if r.config.name == run.config.name}) == 1


def summarize(run_dir: Path) -> dict[str, Any]:
    """The figures of one run as a flat JSON object; None where one does not exist (yet). See ``summarize_run``."""
    return summarize_run(read_run(run_dir))


def summarize_run(run: RunHistory) -> dict[str, Any]:
    """What a comparison shows of a run.

    ``final_entropy`` is the mean of the last 20 steps; band figures are those of ``tracking.Tracking``; pass@k,
    intervals and ``distinct_correct`` come from the last evaluation, made after ``evaluation_step`` updates;
    ``seconds`` are totals by phase; ``mismatch`` has means over steps (of ``mismatch_max`` the maximum).
    """
    last = run.evaluations[-1] if run.evaluations else {}
    figures = {
        "method": run.label,
        "title": run.title,
        "seed": run.config.seed,
        "steps": run.steps,
        "status": run.status,
        "final_entropy": run.series.recent_mean("entropy/controlled"),
        **asdict(of_series(run.series)),
        "pass_at_1": pass_at(last, 1)[0],
        "pass_at_16": pass_at(last, 16)[0],
        "pass_at_1_interval": pass_at(last, 1)[1:],
        "pass_at_16_interval": pass_at(last, 16)[1:],
        "distinct_correct": last.get("distinct_correct", math.nan),
        "evaluation_step": last.get("step"),
        "reward": run.series.recent_mean("reward/mean"),
        "mismatch": {name: _over_steps(run, name) for name in MISMATCH},
        "seconds": totals(run, "time/") | {"evaluation": sum(e.get("seconds", 0.0) for e in run.evaluations)},
        "tokens": {key: int(total) for key, total in totals(run, "tokens/").items()},
        "alerts": [f"step {e['step']}: {e['reason']}" for e in run.of_kind("alert") if e["state"] == "begin"],
        "restarts": [f"from step {event['step']}" for event in run.restarts],
        "controller": run.config.entropy.controller,
        "actuator": "none" if run.is_baseline else run.config.entropy.actuator,
        "config_hash": config_hash(run.config),
        "run_dir": str(run.run_dir),
    }
    return {key: _plain(value) for key, value in figures.items()}


def pass_at(evaluation: dict[str, Any], k: int) -> tuple[float, float, float]:
    """pass@k of an evaluation event with its interval; NaN where it was not measured."""
    estimate = evaluation.get("pass_at_k", {}).get(str(k))
    return (estimate["value"], estimate["low"], estimate["high"]) if estimate else (math.nan, math.nan, math.nan)


def totals(run: RunHistory, prefix: str) -> dict[str, float]:
    """Sum over steps of the figures whose names begin with ``prefix``, by the rest of their names.

    ``prefix`` is ``time/`` or ``tokens/``.
    """
    names = [name for name in run.series.names() if name.startswith(prefix)]
    return {name.removeprefix(prefix): float(np.nansum(run.column(name))) for name in names}


def by_method(summaries: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each method the number of runs, and mean and standard deviation of the compared figures.

    The deviation is None for one run.
    """
    methods: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(summary["method"] for summary in summaries):
        runs = [summary for summary in summaries if summary["method"] == method]
        methods[method] = {"runs": len(runs)}
        for figure in COMPARED:
            values = [run[figure] for run in runs if run[figure] is not None]
            methods[method][figure] = mean(values) if values else None
            methods[method][figure + "_sd"] = stdev(values) if len(values) > 1 else None
    return methods


def cost_sentences(runs: Sequence[RunHistory], summaries: Sequence[dict[str, Any]]) -> list[str]:
    """For each controlled method, its pass@1 and pass@16 beside the baseline's, of the runs that were evaluated.

    The baseline is the first one on the same task. Empty without one.
    """
    evaluated = [summary for summary in summaries if summary["pass_at_1"] is not None]
    methods = by_method(evaluated)
    firsts = {run.label: run for run in reversed(runs) if run.label in methods}
    pairs = [
        (run.label, next((b.label for b in runs if b.label in methods and is_baseline_of(b, run)), None))
        for run in reversed(firsts.values())
        if not run.is_baseline
    ]
    return [
        _cost(other, baseline, [s for s in evaluated if s["method"] in (other, baseline)], methods)
        for other, baseline in pairs
        if baseline
    ]


def is_baseline_of(other: RunHistory, run: RunHistory) -> bool:
    """Whether ``other`` ran without control, on the questions and the verifier of ``run``."""
    ours, theirs = run.config.data, other.config.data
    same = (ours.source, ours.held_out, ours.verifier) == (theirs.source, theirs.held_out, theirs.verifier)
    return other.is_baseline and same


def _over_steps(run: RunHistory, metric: str) -> float | None:
    """A learner's metric over all steps that have it; None if none does."""
    values = run.column(learner_metric(metric))
    values = values[np.isfinite(values)]
    return float(MISMATCH[metric](values)) if len(values) else None


def _cost(method: str, baseline: str, summaries: Sequence[dict[str, Any]], methods: dict[str, dict[str, Any]]) -> str:
    ours, theirs = methods[method], methods[baseline]
    difference = ours["pass_at_1"] - theirs["pass_at_1"]
    text = (
        f"{method}: pass@1 {ours['pass_at_1']:.3f} against {theirs['pass_at_1']:.3f} of {baseline}, "
        f"a difference of {difference:+.3f}"
    )
    if ours["pass_at_16"] is not None and theirs["pass_at_16"] is not None:
        text += f"; pass@16 {ours['pass_at_16']:.3f} against {theirs['pass_at_16']:.3f}"
    if ours["runs"] == theirs["runs"] == 1:
        first, second = (summary["pass_at_1_interval"] for summary in summaries)
        overlap = first[0] <= second[1] and second[0] <= first[1]
        text += f" (one seed each; the 95 % intervals of pass@1 {'overlap' if overlap else 'do not overlap'})"
    else:
        text += f" (means of {ours['runs']} and {theirs['runs']} runs)"
    steps = sorted({summary["evaluation_step"] for summary in summaries})
    return text + (
        f", after {counted(steps[0], 'step')}."
        if len(steps) == 1
        else f", evaluated after {', '.join(map(str, steps))} steps."
    )


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        entries = [_plain(entry) for entry in value]
        return None if set(entries) == {None} else entries
    return none_if_not_finite(value)
