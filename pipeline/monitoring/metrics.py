"""The names of all figures that people see: one table, used by every sink, chart and alert rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from pipeline.monitoring.event_kinds import controlled

# Fields of a step event and their names; mappings of a step event keep their keys below a prefix.
STEP_FIELDS = {
    "entropy": "entropy/mean",
    "entropy_filtered": "entropy/filtered",
    "band_low": "entropy/band_low",
    "band_high": "entropy/band_high",
    "target": "entropy/target",
    "temperature": "control/temperature",
    "command": "control/command",
    "positives": "control/positives",
    "gain": "control/gain",
    "reward": "reward/mean",
    "all_equal_groups": "reward/all_equal_groups",
    "verifier_errors": "reward/verifier_errors",
    "unjudged": "reward/unjudged",
    "response_length": "response/length",
    "truncated": "response/truncated",
    "stale_samples": "response/stale",
    "held": "response/held",
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
}
STEP_MAPPINGS = {
    "metrics": "train/",
    "seconds": "time/",
    "tokens": "tokens/",
    "sync": "sync/",
    "memory": "memory/",
    "engines": "engines/",
    "prefix_cache": "prefix_cache/",
    "ages": "ages/",
    "episodes": "episodes/",
    "idle": "idle/",
}
# Metrics of the learner that have a group of their own.
GROUPS = ("mismatch", "correction", "entropy", "router")


def scalars(event: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a ``step`` or ``evaluation`` event by name.

    Null (not finite) and other kinds of events give nothing.
    """
    make = _OF_KIND.get(event["kind"])
    found = make(event) if make else {}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def step_columns(events: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """The figures of several ``step`` events by name, one entry per event; None: no number."""
    found = {name: [event.get(field) for event in events] for field, name in STEP_FIELDS.items()}
    for field, prefix in STEP_MAPPINGS.items():
        mappings = [event.get(field, {}) for event in events]
        for key in dict.fromkeys(key for mapping in mappings for key in mapping):
            found[_named(prefix, key)] = [mapping.get(key) for mapping in mappings]
    derived = [_derived(event) for event in events]
    return found | {name: [figures[name] for figures in derived] for name in derived[0]}


def _step(event: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: event.get(field) for field, name in STEP_FIELDS.items()}
    for field, prefix in STEP_MAPPINGS.items():
        found |= {_named(prefix, key): value for key, value in event.get(field, {}).items()}
    return found | _derived(event)


def _derived(event: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of a step that follow from its fields."""
    low, entropy, high = event["band_low"], controlled(event), event["band_high"]
    return {
        "entropy/controlled": entropy,
        "control/in_band": float(low <= entropy <= high) if _finite(low, entropy, high) else None,
        "control/saturated": float(event["state"] == "saturated"),
        "train/not_finite": sum(not _finite(event.get(name, 0.0)) for name in ("entropy", "loss", "grad_norm")),
    }


def none_if_not_finite(value: Any) -> Any:
    """``value`` for JSON, which has neither NaN nor infinity: None instead of these."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def learner_metric(key: str) -> str:
    """The name of what the learner reported as ``key``: ``mismatch_mean`` is ``mismatch/mean``."""
    return _named("train/", key)


def _finite(*values: float | None) -> bool:
    """Whether every value is a number; those that are not are null in the log, NaN before they are written."""
    return all(value is not None and math.isfinite(value) for value in values)


@cache
def _named(prefix: str, key: str) -> str:
    group, _, rest = key.partition("_")
    return f"{group}/{rest}" if prefix == "train/" and group in GROUPS and rest else prefix + key


def _evaluation(event: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for k, estimate in event["pass_at_k"].items():
        name = f"evaluation/pass_at_{k}"  # with the ends of its 95 % interval
        found |= {name: estimate["value"], name + "_low": estimate["low"], name + "_high": estimate["high"]}
    found |= {f"evaluation/maj_at_{k}": value for k, value in event.get("maj_at_k", {}).items()}
    for name in ("avg", "distinct_correct", "mean_reward", "mean_length", "verifier_errors", "seconds"):
        found[f"evaluation/{name}"] = event.get(name)
    return found


_OF_KIND: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"step": _step, "evaluation": _evaluation}
