"""The state of a run and its newest figures, for the terminal, the web page and scripts."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np

from pipeline.monitoring.event_kinds import controlled
from pipeline.monitoring.metrics import none_if_not_finite
from pipeline.monitoring.series import LAST_STEPS, TIME, Series
from pipeline.monitoring.tracking import Tracking, of_series, waiting

PACE = 100  # steps that the time left is judged by
SILENT_STEPS, SILENT_SECONDS = 20, 60.0  # without an event for so many step times, and for so long: silent
# Fields of the last step event that are shown as they are.
LAST = (
    "step",
    "entropy",
    "entropy_filtered",
    "band_of",
    "band_low",
    "band_high",
    "target",
    "temperature",
    "command",
    "actuator",
    "state",
    "reason",
    "reward",
    "positives",
    "all_equal_groups",
    "response_length",
    "truncated",
    "stale_samples",
    "verifier_errors",
    "loss",
    "grad_norm",
    "learning_rate",
    "sync",
    "memory",
    "engines",
)
AVERAGED = {
    "reward_recent": "reward/mean",
    "response_length_recent": "response/length",
    "all_equal_groups_recent": "reward/all_equal_groups",
    "mismatch_kl": "mismatch/kl",
    "mismatch_mean": "mismatch/mean",
}


def status_of(series: Series) -> dict[str, Any]:
    """How a run stands as of the last ``series.update()``: a JSON object, null for what there is not (yet).

    ``LAST`` are the last step's, as docs/events.md has them (``step`` is its number; ``entropy_controlled`` is the
    reading that the band is of; ``state`` is ``waiting`` where the controller is ready to track but the entropy has
    not come to the band yet); ``AVERAGED`` and ``seconds`` (by phase) are means over the last ``LAST_STEPS`` steps;
    tracking figures (``time_in_band``, ``rms_error``, ...) those of ``tracking.Tracking``. ``steps`` is the goal;
    ``status`` is running, silent (no event for long: stalled or killed), completed, stopped or failed,
    ``silent_seconds`` since the last event; ``alerts`` are those in force, oldest first: dicts with ``step``,
    ``rule``, ``severity``, ``reason`` and ``active``; ``pass_at_k`` {k: value} and ``evaluation_step`` are of the
    last evaluation; ``eta_seconds`` counts evaluations and checkpoints in; ``damaged_lines`` of the log were
    skipped, ``damage`` says what is wrong with the first.
    """
    events = series.events
    starts = [event for event in events if event["kind"] in ("run_start", "resume")]
    evaluations = [event for event in events if event["kind"] == "evaluation"]
    last = series.event(series.steps - 1) or {}
    pace = _pace(series, starts)
    goal = starts[-1].get("steps", 0) if starts else 0
    found = {
        "run": str(series.run_dir),
        "name": starts[-1].get("name", series.run_dir.name) if starts else series.run_dir.name,
        "seed": starts[-1].get("seed") if starts else None,
        "steps": goal,
        **_life(events, last, pace),
        **{name: last.get(name) for name in LAST},
        "entropy_controlled": controlled(last) if last else None,
        **asdict(tracking := of_series(series)),
        **_standing(series, last, tracking),
        **{name: series.recent_mean(metric) for name, metric in AVERAGED.items()},
        "seconds": _recent_seconds(series),
        "pass_at_k": {k: v["value"] for k, v in evaluations[-1]["pass_at_k"].items()} if evaluations else {},
        "evaluation_step": evaluations[-1]["step"] if evaluations else None,
        "restarts": [event["step"] for event in events if event["kind"] == "resume"],
        "faults": sum(event["kind"] == "fault" for event in events),
        "stalls": sum(event["kind"] == "stall" for event in events),
        "alerts": alerts(events),
        "damaged_lines": series.damage[0],
        "damage": series.damage[1],
    }
    left = max(0, goal - series.steps)
    found["eta_seconds"] = left * pace if found["status"] == "running" and pace else None
    return {name: none_if_not_finite(value) for name, value in found.items()}


def alerts(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Alerts that began, with whether each still holds; an ``end`` closes the last one of its rule."""
    found: list[dict[str, Any]] = []
    for event in events:
        if event["kind"] != "alert":
            continue
        for earlier in found:
            earlier["active"] = earlier["active"] and earlier["rule"] != event["rule"]
        if event["state"] == "begin":
            found.append({name: event[name] for name in ("step", "rule", "severity", "reason")} | {"active": True})
    return found


def _standing(series: Series, last: Mapping[str, Any], tracking: Tracking) -> dict[str, Any]:
    """State and reason of the controller for people.

    A controller that waits for the entropy to come to the band does not track it yet.
    """
    low, high = last.get("band_low"), last.get("band_high")
    if last.get("state") != "tracking" or tracking.entry_step is not None or low is None or high is None:
        return {}
    said = waiting(series.column("entropy/controlled"), low, high)
    return {"state": "waiting", "reason": said} if said else {}


def _life(events: Sequence[Mapping[str, Any]], last: Mapping[str, Any], pace: float) -> dict[str, Any]:
    """Whether the run lives, and when it was last heard of."""
    ends = [event for event in events if event["kind"] == "run_end"]
    heard = max((event["time"] for event in (*events, last) if event.get("time")), default=math.nan)
    silent = max(0.0, time.time() - heard)
    if ends:
        return {"status": ends[-1]["status"], "error": ends[-1].get("error", ""), "silent_seconds": silent}
    quiet = silent > max(SILENT_SECONDS, SILENT_STEPS * pace)
    return {"status": "silent" if quiet else "running", "error": "", "silent_seconds": silent}


def _pace(series: Series, starts: Sequence[Mapping[str, Any]]) -> float:
    """Seconds per step, with what lies between steps; of the last attempt only. 0: not known yet."""
    first = max(series.steps - PACE - 1, starts[-1]["step"] if starts else 0, 0)
    times = series.column(TIME, first)
    times = times[np.isfinite(times)]
    if len(times) > 1:
        return float(times[-1] - times[0]) / (len(times) - 1)
    totals = series.column("time/total", max(0, series.steps - LAST_STEPS))
    totals = totals[np.isfinite(totals)]
    return float(median(totals)) if len(totals) else 0.0


def _recent_seconds(series: Series) -> dict[str, float]:
    """Of the phases of a step, by phase."""
    names = [name for name in series.names() if name.startswith("time/")]
    found = {name.removeprefix("time/"): series.recent_mean(name) for name in names}
    return {name: value for name, value in found.items() if math.isfinite(value)}
