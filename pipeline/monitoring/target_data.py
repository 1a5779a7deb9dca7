"""Turns a run's evaluations into the data for recommending a band: pass@k beside the entropy of that time."""

from __future__ import annotations

import math

import numpy as np

from pipeline.entropy.target import Measured
from pipeline.monitoring.summary import RunHistory, pass_at

LONGEST_WINDOW = 10  # steps to either side of an evaluation whose entropies are averaged


def measured(run: RunHistory, k: int) -> list[Measured]:
    """Every evaluation of pass@``k``, in order.

    Its entropy is the mean of the steps around it: half way to the next evaluation, at most ten steps, to either side.
    """
    found = [event for event in run.evaluations if str(k) in event["pass_at_k"]]
    steps = [event["step"] for event in found]
    gap = int(np.median(np.diff(steps))) if len(steps) > 1 else 2
    window = min(LONGEST_WINDOW, max(1, gap // 2))
    entropies = run.column("entropy/mean")
    return [
        Measured(step, _mean(entropies[max(0, step - window) : step + window]), *pass_at(event, k))
        for step, event in zip(steps, found, strict=True)
    ]


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan
