"""Lists how the runs of a comparison differ: settings, versions, events and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.keys import flat
from pipeline.config.schema import RunConfig

LABELS = ("name", "run_dir")  # tell runs apart, not what they do
RESULTS = (
    "steps",
    "final_entropy",
    "time_in_band",
    "rms_error",
    "settling_step",
    "pass_at_1",
    "pass_at_16",
    "distinct_correct",
)


def config_differences(configs: Sequence[RunConfig]) -> dict[str, list[str]]:
    """The keys, dotted, whose values are not the same in all configurations, and the values, one per configuration."""
    values = [flat(config) for config in configs]
    keys = [key for key in values[0] if key not in LABELS]
    return {key: [str(one[key]) for one in values] for key in keys if any(one[key] != values[0][key] for one in values)}


def result_differences(summaries: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[Any, float | None]]]:
    """Figures that are not the same in all runs.

    Per run: the value and its change against the first run's (None for the first itself).
    """
    found = {}
    for name in RESULTS:
        values = [summary[name] for summary in summaries]
        if any(value != values[0] for value in values):
            found[name] = [(values[0], None), *((value, _change(value, values[0])) for value in values[1:])]
    return found


def _change(value: Any, first: Any) -> float | None:
    return None if value is None or first is None else float(value - first)
